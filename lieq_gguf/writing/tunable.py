"""What tuning changes: a factor for every block of a matrix, and for every number of a norm. Codes and sizes stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.native import block_scales, ggml
from lieq_gguf.quant_types import F32, QuantType
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.file_order import in_model_form

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

LARGEST_FACTOR = 2.0
"""A factor lies between one divided by this, and this."""


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as the file has it.

    Attributes:
        tensor: The tensor.
        quant_type: Its type.
        data: ``[n_rows, row_bytes]``; a vector is one row.
    """

    tensor: TensorSpec
    quant_type: QuantType
    data: ByteArray

    @property
    def is_tunable(self) -> bool:
        """Whether it has factors: a norm, or a matrix of a layer in a type whose blocks can be multiplied."""
        if self.tensor.is_matrix:
            return block_scales.can_be_multiplied(self.quant_type)
        return is_tunable_norm(self.tensor, self.quant_type)

    @property
    def factors_shape(self) -> tuple[int, int]:
        """``(n_rows, n_blocks)``."""
        return len(self.data), self.data.shape[1] // self.quant_type.block_bytes

    def numbers(self) -> torch.Tensor:
        """Decoded ``[n_rows, n_in]`` float32."""
        return torch.from_numpy(ggml.dequantize(self.data, self.quant_type, torch.get_num_threads()))

    def in_model_form(
        self, factors: torch.Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Parameters of a layer of transformers, with gradients to the factors ``[n_rows, n_blocks]``.

        Matrices are rounded to ``dtype``.
        """
        numbers = self.numbers().to(device)
        if self.tensor.is_matrix:
            numbers = numbers.to(dtype)
        if factors is not None:
            numbers = _Multiplied.apply(numbers, factors)  # type: ignore[no-untyped-call]
        loaded = in_model_form(self.tensor, numbers)
        return dict(zip(self.tensor.names_in_layer, loaded if self.tensor.of_experts else (loaded,), strict=True))

    def multiplied(self, factors: FloatArray) -> WrittenTensor:
        """The tensor with its blocks, or its numbers, multiplied by ``factors`` ``[n_rows, n_blocks]``."""
        if self.quant_type is F32:
            data = (self.data.view(np.float32) * factors).astype(np.float32).view(np.uint8)
        else:
            data = block_scales.multiplied(self.data, self.quant_type, factors)
        return WrittenTensor(self.tensor, self.quant_type, data)


def is_tunable_norm(tensor: TensorSpec, quant_type: QuantType) -> bool:
    """Whether a tensor of a layer is a norm whose numbers may be multiplied."""
    is_plain = not (tensor.is_matrix or tensor.of_experts or tensor.is_negated_exp)
    return is_plain and quant_type is F32 and tensor.name.endswith("norm.weight")


class _Multiplied(torch.autograd.Function):
    """Numbers ``[n_rows, n_in]`` times factors ``[n_rows, n_blocks]`` in float32, in the numbers' precision."""

    @staticmethod
    def forward(ctx: Any, numbers: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(numbers)
        ctx.n_blocks = factors.shape[1]
        blocks = numbers.view(len(numbers), ctx.n_blocks, -1)
        multiplied: torch.Tensor = (blocks * factors[..., None]).flatten(1).to(numbers.dtype)
        return multiplied

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        [numbers] = ctx.saved_tensors
        products = (gradient * numbers).view(len(numbers), ctx.n_blocks, -1)
        return None, products.sum(-1, dtype=torch.float32)

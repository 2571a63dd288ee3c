"""FP8 with a scale for each block, or for the whole matrix: ``quant_method: fp8``, and ``mxfp8``.

Source: ``Fp8Dequantize`` in transformers' ``integrations/finegrained_fp8``, which takes the size of a block from the
number of scales. Where that number does not divide the matrix, blocks are those of ``weight_block_size``, as its
``_dequantize_fp8_weight`` has them. AutoFP8 calls the scale of a matrix ``weight_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lieq_gguf.errors import SourceError
from lieq_gguf.sources.published.stored import Parts, count, require_part, scaled
from lieq_gguf.sources.weight_files import PLAIN_DTYPES

if TYPE_CHECKING:
    import torch

_EXPONENTS = ("U8", "F8_E8M0")  # a scale as a power of two
_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class Fp8:
    """``weight`` in E4M3, times ``weight_scale_inv``.

    Attributes:
        name: Its name in ``config.json``.
        block: Rows and columns that share a scale, or None if ``config.json`` does not tell.
        dtype: torch's name of the type of the model.
    """

    name: str
    block: tuple[int, int] | None
    dtype: str
    marks: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight_scale")
    parts: ClassVar[tuple[str, ...]] = ("weight", *marks)

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], dtype: str) -> Fp8:
        """Read ``quantization_config``.

        Raises:
            SourceError: if a value cannot be; the message begins with the key.
        """
        size, key = settings.get("weight_block_size"), "weight_block_size"
        if size is None:
            return cls(settings["quant_method"], None, dtype)
        if not isinstance(size, list) or len(size) != 2:
            raise SourceError(f"{key} {size!r}; expected two numbers")
        return cls(settings["quant_method"], (count(settings, key, size[0]), count(settings, key, size[1])), dtype)

    def check(self, module: str, parts: Parts, shape: tuple[int, int]) -> None:
        """Require the codes, and scales that fit them."""
        require_part(module, parts, "weight", ("F8_E4M3",), shape)
        end = next(end for end in self.marks if end in parts)
        scale = parts[end]
        if self._block(shape, scale.shape) is None:
            raise SourceError(
                f"{scale.name} in {scale.file} has shape {scale.shape}, which fits no blocks of a matrix {shape}; "
                f"weight_block_size in config.json is {self.block}"
            )
        require_part(module, parts, end, (*PLAIN_DTYPES, *_EXPONENTS), scale.shape)

    def decode(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        """Multiplied in float32, then rounded to the type of the model."""
        import torch

        codes, scales = parts["weight"], next(parts[end] for end in self.marks if end in parts)
        block = self._block((codes.shape[0], codes.shape[1]), tuple(scales.shape))
        assert block is not None  # checked
        if scales.element_size() == 1:
            scales = (scales.view(torch.uint8).float() - _EXPONENT_BIAS).exp2()
        grid = scales.float() if scales.ndim == 2 else scales.float().reshape(1, 1)
        dtype: torch.dtype = getattr(torch, self.dtype)
        return scaled(codes, grid, block).to(dtype)

    def _block(self, shape: tuple[int, int], grid: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a block, from the shapes of weight and scales; None if they do not fit."""
        if grid in ((), (1,)):
            grid = (1, 1)
        if len(grid) != 2 or 0 in grid:
            return None
        if self.block is not None and grid == tuple(-(-n // size) for n, size in zip(shape, self.block, strict=True)):
            return self.block
        if shape[0] % grid[0] or shape[1] % grid[1]:
            return None
        return shape[0] // grid[0], shape[1] // grid[1]

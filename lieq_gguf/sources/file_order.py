"""How llama.cpp stores what transformers has: rows and columns in another order, norms with one added, and the like.

This is the only module that knows how one becomes the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from lieq_gguf.records.spec import TensorSpec

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
Factors: TypeAlias = Sequence[tuple[slice, float]]
"""Rows of a tensor, and by what they are multiplied."""
_Number = TypeVar("_Number", np.float32, np.uint8)

CHUNK_WEIGHTS = 1 << 22
"""Weights converted to float32 at a time: 16 MiB, and as much again for reading ahead."""


def in_file_order(tensor: TensorSpec, rows: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Reorder all rows of a matrix, as numbers or as bytes, from transformers' order to file order."""
    return rows if tensor.row_order is None else rows[tensor.row_order.in_source]


def multiplied(loaded: torch.Tensor, factors: Factors, *, back: bool = False) -> torch.Tensor:
    """A tensor whose rows are multiplied, in float32 and one factor after the other, or divided to have it ``back``."""
    if all(factor == 1 for _, factor in factors):
        return loaded
    import torch

    result = loaded.to(torch.float32, copy=True)
    for rows, factor in factors:
        result[rows] *= 1 / factor if back else factor
    return result


def in_model_form(tensor: TensorSpec, stored: torch.Tensor) -> torch.Tensor:
    """A whole tensor of a file as transformers has it; float32 if its numbers change."""
    import torch

    result = stored.reshape(tensor.shape)
    if tensor.row_order is not None:
        result = result[torch.from_numpy(tensor.row_order.in_file)]
    if tensor.column_order is not None:
        result = result[..., torch.from_numpy(tensor.column_order.in_file)]
    if tensor.offset:
        result = result.float() - tensor.offset
    if tensor.is_negated_exp:
        result = (-result.float()).log()
    return result if tensor.stored_shape is None else result.reshape(tensor.stored_shape)


def file_rows(tensor: TensorSpec, loaded: torch.Tensor) -> Iterator[FloatArray]:
    """A matrix or vector of a model directory as the file has it, some rows ``[n_rows, n_in]`` at a time."""
    rows = loaded.reshape(tensor.shape[1:] if tensor.of_experts else tensor.shape)
    row_order = None if tensor.row_order is None else tensor.row_order.in_source
    if rows.ndim == 1:  # a vector is a single row here, whose numbers are reordered
        rows, row_order = (rows if row_order is None else rows[row_order])[None, :], None
    columns = slice(None) if tensor.column_order is None else tensor.column_order.in_source
    step = max(1, CHUNK_WEIGHTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk = rows[slice(start, start + step) if row_order is None else row_order[start : start + step]]
        chunk = chunk[:, columns].float()
        if tensor.offset:
            chunk = chunk + tensor.offset
        yield (-chunk.exp() if tensor.is_negated_exp else chunk).numpy()

"""The order of rows: Hugging Face stores a rotated head as two halves; some of llama.cpp's graphs interleave them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from lieq_gguf.records.spec import TensorSpec

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
_Number = TypeVar("_Number", np.float32, np.uint8)

CHUNK_WEIGHTS = 1 << 22
"""Weights converted to float32 at a time: 16 MiB, and as much again for reading ahead."""


def rotary_order(n_rows: int, n_heads: int) -> npt.NDArray[np.int64]:
    """Source row of every row in llama.cpp's rotary layout ``[n_rows]``."""
    return np.arange(n_rows).reshape(n_heads, 2, n_rows // n_heads // 2).swapaxes(1, 2).reshape(n_rows)


def in_file_order(tensor: TensorSpec, rows: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Reorder all rows of a matrix, as numbers or as bytes, from transformers' order to file order."""
    return rows[rotary_order(len(rows), tensor.rotary_heads)] if tensor.rotary_heads else rows


def in_model_order(tensor: TensorSpec, loaded: torch.Tensor) -> torch.Tensor:
    """Reorder all rows of a matrix, or all numbers of a vector, from file order to transformers' order."""
    if not tensor.rotary_heads:
        return loaded
    return loaded[np.argsort(rotary_order(len(loaded), tensor.rotary_heads))]


def file_rows(tensor: TensorSpec, loaded: torch.Tensor) -> Iterator[FloatArray]:
    """A matrix or vector of a model directory in file order, some rows ``[n_rows, n_in]`` at a time."""
    rows = loaded if loaded.ndim > 1 else loaded[None, :]
    if tensor.rotary_heads and loaded.ndim == 1:  # a bias is a single row here, whose numbers are reordered
        rows = rows[:, rotary_order(tensor.shape[0], tensor.rotary_heads)]
    order = rotary_order(tensor.shape[0], tensor.rotary_heads) if tensor.rotary_heads and loaded.ndim > 1 else None
    step = max(1, CHUNK_WEIGHTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step] if order is None else rows[order[start : start + step]]
        yield (chunk.float() + tensor.offset if tensor.offset else chunk.float()).numpy()

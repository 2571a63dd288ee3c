"""The order of rows: Hugging Face keeps the halves of a rotated head apart, llama.cpp interleaves them in places."""

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
"""Weights converted to float32 at a time: 16 MiB, and as much being read ahead."""


def rotary_order(n_rows: int, n_heads: int) -> npt.NDArray[np.int64]:
    """Source row of every row in llama.cpp's rotary layout ``[n_rows]``."""
    return np.arange(n_rows).reshape(n_heads, 2, n_rows // n_heads // 2).swapaxes(1, 2).reshape(n_rows)


def in_file_order(tensor: TensorSpec, rows: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """All rows of a matrix in transformers' order, as numbers or as bytes, in the order of the file."""
    return rows[rotary_order(len(rows), tensor.rotary_heads)] if tensor.rotary_heads else rows


def in_model_order(tensor: TensorSpec, loaded: torch.Tensor) -> torch.Tensor:
    """All rows of a matrix, or all numbers of a vector, as the file has them, in transformers' order."""
    if not tensor.rotary_heads:
        return loaded
    return loaded[np.argsort(rotary_order(len(loaded), tensor.rotary_heads))]


def file_rows(tensor: TensorSpec, loaded: torch.Tensor) -> Iterator[FloatArray]:
    """A matrix or vector of a model directory as the file has it, some rows ``[n_rows, n_in]`` at a time."""
    rows = loaded if loaded.ndim > 1 else loaded[None, :]
    if tensor.rotary_heads and loaded.ndim == 1:  # a bias has its rotary rows in one line
        rows = rows[:, rotary_order(tensor.shape[0], tensor.rotary_heads)]
    order = rotary_order(tensor.shape[0], tensor.rotary_heads) if tensor.rotary_heads and loaded.ndim > 1 else None
    step = max(1, CHUNK_WEIGHTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step] if order is None else rows[order[start : start + step]]
        yield (chunk.float() + tensor.offset if tensor.offset else chunk.float()).numpy()

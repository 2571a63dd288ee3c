"""Writes the GGUF file tensor by tensor: read, quantise, append.

The header is complete before the first tensor, because the plan determines every size. The caller gives a temporary
name, and replaces the target only when the file has passed its checks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import OutputError, QuantizationError
from lieq_gguf.native import encoders
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.bits import padded
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.source import Source
from lieq_gguf.writing.header import Header

_SLICE_WEIGHTS = 1 << 17  # weights per task of a thread: tens of milliseconds, about the same for every slice
_AHEAD = 3  # slices begun per thread, so that none is idle while the file is written

_RowSlice: TypeAlias = tuple[TensorSpec, "npt.NDArray[np.float32] | npt.NDArray[np.uint8]", int, bool]
"""A tensor; some of its rows, float32 ``[n_rows, n_in]`` or already encoded; index of the first; whether it ends it."""


@dataclass(frozen=True)
class EncodedRows:
    """Some rows of a tensor, encoded and in file order.

    Attributes:
        tensor: The tensor.
        data: ``[n_rows, row_bytes]``.
        is_last: Whether these are its last rows.
    """

    tensor: TensorSpec
    data: npt.NDArray[np.uint8]
    is_last: bool


def write_file(
    target: Path,
    header: Header,
    encoded: Iterable[EncodedRows],
    advance: Callable[[float], None] = lambda _amount: None,
) -> dict[str, int]:
    """Write header and tensors.

    Args:
        target: File to write, replaced if it exists.
        header: Made for these tensors.
        encoded: All tensors, in file order.
        advance: Called with the number of weights written.

    Returns:
        Name of each tensor to the CRC-32 of its bytes.

    Raises:
        OutputError: if the file does not have the size in the header.
    """
    checksums: dict[str, int] = {}
    with target.open("wb") as file:
        file.write(header.content)
        for rows in encoded:
            file.write(rows.data.data)
            checksums[rows.tensor.name] = crc32(rows.data.data, checksums.get(rows.tensor.name, 0))
            if rows.is_last:
                file.write(bytes(padded(file.tell()) - file.tell()))
            advance(len(rows.data) / rows.tensor.n_rows * rows.tensor.n_weights)
        written = file.tell()
    if written != header.meter.file_bytes:
        raise OutputError(f"{target} has {written} bytes; planned {header.meter.file_bytes}; please report this")
    return checksums


def encode_tensors(
    source: Source,
    tensors: Sequence[TensorSpec],
    plan: QuantPlan,
    importance: ImportanceMatrix | None,
    n_threads: int = 1,
) -> Iterator[EncodedRows]:
    """Read and quantise tensors, independently of each other.

    Args:
        source: The model.
        tensors: The tensors to encode, in file order.
        plan: One type per tensor.
        importance: Weights of the squared errors, or None.
        n_threads: Threads of the encoders.

    Raises:
        QuantizationError: if a tensor cannot be encoded.
    """
    n_threads = max(1, n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        begun: deque[tuple[_RowSlice, Future[npt.NDArray[np.uint8]]]] = deque()
        for rows in _rows_in_order(source, tensors, plan):
            begun.append((rows, pool.submit(_encoded, rows, QUANT_TYPES[plan.types[rows[0].name]], importance)))
            if len(begun) > _AHEAD * n_threads:
                yield _finished(*begun.popleft())
        while begun:
            yield _finished(*begun.popleft())


def _encoded(row_slice: _RowSlice, quant_type: QuantType, importance: ImportanceMatrix | None) -> npt.NDArray[np.uint8]:
    tensor, rows, first_row, _ = row_slice
    if rows.dtype == np.uint8:
        return rows.astype(np.uint8, copy=False)
    mean = None if importance is None else importance.mean(tensor.name)
    if mean is not None and tensor.of_experts:
        mean = mean[first_row // tensor.shape[1]]
    try:
        return encoders.quantize(rows.astype(np.float32, copy=False), quant_type, mean)
    except QuantizationError as error:
        raise QuantizationError(f"{tensor.name}: {error}") from None


def _finished(row_slice: _RowSlice, data: Future[npt.NDArray[np.uint8]]) -> EncodedRows:
    return EncodedRows(row_slice[0], data.result(), is_last=row_slice[3])


def _rows_in_order(source: Source, tensors: Sequence[TensorSpec], plan: QuantPlan) -> Iterator[_RowSlice]:
    """Weights in file order, some rows at a time."""
    for tensor in tensors:
        n_left = tensor.n_rows
        step = max(1, _SLICE_WEIGHTS // tensor.shape[-1])
        for read in source.encoded_rows(tensor, QUANT_TYPES[plan.types[tensor.name]]) or source.rows(tensor):
            for start in range(0, len(read), step):
                rows = read[start : start + step]
                yield tensor, rows, tensor.n_rows - n_left, n_left == len(rows)
                n_left -= len(rows)
        source.release()

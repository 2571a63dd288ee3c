"""Verifies that a written file matches its plan and that llama.cpp runs it. Every tensor is read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

import numpy as np

from lieq_gguf.errors import VerificationError
from lieq_gguf.formats.gguf_file import GgufFile, StoredTensor
from lieq_gguf.native import ggml
from lieq_gguf.native.llama_cpp import open_model

_CHUNK_WEIGHTS = 1 << 20  # weights decoded per task of a thread

_RowSlice: TypeAlias = tuple[StoredTensor, slice]
"""Some rows of a tensor."""


@dataclass(frozen=True)
class Verification:
    """What was checked; a failure raises instead.

    Attributes:
        n_tensors: Number of tensors; their types were compared and all their values are finite.
        n_weights: Number of their weights.
        n_vocab: Number of logits per token in llama.cpp.
    """

    n_tensors: int
    n_weights: int
    n_vocab: int


def verify(
    file: Path,
    types: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    n_threads: int = 1,
    advance: Callable[[float], None] = lambda _amount: None,
    checksums: Mapping[str, int] | None = None,
) -> Verification:
    """Read a file back, compare it with the plan, and run a few tokens in llama.cpp.

    Args:
        file: The file.
        types: Planned type of every tensor, or None to accept the types in the file.
        shapes: Planned shape of every tensor, or None.
        n_threads: Threads to decode and to run with.
        advance: Called with the number of weights checked.
        checksums: CRC-32 of the bytes that each tensor should have, or None.

    Raises:
        FormatError: if the file is not a complete GGUF file.
        VerificationError: if a tensor is missing, not planned, of another type or shape, not finite, or has other bytes
            than were written, or if llama.cpp does not load or run the file.
    """
    n_tensors, n_weights = _check_tensors(file, types, shapes, checksums or {}, n_threads, advance)
    return Verification(n_tensors, n_weights, _run_in_llama_cpp(file, n_threads))


def _check_tensors(
    file: Path,
    types: Mapping[str, str] | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    checksums: Mapping[str, int],
    n_threads: int,
    advance: Callable[[float], None],
) -> tuple[int, int]:
    """Check all tensors and count tensors and weights. Unmaps the file before llama.cpp maps it."""
    content = GgufFile(file)
    if types is not None and content.types != dict(types):
        raise VerificationError(f"{file} differs from the plan: {_difference(content.types, types)}")
    for tensor in content.tensors:
        if shapes is not None and shapes[tensor.spec.name] != tensor.spec.shape:
            planned = shapes[tensor.spec.name]
            raise VerificationError(f"{tensor.spec.name} in {file} has shape {tensor.spec.shape}; planned {planned}")
        if tensor.spec.name in checksums and crc32(tensor.data.data) != checksums[tensor.spec.name]:
            raise VerificationError(
                f"{tensor.spec.name} in {file} has other bytes than were written; the disk or its file system lost some"
            )
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        slices = [row_slice for tensor in content.tensors for row_slice in _row_slices(tensor)]
        for (tensor, rows), is_finite in zip(slices, pool.map(_is_finite, slices), strict=True):
            if not is_finite:
                raise VerificationError(
                    f"{tensor.spec.name} in {file} holds NaN or infinite values as {tensor.quant_type.name}; "
                    f"the source's values exceed the range of the type: choose another with {_type_option(tensor)}"
                )
            advance(tensor.spec.n_weights * (rows.stop - rows.start) / len(tensor.data))
    return len(content.tensors), sum(t.spec.n_weights for t in content.tensors)


def _type_option(tensor: StoredTensor) -> str:
    """The option that gives a tensor another type."""
    if tensor.spec.layer is not None:
        return "--types"
    return "--output-type" if tensor.spec.name == "output.weight" else "--embedding-type"


def _row_slices(tensor: StoredTensor) -> Iterator[_RowSlice]:
    n_rows = len(tensor.data)
    step = max(1, _CHUNK_WEIGHTS * n_rows // max(1, tensor.spec.n_weights))
    for start in range(0, n_rows, step):
        yield tensor, slice(start, min(start + step, n_rows))


def _is_finite(row_slice: _RowSlice) -> bool:
    tensor, rows = row_slice
    return bool(np.isfinite(ggml.dequantize(tensor.data[rows], tensor.quant_type)).all())


def _run_in_llama_cpp(file: Path, n_threads: int) -> int:
    with open_model(file, n_ctx=64, n_threads=n_threads) as model:
        ids = [i % model.n_vocab for i in (1, 11, 101, 1009)]
        logits = model.logits(ids)
        if not np.isfinite(logits).all():
            raise VerificationError(f"llama.cpp runs {file}, but its logits are not finite; convert with other types")
        return model.n_vocab


def _difference(found: Mapping[str, str], planned: Mapping[str, str]) -> str:
    for name in sorted(found.keys() | planned.keys()):
        if found.get(name) != planned.get(name):
            return f"{name} is {found.get(name, 'missing')}, planned {planned.get(name, 'no such tensor')}"
    return "no difference"

"""Importance-matrix files as llama-imatrix writes them: GGUF, and the older ``.dat``."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lieq_gguf.errors import FormatError
from lieq_gguf.formats.gguf_header import HeaderWriter, float_tensor, read_header, type_name, write_gguf
from lieq_gguf.quant_types import F32
from lieq_gguf.records.files import replaced_when_complete
from lieq_gguf.records.importance import FloatArray, ImportanceMatrix

_CHUNK_SIZE = 512  # llama-imatrix's default


def save_importance(matrix: ImportanceMatrix, path: Path) -> None:
    """Write the same GGUF form that llama-imatrix writes and llama-quantize reads."""
    writer = HeaderWriter("")  # the format has no general.architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [matrix.dataset])
    writer.add_uint32("imatrix.chunk_count", matrix.n_chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    tensors = []
    for name in sorted(matrix.in_sum2):
        sums = matrix.in_sum2[name].astype(np.float32)
        counts = matrix.counts.get(name, np.array([matrix.n_tokens], dtype=np.float32))
        tensors.append(float_tensor(f"{name}.in_sum2", sums.reshape(len(counts), -1)))
        tensors.append(float_tensor(f"{name}.counts", counts[:, None].astype(np.float32)))
    with replaced_when_complete(path) as temporary:
        write_gguf(temporary, writer.values, tensors)


def load_importance(path: Path) -> ImportanceMatrix:
    """Read a file of llama-imatrix or :func:`save_importance`, in GGUF or in the older ``.dat`` form.

    Raises:
        FormatError: if the file is not an importance matrix, or no token reached an entry.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; expected an importance matrix") from None
    except OSError as error:
        raise FormatError(f"{path} is not an importance matrix ({error.strerror})") from None
    return _read_gguf(path, content) if content.startswith(b"GGUF") else _read_dat(path, content)


def _read_gguf(path: Path, content: bytes) -> ImportanceMatrix:
    try:
        header = read_header(memoryview(content))
        if header.values.get("general.type") != "imatrix":
            raise FormatError(f"{path} is a GGUF file, but not an importance matrix; expected one of llama-imatrix")
        chunk_size, dataset = _chunk_size(header.values), _dataset(header.values)
        arrays: dict[str, FloatArray] = {}
        for tensor in header.tensors:
            if tensor.ggml_id != F32.ggml_id:
                raise ValueError(f"{tensor.name} is {type_name(tensor.ggml_id)}, expected F32")
            arrays[tensor.name] = np.frombuffer(content, "<f4", prod(tensor.shape), tensor.offset)
    except (ValueError, OverflowError) as error:  # numpy raises them for an array that reaches beyond the file
        raise FormatError(f"{path} is not an importance matrix in GGUF form ({error})") from None
    counts = {n.removesuffix(".counts"): a for n, a in arrays.items() if n.endswith(".counts")}
    sums = {n.removesuffix(".in_sum2"): a for n, a in arrays.items() if n.endswith(".in_sum2")}
    if not sums or sums.keys() != counts.keys():
        raise FormatError(f"{path} is incomplete; expected in_sum2 and counts for every matrix")
    for name in sums:
        _check_entry(path, name, sums[name], counts[name])
    # llama-imatrix sees every token in every dense matrix; scale an entry with another count, so that one serves all.
    of_experts = {name: count for name, count in counts.items() if count.size > 1}
    dense = {name: float(count[0]) for name, count in counts.items() if count.size == 1}
    n_tokens = max(dense.values(), default=1.0)
    scaled = {n: sums[n] if c == n_tokens else sums[n] * np.float32(n_tokens / c) for n, c in dense.items()}
    return ImportanceMatrix(
        in_sum2=scaled | {n: sums[n].reshape(c.size, -1) for n, c in of_experts.items()},
        n_tokens=int(n_tokens),
        chunk_size=chunk_size,
        dataset=dataset,
        counts=of_experts,
    )


def _check_entry(path: Path, name: str, sums: FloatArray, counts: FloatArray) -> None:
    """Require one count of tokens, or one per expert, and sums of squares."""
    is_count = counts.size > 0 and bool(np.isfinite(counts).all() and (counts >= 0).all() and counts.max() >= 1)
    if not is_count or sums.size == 0 or sums.size % counts.size:
        raise FormatError(f"{path} has no usable count for {name}; make it again with more text")
    if not np.isfinite(sums).all() or (sums < 0).any():
        raise FormatError(f"{path} has sums for {name} that are negative or not finite; make it again")


def _chunk_size(values: Mapping[str, Any]) -> int:
    chunk_size = values.get("imatrix.chunk_size", _CHUNK_SIZE)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"imatrix.chunk_size is {chunk_size!r}, expected a number of tokens")
    return chunk_size


def _dataset(values: Mapping[str, Any]) -> str:
    names = values.get("imatrix.datasets")
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def _read_dat(path: Path, content: bytes) -> ImportanceMatrix:
    """The form of llama-imatrix before August 2025: little-endian counts, names, and means times calls.

    An entry's values are ``Σ x² / n_rows · n_calls``; divided by ``n_calls`` they are the means. The file does not
    store the number of tokens; a call is a sequence of 512 tokens unless the user changed it.
    """
    place = 0

    def number() -> int:
        nonlocal place
        place += 4
        return int(struct.unpack_from("<i", content, place - 4)[0])

    def text() -> str:
        nonlocal place
        n_bytes = number()
        if not 0 < n_bytes <= len(content) - place:
            raise ValueError(f"a name of {n_bytes} bytes at byte {place}")
        place += n_bytes
        return content[place - n_bytes : place].decode("utf-8")

    try:
        means: dict[str, FloatArray] = {}
        n_entries, most_calls = number(), 0
        if n_entries < 1:
            raise ValueError(f"{n_entries} entries")
        for _ in range(n_entries):
            name, n_calls, n_values = text(), number(), number()
            if n_calls < 1 or n_values < 1:
                raise ValueError(f"{name} with {n_values} values of {n_calls} calls")
            values = np.frombuffer(content, dtype="<f4", count=n_values, offset=place)
            place += values.nbytes
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"{name} with sums that are negative or not finite")
            means[name] = (values / np.float32(n_calls)).astype(np.float32)
            most_calls = max(most_calls, n_calls)
        has_more = place < len(content)
        n_chunks = number() if has_more else most_calls
        dataset = text() if has_more and place < len(content) else "unknown"
    except (struct.error, ValueError) as error:
        why = f"it ends at byte {len(content)}" if isinstance(error, struct.error) else str(error)
        raise FormatError(
            f"{path} is not an importance matrix ({why}); expected a .gguf or .dat file of llama-imatrix"
        ) from None
    n_tokens = max(1, n_chunks) * _CHUNK_SIZE
    sums = {name: mean * np.float32(n_tokens) for name, mean in means.items()}
    return ImportanceMatrix(sums, n_tokens, _CHUNK_SIZE, dataset)

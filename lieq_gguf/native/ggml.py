"""ggml's own encoders and decoders, from the library that llama-cpp-python ships.

llama-quantize runs the same library, so a tensor encoded here equals llama.cpp's byte for byte. Rows are independent
and a call through ctypes releases the interpreter lock, so threads over rows use all cores.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import QuantizationError
from lieq_gguf.quant_types import QUANT_TYPES, QuantType

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_CHUNK_WEIGHTS = 1 << 14  # weights per task of a thread: milliseconds, so that no thread waits long for the last
_init_lock = threading.Lock()
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h, up to the members used here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    )


def library_file() -> Path:
    """The library that llama-cpp-python ships.

    Raises:
        QuantizationError: if it is not there.
    """
    # find_spec, because importing llama_cpp takes half a second and loads every backend.
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise QuantizationError("llama-cpp-python is not installed; install it with: pip install llama-cpp-python")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")
    if not (folder / name).is_file():
        raise QuantizationError(
            f"{folder / name} is missing; expected the library that llama-cpp-python ships: reinstall llama-cpp-python"
        )
    return folder / name


@lru_cache(maxsize=1)
def ggml_library() -> ctypes.CDLL:
    """The library, once its types are known to be ours.

    Raises:
        QuantizationError: if it cannot be loaded, or describes a type otherwise.
    """
    path = library_file()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise QuantizationError(f"cannot load {path}: {error}; reinstall llama-cpp-python") from error
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    for quant_type in QUANT_TYPES.values():  # with another layout of the struct, to_float would be a wild pointer
        traits = library.ggml_get_type_traits(quant_type.ggml_id).contents
        found = (traits.type_name or b"").upper(), traits.block_size, traits.type_size
        if found != (quant_type.name.encode(), quant_type.block_size, quant_type.block_bytes):
            raise QuantizationError(
                f"{path} describes {quant_type.name} as {found}, which this version does not support; "
                "install the llama-cpp-python that pyproject.toml names"
            )
    return library


def prepare(types: Sequence[QuantType]) -> None:
    """Compute the tables that some encoders need, in the background; it takes one core some seconds.

    Meanwhile all encoders wait for ggml's lock, so call this when there is other work to do first.
    """
    with_tables = [t for t in types if t.has_tables]
    if with_tables:
        work = partial(_prepare_now, with_tables)
        threading.Thread(target=work, name="ggml-tables", daemon=True).start()


def _prepare_now(types: Sequence[QuantType]) -> None:
    library = ggml_library()
    for quant_type in types:
        with _init_lock:
            library.ggml_quantize_init(quant_type.ggml_id)


def quantize(
    weights: FloatArray, quant_type: QuantType, importance: FloatArray | None = None, n_threads: int = 1
) -> ByteArray:
    """Encode rows of weights.

    Args:
        weights: ``[n_rows, n_per_row]``, finite.
        quant_type: Target type; ``n_per_row`` must be a whole number of its blocks.
        importance: ``[n_per_row]``, non-negative weight of each column's squared error (mean squared input of the
            matrix); required by types with ``needs_imatrix``.
        n_threads: Threads over rows. The bytes do not depend on it.

    Returns:
        ``[n_rows, row_bytes]``, the bytes of the file.

    Raises:
        QuantizationError: if the rows do not fit or are not finite, or a type that needs importance gets none.
            ggml itself would abort the process.
    """
    source, importance = require_encodable(weights, quant_type, importance)
    n_rows, n_per_row = source.shape
    library = ggml_library()
    with _init_lock:
        library.ggml_quantize_init(quant_type.ggml_id)
    result = np.empty((n_rows, quant_type.row_bytes(n_per_row)), dtype=np.uint8)
    importance_address = None if importance is None else importance.ctypes.data

    def encode(rows: tuple[int, int]) -> None:
        start, stop = rows
        written = library.ggml_quantize_chunk(
            quant_type.ggml_id,
            source.ctypes.data,
            result.ctypes.data,
            start * n_per_row,
            stop - start,
            n_per_row,
            importance_address,
        )
        if written != (stop - start) * result.shape[1]:
            raise QuantizationError(
                f"ggml wrote {written} bytes of {quant_type.name}; expected {result[start:stop].nbytes}"
            )

    over_rows(encode, n_rows, n_per_row, n_threads)
    return result


def require_encodable(
    weights: FloatArray, quant_type: QuantType, importance: FloatArray | None
) -> tuple[FloatArray, FloatArray | None]:
    """Weights and importance as contiguous arrays, if an encoder of the type can take them.

    Raises:
        QuantizationError: as :func:`quantize`.
    """
    n_per_row = weights.shape[1]
    if not quant_type.fits(n_per_row):
        raise QuantizationError(
            f"a row of {n_per_row} weights cannot be divided into {quant_type.name}'s blocks of {quant_type.block_size}"
        )
    if not np.isfinite(weights).all():
        raise QuantizationError("the weights hold NaN or infinite values; the source model is damaged")
    if quant_type.needs_imatrix and importance is None:
        raise QuantizationError(f"{quant_type.name} needs an importance matrix; choose another type or give --imatrix")
    if importance is not None:
        if importance.shape != (n_per_row,) or not np.isfinite(importance).all() or (importance < 0).any():
            raise QuantizationError(f"expected the importance as {n_per_row} finite, positive numbers, one per column")
        importance = np.ascontiguousarray(importance, dtype=np.float32)
    return np.ascontiguousarray(weights, dtype=np.float32), importance


def dequantize(data: ByteArray, quant_type: QuantType, n_threads: int = 1) -> FloatArray:
    """Decode rows of bytes ``[n_rows, row_bytes]`` into float32 ``[n_rows, n_per_row]``.

    Raises:
        QuantizationError: if the bytes are not a whole number of blocks.
    """
    n_rows, row_bytes = data.shape
    if row_bytes % quant_type.block_bytes:
        raise QuantizationError(
            f"a row of {row_bytes} bytes cannot be divided into {quant_type.name}'s blocks of {quant_type.block_bytes}"
        )
    n_per_row = row_bytes // quant_type.block_bytes * quant_type.block_size
    source = np.ascontiguousarray(data)
    if quant_type.name == "F32":  # needs no decoder, and ggml has none
        return source.view(np.float32)
    result = np.empty((n_rows, n_per_row), dtype=np.float32)
    to_float = ggml_library().ggml_get_type_traits(quant_type.ggml_id).contents.to_float

    def decode(rows: tuple[int, int]) -> None:
        start, stop = rows
        to_float(source[start:].ctypes.data, result[start:].ctypes.data, (stop - start) * n_per_row)

    over_rows(decode, n_rows, n_per_row, n_threads)
    return result


def over_rows(work: Callable[[tuple[int, int]], None], n_rows: int, n_per_row: int, n_threads: int) -> None:
    """Call ``work`` in threads with ``(first, end)`` of consecutive chunks of a matrix's rows."""
    chunks = list(_row_chunks(n_rows, n_per_row))
    if n_threads <= 1 or len(chunks) == 1:
        for chunk in chunks:
            work(chunk)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(work, chunks):  # the loop re-raises what a thread raised
            pass


def _row_chunks(n_rows: int, n_per_row: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // n_per_row)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)

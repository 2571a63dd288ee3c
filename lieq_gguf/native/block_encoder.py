"""Blocks encoded for the output of a matrix. In C++, since most steps are too small for numpy.

ggml finds scales and codes for the weights, each column with an importance of its own. Here errors of columns count
together, by their second moments. Each part of a block starts with the best of some scales, by least squares. Then
codes are chosen in the order of the columns, each making good what those before it have left, and scales for these
codes: every weight is linear in the scale of its part of the block, in the part's minimum and in the block's own scale,
so what a change is worth is known without a trial.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import QuantizationError
from lieq_gguf.native import block_scales
from lieq_gguf.native.code_layouts import CodeLayout

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

LIBRARY = Path(__file__).with_name("_block_encoder.so")
"""Compiled when the package is installed, from the C++ file beside this one."""

_N_ROUNDS, _N_ROUNDS_OF_ENTRIES = 2, 1  # of codes and scales; another one gains less than 0.3 % of the error

_LEAST_IMPORTANCE = 0.05  # of the mean, so that scales do not forget columns without inputs


class _Layout(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n_columns", "n_parts", "n_entries", "entry_width", "n_signs")),
        *((name, ctypes.c_int32) for name in ("n_deltas", "n_factors", "most_scale", "most_minimum")),
        *((name, ctypes.c_float) for name in ("unit", "first")),
        ("entries", ctypes.c_void_p),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("n_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("exact", "before", "wanted")),
        *((name, ctypes.c_void_p) for name in ("moments", "coupling", "pivots", "importance")),
    )


class _Blocks(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("codes", "scales", "minima", "factors", "deltas", "decoded"))


@dataclass(frozen=True)
class Columns:
    """What is wanted of the columns of one block, for some rows.

    Attributes:
        exact: The weights ``[n_columns, n_rows]``.
        before: Corrections from the blocks before, ``[n_columns, n_rows]``; they reach columns through ``coupling``.
        wanted: The weights that this block should have if it could, ``[n_columns, n_rows]``.
        moments: ``H`` ``[n_columns, n_columns]``: a change of weights ``ΔW`` costs ``ΔW H ΔWᵀ``.
        coupling: ``A`` ``[n_columns, n_columns]``, with ``H = A P Aᵀ``; upper triangular with ones on the diagonal.
        pivots: The diagonal of ``P`` ``[n_columns]``.
    """

    exact: FloatArray
    before: FloatArray
    wanted: FloatArray
    moments: FloatArray
    coupling: FloatArray
    pivots: FloatArray


def encode(
    layout: CodeLayout, columns: Columns, start: ByteArray | None = None, n_rounds: int | None = None
) -> tuple[ByteArray, FloatArray]:
    """Encode one block of every row.

    Args:
        layout: Its layout.
        columns: What is wanted.
        start: Encoded blocks ``[n_rows, block_bytes]`` to improve. None for our own, which types with deltas lack.
        n_rounds: How often codes and scales are chosen; none for the scales of ``start`` alone.

    Returns:
        The blocks ``[n_rows, block_bytes]``, and their decoded weights ``[n_columns, n_rows]``.

    Raises:
        QuantizationError: if the compiled library is missing.
    """
    if n_rounds is None:
        n_rounds = _N_ROUNDS if layout.n_together == 1 else _N_ROUNDS_OF_ENTRIES
    n_columns, n_rows = columns.exact.shape
    blocks = np.zeros((n_rows, layout.quant_type.block_bytes), dtype=np.uint8) if start is None else start
    codes = layout.codes.read(blocks)
    kinds = (layout.scales, layout.minima)
    scales, minima = (np.zeros((n_rows, 1)) if kind is None else kind.read(blocks) for kind in kinds)
    of_blocks = block_scales.read(blocks, layout.quant_type)
    n_factors = of_blocks.shape[1]
    factors = np.zeros((n_rows, 2), dtype=np.float32)
    factors[:, :n_factors] = of_blocks
    adds_minimum = n_factors == 2 and layout.minima is None  # one of the block's own
    if layout.minima is None:
        minima = np.ones_like(scales)
        factors[:, 1] *= -1
    is_negative = np.zeros((n_rows, 0)) if layout.deltas is None else layout.deltas.read(blocks)
    deltas = layout.delta * (1 - 2.0 * is_negative)
    decoded = np.empty((n_columns, n_rows), dtype=np.float32)

    held: list[npt.NDArray[Any]] = []  # alive until the call ends

    def address(array: npt.NDArray[Any]) -> int:
        held.append(np.ascontiguousarray(array, dtype=np.float32))
        return held[-1].ctypes.data

    described = _Layout(
        n_columns, scales.shape[1], *layout.entries.shape, layout.n_signs, deltas.shape[1], n_factors,
        *(0 if kind is None else kind.most for kind in kinds), layout.unit, layout.first_scale, address(layout.entries),
    )  # fmt: skip
    importance = columns.pivots + _LEAST_IMPORTANCE * columns.pivots.mean()
    moments = columns.moments + np.diag(importance - columns.pivots)
    parts = (columns.exact, columns.before, columns.wanted, moments, columns.coupling, columns.pivots, importance)
    problem = _Problem(n_rows, *map(address, parts))
    addresses = [address(array) for array in (scales, minima, factors, deltas)]
    scales, minima, factors, _ = held[-4:]
    in_c = _Blocks(codes.ctypes.data, *addresses, decoded.ctypes.data)
    references = (ctypes.byref(structure) for structure in (described, problem, in_c))
    if _library().lieq_encode_blocks(*references, start is not None, n_rounds):
        raise MemoryError
    blocks = layout.codes.written(blocks, codes)
    for kind, numbers in zip(kinds, (scales, minima), strict=True):
        if kind is not None:
            blocks = kind.written(blocks, numbers.astype(np.uint32))
    if adds_minimum:
        factors[:, 1] *= -1
    return block_scales.written(blocks, layout.quant_type, factors[:, :n_factors]), decoded


def require_library() -> None:
    """Load the compiled library.

    Raises:
        QuantizationError: if it is missing.
    """
    _library()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:
        raise QuantizationError(
            f"{LIBRARY} is missing or does not fit this machine; expected what the installation compiles: "
            "install lieq-gguf again, or use --no-error-feedback"
        ) from None

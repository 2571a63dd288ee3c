"""Quantisation with error feedback: the error in a column is made good in the columns that are still free.

What counts is not how far the weights move but how far the matrix's output does, ``tr(ΔW H ΔWᵀ)`` with the second
moments ``H = mean(x xᵀ)`` of its input. With ``H = (A D) (A D)ᵀ``, ``A`` upper triangular with ones on its diagonal,
column ``k`` is best rounded from ``W_k + Σ_{i<k} (W_i − Ŵ_i) A_ik``. Types, scales and sizes stay those of ggml: its
encoders are given what is wanted of a block, and where a type rounds weight by weight (``code_layouts``), the codes
inside the block are chosen anew, column by column, on the scales that ggml found.

Source: OBQ and GPTQ, arXiv 2210.17323; without an inverse as in QuIP's LDLQ, arXiv 2307.13304, which gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import spotrf
from threadpoolctl import ThreadpoolController

from lieq_gguf.errors import CalibrationError
from lieq_gguf.native import encoders, ggml
from lieq_gguf.native.code_layouts import CodeLayout, code_layout
from lieq_gguf.quant_types import QuantType

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

DAMPING = 1.0
"""Share that the diagonal grows by, so that correlations count half: those of one text hold only in part in another."""

_FLOOR = 1e-4  # of the mean diagonal, for columns that are never used

_ATTEMPTS = 5
_REVERSED = 1 << 20  # numbers that change places at a time
_SUB_BLOCK = 32  # columns whose errors reach each other one by one; further ones are reached by products of matrices
_LEAST_ROWS, _MOST_ROWS = 384, 1024  # that a thread takes at a time: fewer are slow, more leave threads idle


def coupling(moments: torch.Tensor, damping: float = DAMPING) -> FloatArray:
    """How errors reach later columns: ``A`` of ``H = (A D) (A D)ᵀ``, ``[n_in, n_in]``.

    All in the memory of ``moments``, since those of a wide matrix are as large as some layers.

    Args:
        moments: ``H`` ``[n_in, n_in]``, float32, symmetric, on the CPU; overwritten.
        damping: Share that every element of the diagonal grows by; ten times as much where the matrix is not positive
            definite.

    Raises:
        CalibrationError: if that does not help.
    """
    matrix: FloatArray = np.ascontiguousarray(moments.numpy())
    n_in = len(matrix)
    mean = float(matrix.diagonal().mean())
    if not np.isfinite(mean):
        raise CalibrationError("the second moments of the activations are not finite; the model's weights are damaged")
    if mean <= 0:
        return np.eye(n_in, dtype=np.float32)
    _reverse(matrix)  # L Lᵀ of the reversed matrix is U Uᵀ of the matrix, with U the reversed L
    diagonal = np.einsum("ii->i", matrix)
    diagonal += _FLOOR * mean
    for _ in range(_ATTEMPTS):
        diagonal *= 1 + damping
        damped = diagonal.copy()
        # The transposed view is what LAPACK takes without a copy; its upper triangle is the lower one here.
        with _blas().limit(limits=torch.get_num_threads(), user_api="blas"):
            _, failed = spotrf(matrix.T, lower=0, clean=0, overwrite_a=1)
        if not failed:
            for i in range(n_in):
                matrix[i, i + 1 :] = 0
            _reverse(matrix)
            matrix /= matrix.diagonal().copy()
            return matrix
        for i in range(n_in):  # the other triangle is as it was
            matrix[i, :i] = matrix[:i, i]
        diagonal[:] = damped
        damping *= 10
    raise CalibrationError("the second moments of the activations are not positive definite; use more tokens")


def _reverse(matrix: FloatArray) -> None:
    """Turn rows and columns of a contiguous matrix around, in place."""
    numbers = matrix.reshape(-1)
    for start in range(0, len(numbers) // 2, _REVERSED):
        stop = min(start + _REVERSED, len(numbers) // 2)
        front, back = slice(start, stop), slice(len(numbers) - stop, len(numbers) - start)
        kept = numbers[front].copy()
        numbers[front] = numbers[back][::-1]
        numbers[back] = kept[::-1]


@dataclass(frozen=True)
class Request:
    """A matrix to encode.

    Attributes:
        weights: ``[n_out, n_in]`` float32, finite.
        quant_type: Target type, whose blocks fit the rows.
        importance: ``[n_in]`` as for ``encoders.quantize``, or None.
    """

    weights: FloatArray
    quant_type: QuantType
    importance: FloatArray | None


def encode(requests: Sequence[Request], coupled: FloatArray, n_threads: int = 1) -> list[ByteArray]:
    """Encode matrices that have the same input, with error feedback.

    Args:
        requests: The matrices.
        coupled: ``A`` of their input ``[n_in, n_in]``.
        n_threads: Threads over rows. The bytes do not depend on it.

    Returns:
        The bytes of the file ``[n_out, row_bytes]``, of each matrix.

    Raises:
        QuantizationError: as ``encoders.quantize``.
    """
    results = [np.empty((len(r.weights), r.quant_type.row_bytes(r.weights.shape[1])), np.uint8) for r in requests]

    def encode_rows(part: tuple[int, slice]) -> None:
        index, rows = part
        request = requests[index]
        results[index][rows] = _encode_rows(request.weights[rows], request.quant_type, request.importance, coupled)

    # Threads over rows leave no work for BLAS's own threads, which would only get in each other's way.
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(max(1, n_threads)) as pool:
        for _ in pool.map(encode_rows, _parts(requests)):  # the loop re-raises what a thread raised
            pass
    return results


def _parts(requests: Sequence[Request]) -> Iterator[tuple[int, slice]]:
    """Rows that are encoded together; how many depends on the matrix alone, as rounding depends on it."""
    for index, request in enumerate(requests):
        n_rows = len(request.weights)
        step = min(max(_LEAST_ROWS, n_rows // 8), _MOST_ROWS)
        for start in range(0, n_rows, step):
            yield index, slice(start, start + step)


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _encode_rows(
    weights: FloatArray, quant_type: QuantType, importance: FloatArray | None, coupled: FloatArray
) -> ByteArray:
    if not quant_type.is_quantized:  # nothing to make good
        return encoders.quantize(weights, quant_type)
    n_in = weights.shape[1]
    layout = code_layout(quant_type)
    group = quant_type.block_size
    wanted = np.ascontiguousarray(weights.T)  # a column of the matrix is a line of memory
    errors = np.empty_like(wanted)
    encoded = []
    for start in range(0, n_in, group):
        columns = slice(start, start + group)
        inside = coupled[columns, columns]
        from_before = coupled[:start, columns].T @ errors[:start]
        moved = wanted[columns] + solve_triangular(inside, from_before, trans="T", unit_diagonal=True)
        blocks = encoders.quantize(
            np.ascontiguousarray(moved.T), quant_type, None if importance is None else importance[columns]
        )
        if layout is not None:
            blocks = _rounded_anew(blocks, layout, wanted[columns], from_before, inside)
        encoded.append(blocks)
        errors[columns] = wanted[columns] - ggml.dequantize(blocks, quant_type).T
    return np.concatenate(encoded, axis=1)


def _rounded_anew(
    blocks: ByteArray, layout: CodeLayout, wanted: FloatArray, from_before: FloatArray, inside: FloatArray
) -> ByteArray:
    """The same scales with codes chosen column by column.

    Args:
        blocks: Encoded rows ``[n_rows, row_bytes]`` of one group of columns.
        layout: How the type keeps its codes.
        wanted: The weights ``[n_columns, n_rows]``.
        from_before: What the groups before add to them.
        inside: ``A`` between the columns of the group.
    """
    base, step = (np.ascontiguousarray(part.T) for part in layout.grid(blocks))
    per_step = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    codes = np.empty(wanted.shape, dtype=np.uint8)
    errors = np.empty_like(wanted)
    for start in range(0, len(wanted), _SUB_BLOCK):
        columns = slice(start, start + _SUB_BLOCK)
        aim = wanted[columns] + from_before[columns] + inside[:start, columns].T @ errors[:start]
        for k in range(start, start + len(aim)):
            level = (aim[k - start] + inside[start:k, k] @ errors[start:k] - base[k]) * per_step[k]
            codes[k], level = layout.nearest(level)
            errors[k] = wanted[k] - (base[k] + step[k] * level)
    return layout.pack(blocks, np.ascontiguousarray(codes.T))

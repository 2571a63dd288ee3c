"""Quantisation with error feedback: later columns correct the error of the columns quantised before them.

It minimises the change of the matrix's output, not that of its weights: ``tr(ΔW H ΔWᵀ)`` with the second moments
``H = mean(x xᵀ)`` of its input. With ``H = (A D) (A D)ᵀ``, ``A`` upper triangular with ones on its diagonal, column
``k`` is best rounded from ``W_k + Σ_{i<k} (W_i − Ŵ_i) A_ik``. Scales and codes of a
block are chosen together (``native/block_encoder``), codes column by column, or by eight where eight weights are one
entry of a codebook; ggml's encoders get the corrected weights of a block where a type has other codes.

Source: OBQ and GPTQ, arXiv 2210.17323; without an inverse as in QuIP's LDLQ, arXiv 2307.13304, which gives the same; by
eight as in QuIP#'s block LDLQ, arXiv 2402.04396.
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
from lieq_gguf.native import block_encoder, encoders, ggml
from lieq_gguf.native.block_encoder import Columns
from lieq_gguf.native.type_layouts import code_layout
from lieq_gguf.quant_types import QuantType

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

DAMPING = 1.0
"""Share by which the diagonal grows, so that correlations count half: those of one text hold only partly in another."""

_FLOOR = 1e-4  # added to the diagonal, times its mean, for columns that are never used

_ATTEMPTS = 5
_SWAPPED_NUMBERS = 1 << 20  # swapped per step, which bounds the copy
_LEAST_ROWS, _MOST_ROWS = 256, 1024  # rows per task of a thread: fewer are slow, more leave threads idle


@dataclass(frozen=True)
class Coupling:
    """Damped second moments ``H = A P Aᵀ``.

    Attributes:
        weights: ``A`` ``[n_in, n_in]``, upper triangular with ones on the diagonal: the weights with which errors
            correct later columns.
        pivots: The diagonal of ``P`` ``[n_in]``.
    """

    weights: FloatArray
    pivots: FloatArray

    def moments(self) -> FloatArray:
        """``H`` itself."""
        scaled: FloatArray = self.weights * self.pivots
        return scaled @ self.weights.T

    def divided(self, products: FloatArray) -> FloatArray:
        """``products`` ``[n_out, n_in]`` times the inverse of ``H``."""
        with _blas().limit(limits=torch.get_num_threads(), user_api="blas"):
            half = solve_triangular(self.weights, products.T, unit_diagonal=True, check_finite=False)
            half /= self.pivots[:, None]
            result = solve_triangular(self.weights, half, trans="T", unit_diagonal=True, check_finite=False)
        return np.ascontiguousarray(result.T)


def coupling(moments: torch.Tensor, damping: float = DAMPING) -> Coupling:
    """Damp and factor second moments.

    Works in the memory of ``moments``, since the moments of a wide matrix can be as large as a layer.

    Args:
        moments: ``H`` ``[n_in, n_in]``, float32, symmetric, on the CPU; overwritten.
        damping: Share by which every element of the diagonal grows; ten times more in each further attempt while the
            matrix is not positive definite.

    Raises:
        CalibrationError: if all attempts fail.
    """
    matrix: FloatArray = np.ascontiguousarray(moments.numpy())
    n_in = len(matrix)
    mean = float(matrix.diagonal().mean())
    if not np.isfinite(mean):
        raise CalibrationError("the second moments of the activations are not finite; the model's weights are damaged")
    if mean <= 0:
        return Coupling(np.eye(n_in, dtype=np.float32), np.ones(n_in, dtype=np.float32))
    _reverse(matrix)  # L Lᵀ of the reversed matrix is U Uᵀ of the matrix, with U the reversed L
    diagonal = np.einsum("ii->i", matrix)
    diagonal += _FLOOR * mean
    for _ in range(_ATTEMPTS):
        diagonal *= 1 + damping
        damped = diagonal.copy()
        # LAPACK takes the transposed view without a copy; its upper triangle is the lower one here.
        with _blas().limit(limits=torch.get_num_threads(), user_api="blas"):
            _, failed = spotrf(matrix.T, lower=0, clean=0, overwrite_a=1)
        if not failed:
            for i in range(n_in):
                matrix[i, i + 1 :] = 0
            _reverse(matrix)
            roots = matrix.diagonal().copy()
            matrix /= roots
            return Coupling(matrix, np.square(roots))
        for i in range(n_in):  # restore it from the other triangle, which is unchanged
            matrix[i, :i] = matrix[:i, i]
        diagonal[:] = damped
        damping *= 10
    raise CalibrationError("the second moments of the activations are not positive definite; use more --n-tokens")


def _reverse(matrix: FloatArray) -> None:
    """Reverse the order of rows and of columns of a contiguous matrix, in place."""
    numbers = matrix.reshape(-1)
    for start in range(0, len(numbers) // 2, _SWAPPED_NUMBERS):
        stop = min(start + _SWAPPED_NUMBERS, len(numbers) // 2)
        front, back = slice(start, stop), slice(len(numbers) - stop, len(numbers) - start)
        copied = numbers[front].copy()
        numbers[front] = numbers[back][::-1]
        numbers[back] = copied[::-1]


@dataclass(frozen=True)
class MatrixToEncode:
    """A matrix, and how to encode it.

    Attributes:
        weights: ``[n_out, n_in]`` float32, finite.
        quant_type: Target type, whose blocks fit the rows.
        importance: ``[n_in]`` as in ``encoders.quantize``, or None.
    """

    weights: FloatArray
    quant_type: QuantType
    importance: FloatArray | None


def encode(matrices: Sequence[MatrixToEncode], coupled: Coupling, n_threads: int = 1) -> list[ByteArray]:
    """Encode matrices that share an input, with error feedback.

    Args:
        matrices: The matrices.
        coupled: The second moments of their input.
        n_threads: Threads over rows. The bytes do not depend on it.

    Returns:
        For each matrix the bytes of the file, ``[n_out, row_bytes]``.

    Raises:
        QuantizationError: as ``encoders.quantize``.
    """
    for matrix in matrices:
        ggml.require_encodable(matrix.weights, matrix.quant_type, matrix.importance)
    results = [np.empty((len(m.weights), m.quant_type.row_bytes(m.weights.shape[1])), np.uint8) for m in matrices]

    def encode_slice(row_slice: tuple[int, slice]) -> None:
        index, rows = row_slice
        matrix = matrices[index]
        results[index][rows] = _encode_rows(matrix.weights[rows], matrix.quant_type, matrix.importance, coupled)

    # One BLAS thread, since the threads over rows already use all cores.
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(max(1, n_threads)) as pool:
        for _ in pool.map(encode_slice, _row_slices(matrices)):  # the loop re-raises what a thread raised
            pass
    return results


def _row_slices(matrices: Sequence[MatrixToEncode]) -> Iterator[tuple[int, slice]]:
    """Index of a matrix and rows to encode together; the slices affect rounding, so they depend on the matrix alone."""
    for index, matrix in enumerate(matrices):
        n_rows = len(matrix.weights)
        step = min(max(_LEAST_ROWS, n_rows // 8), _MOST_ROWS)
        for start in range(0, n_rows, step):
            yield index, slice(start, start + step)


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _encode_rows(
    weights: FloatArray, quant_type: QuantType, importance: FloatArray | None, coupled: Coupling
) -> ByteArray:
    if not quant_type.is_quantized:  # no error to correct
        return encoders.quantize(weights, quant_type)
    n_in = weights.shape[1]
    layout = code_layout(quant_type)
    group = quant_type.block_size
    exact = np.ascontiguousarray(weights.T)  # [n_in, n_rows]: a column of the matrix is contiguous in memory
    errors = np.empty_like(exact)
    encoded = []
    for start in range(0, n_in, group):
        columns = slice(start, start + group)
        inside = Coupling(coupled.weights[columns, columns], coupled.pivots[columns])
        from_before = coupled.weights[:start, columns].T @ errors[:start]
        wanted = exact[columns] + solve_triangular(inside.weights, from_before, trans="T", unit_diagonal=True)
        some = None if importance is None else importance[columns]
        if layout is None:
            blocks = _by_ggml(wanted, quant_type, some)
            decoded = ggml.dequantize(blocks, quant_type).T
        else:
            targets = Columns(exact[columns], from_before, wanted, inside.moments(), inside.weights, inside.pivots)
            start_blocks = None if layout.deltas is None else _by_ggml(wanted, quant_type, some)
            blocks, decoded = block_encoder.encode(layout, targets, start_blocks)
        encoded.append(blocks)
        errors[columns] = exact[columns] - decoded
    return np.concatenate(encoded, axis=1)


def _by_ggml(wanted: FloatArray, quant_type: QuantType, importance: FloatArray | None) -> ByteArray:
    """Ggml's blocks of weights ``[n_columns, n_rows]``."""
    return encoders.quantize(np.ascontiguousarray(wanted.T), quant_type, importance)

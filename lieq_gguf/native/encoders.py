"""Encoders: ggml's own, and a better one where ggml's is naive.

For Q2_0, ggml takes the largest magnitude of a block as its scale, which rounds nearly all weights to zero. Here we
search for the scale, of either sign, with the least weighted error; format and decoder are the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES, QuantType

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_Q2_0 = QUANT_TYPES["Q2_0"]
_LEAST, _MOST = -1, 2  # smallest and largest level, in scales
_SPREADS = tuple(np.linspace(0.9, 3.9, 16))
"""Scales to try, as largest magnitude of the block over scale; for 64 normal weights about 2.2 is best."""


def quantize(
    weights: FloatArray, quant_type: QuantType, importance: FloatArray | None = None, n_threads: int = 1
) -> ByteArray:
    """Encode rows of weights; same arguments, result and errors as :func:`lieq_gguf.native.ggml.quantize`."""
    if quant_type is not _Q2_0:
        return ggml.quantize(weights, quant_type, importance, n_threads)
    weights, importance = ggml.require_encodable(weights, quant_type, importance)
    result = np.empty((len(weights), quant_type.row_bytes(weights.shape[1])), dtype=np.uint8)

    def encode(rows: tuple[int, int]) -> None:
        first, end = rows
        blocks = weights[first:end].reshape(-1, quant_type.block_size)
        if importance is None:
            weighted = np.ones_like(blocks)
        else:
            weighted = np.tile(importance.reshape(-1, quant_type.block_size), (end - first, 1))
        result[first:end] = _encode_q2_0(blocks, weighted).reshape(end - first, -1)

    ggml.over_rows(encode, len(weights), weights.shape[1], n_threads)
    return result


def _encode_q2_0(blocks: FloatArray, importance: FloatArray) -> ByteArray:
    """Blocks ``[n, 64]`` as bytes ``[n, 18]``: the scale in F16, and four codes a byte."""
    scales = _least_error_scales(blocks, importance).astype(np.float16)
    codes = (_levels(blocks, scales.astype(np.float32)) - _LEAST).astype(np.uint8).reshape(len(blocks), -1, 4)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return np.concatenate([scales.view(np.uint8).reshape(-1, 2), packed], axis=1)


def _least_error_scales(blocks: FloatArray, importance: FloatArray) -> FloatArray:
    """Scales ``[n]``: each scale to try gives codes; of all these, the best codes with the scale that fits them best.

    For codes ``q`` the best scale is ``Σ w x q / Σ w q²``, and reduces the error by ``(Σ w x q)² / Σ w q²``.
    """
    largest = np.abs(blocks).max(axis=1)
    weighted = importance * blocks
    best_gain = np.zeros(len(blocks), dtype=np.float32)
    best = np.zeros(len(blocks), dtype=np.float32)
    for spread in _SPREADS:
        for scale in (largest / np.float32(spread), -largest / np.float32(spread)):
            levels = _levels(blocks, scale)
            along = np.einsum("ij,ij->i", weighted, levels)
            length = np.einsum("ij,ij,ij->i", importance, levels, levels)
            fitted = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
            gain = along * fitted
            is_better = gain > best_gain
            best_gain[is_better], best[is_better] = gain[is_better], fitted[is_better]
    return best


def _levels(blocks: FloatArray, scales: FloatArray) -> FloatArray:
    """The level nearest to each weight, as a float; zero where the scale is zero."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    levels = blocks * inverse[:, None]
    return np.clip(np.rint(levels, out=levels), _LEAST, _MOST, out=levels)

"""Scales for the output of a matrix: given the codes of a block, the scales with which it comes closest.

ggml finds scales for the weights, each column with an importance of its own. Here errors of columns count together, by
their second moments. Every weight is linear in the scale of its part of the block, in the part's minimum and in the
block's own scale, so what a change is worth is known without a trial. The parts take turns.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from lieq_gguf.native import block_scales, ggml
from lieq_gguf.native.code_layouts import CodeLayout
from lieq_gguf.native.packed_numbers import PackedNumbers

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_LEAST_FACTOR = 0.8  # of a block's scale
_UP_AND_DOWN = (0, -1, 1)  # no change first: it is chosen if no other is better


def scales_for(blocks: ByteArray, layout: CodeLayout, wanted: FloatArray, moments: FloatArray) -> ByteArray:
    """The same codes with scales that bring ``(Ŵ − W) H (Ŵ − W)ᵀ`` down.

    Args:
        blocks: Encoded rows ``[n_rows, row_bytes]`` of one block each.
        layout: Their layout.
        wanted: ``W`` ``[n_columns, n_rows]``.
        moments: ``H`` ``[n_columns, n_columns]``.
    """
    if layout.scales is not None:
        blocks = _with_scale(blocks, layout, wanted, moments)
        blocks = _with_parts(blocks, layout, layout.scales, wanted, moments)
    return _with_scale(blocks, layout, wanted, moments)


def _with_scale(blocks: ByteArray, layout: CodeLayout, wanted: FloatArray, moments: FloatArray) -> ByteArray:
    """Every block times the factor that is best for it."""
    found = _decoded(blocks, layout)
    weighted = moments @ found
    along, length = (weighted * wanted).sum(axis=0), (weighted * found).sum(axis=0)
    factors = np.divide(along, length, out=np.ones_like(along), where=length > 0)
    factors = np.clip(factors, _LEAST_FACTOR, 1 / _LEAST_FACTOR)
    return block_scales.multiplied(blocks, layout.quant_type, factors[:, None])


def _with_parts(
    blocks: ByteArray, layout: CodeLayout, scales: PackedNumbers, wanted: FloatArray, moments: FloatArray
) -> ByteArray:
    """Every part's scale and minimum changed by one at most, the parts in order."""
    kinds = [scales] if layout.minima is None else [scales, layout.minima]
    numbers = np.stack([kind.read(blocks).T for kind in kinds]).astype(np.float32)  # [n_kinds, n_parts, n_rows]
    units = np.stack([_unit(blocks, layout, kind) for kind in kinds])  # [n_kinds, n_columns, n_rows]
    most = np.array([kind.most for kind in kinds], dtype=np.float32)[:, None]
    changes = np.array(list(product(_UP_AND_DOWN, repeat=len(kinds))), dtype=np.float32)  # [n_changes, n_kinds]
    products = np.einsum("ci,cj->cij", changes, changes).reshape(len(changes), -1)
    pull = moments @ (_decoded(blocks, layout) - wanted)
    width = units.shape[1] // numbers.shape[1]
    for part in range(numbers.shape[1]):
        end = (part + 1) * width
        some = slice(end - width, end)
        unit = units[:, some]
        linear = (unit * pull[some]).sum(axis=1)
        square = np.einsum("icr,jcr->ijr", unit, moments[some, some] @ unit).reshape(-1, unit.shape[2])
        cost = 2 * changes @ linear + products @ square
        new = changes[:, :, None] + numbers[None, :, part]
        cost[((new < 0) | (new > most)).any(axis=1)] = np.inf
        change = changes[cost.argmin(axis=0)].T  # [n_kinds, n_rows]
        numbers[:, part] += change
        pull[end:] += moments[end:, some] @ np.einsum("ir,icr->cr", change, unit)
    for kind, of_kind in zip(kinds, numbers, strict=True):
        blocks = kind.written(blocks, np.ascontiguousarray(of_kind.T).astype(np.uint32))
    return blocks


def _unit(blocks: ByteArray, layout: CodeLayout, numbers: PackedNumbers) -> FloatArray:
    """By what every weight ``[n_columns, n_rows]`` grows if its scale, or its minimum, grows by one."""
    # the most distant numbers: a difference of neighbours would lose digits beside a large offset
    most = _decoded(numbers.filled(blocks, numbers.most), layout)
    return (most - _decoded(numbers.filled(blocks, 0), layout)) / np.float32(numbers.most)


def _decoded(blocks: ByteArray, layout: CodeLayout) -> FloatArray:
    """``[n_columns, n_rows]``."""
    return np.ascontiguousarray(ggml.dequantize(blocks, layout.quant_type).T)

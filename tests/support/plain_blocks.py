"""What ``native/block_encoder`` does, in plain numpy, with base and step of every weight read off ggml's decoder."""

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from lieq_gguf.native import block_scales, ggml
from lieq_gguf.native.code_layouts import CodeLayout
from lieq_gguf.native.packed_numbers import PackedNumbers
from lieq_gguf.native.type_layouts import code_layout
from lieq_gguf.quant_types import QUANT_TYPES

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
LAYOUTS = {name: found for name, quant_type in QUANT_TYPES.items() if (found := code_layout(quant_type))}


def n_indices(layout: CodeLayout) -> int:
    width: int = layout.entries.shape[1]
    return layout.n_together // width


def index_bits(layout: CodeLayout) -> int:
    return (len(layout.entries) - 1).bit_length()


def largest_code(layout: CodeLayout) -> int:
    n_entries: int = len(layout.entries) ** n_indices(layout)
    return (1 << layout.n_signs) * n_entries - 1


def spread(layout: CodeLayout) -> tuple[int, int]:
    """Two codes whose levels differ for every weight."""
    if layout.n_signs:
        return 0, ((1 << layout.n_signs) - 1) << index_bits(layout) * n_indices(layout)
    sums = layout.entries.sum(axis=1)
    return int(sums.argmin()), int(sums.argmax())


def levels_of(layout: CodeLayout, codes: npt.NDArray[Any]) -> Floats:
    """Levels ``[n_rows, n_weights]`` of codes ``[n_rows, n_codes]``."""
    mask = (1 << index_bits(layout)) - 1
    indices = [codes >> i * index_bits(layout) & mask for i in range(n_indices(layout))]
    levels = np.concatenate([layout.entries[some] for some in indices], axis=-1)
    if layout.n_signs:
        bits = codes >> n_indices(layout) * index_bits(layout)
        is_negative = bits[..., None] >> np.arange(8, dtype=codes.dtype) & 1 == 1
        if layout.n_signs == 7:
            is_negative[..., 7] = is_negative[..., :7].sum(axis=-1) % 2 == 1
        levels = np.where(is_negative, -levels, levels)
    result: Floats = levels.reshape(len(codes), -1)
    return result


def grid(layout: CodeLayout, blocks: Bytes) -> tuple[Floats, Floats]:
    """Base and step of every weight ``[n_rows, n_per_row]``, such that it is ``base + step · level``."""
    first, last = (ggml.dequantize(layout.codes.filled(blocks, code), layout.quant_type) for code in spread(layout))
    n_codes = first.shape[1] // layout.n_together
    low, high = (levels_of(layout, np.full((1, n_codes), code, dtype=np.uint32)) for code in spread(layout))
    step: Floats = (last - first) / (high - low)
    return first - step * low, step


def nearest(layout: CodeLayout, values: Floats, importance: Floats) -> tuple[npt.NDArray[np.uint32], Floats]:
    """Codes ``[n_rows]`` and their levels, nearest to ``[n_together, n_rows]`` values in steps."""
    values = values.T
    negative = (values < 0) & bool(layout.n_signs)
    if layout.n_signs == 7:  # ggml turns the sign that costs least
        odd = np.flatnonzero(negative.sum(axis=1) % 2)
        negative[odd, (importance * values[odd] ** 2).argmin(axis=1)] ^= True
    sizes = np.where(negative, -values, values)
    codes, width = np.zeros(len(values), dtype=np.uint32), layout.entries.shape[1]
    for i in range(n_indices(layout)):
        some = slice(i * width, (i + 1) * width)
        apart = np.square(sizes[:, None, some] - layout.entries) @ importance[some]
        codes |= apart.argmin(axis=1).astype(np.uint32) << np.uint32(i * index_bits(layout))
    bits = (negative[:, : layout.n_signs] << np.arange(layout.n_signs)).sum(axis=1).astype(np.uint32)
    codes |= bits << np.uint32(n_indices(layout) * index_bits(layout))
    return codes, levels_of(layout, codes[:, None]).T


def with_scales(layout: CodeLayout, blocks: Bytes, wanted: Floats, moments: Floats) -> Bytes:
    """The same codes with better scales; ``wanted`` is ``[n_columns, n_rows]``."""
    if layout.scales is not None:
        blocks = _with_factor(layout, blocks, wanted, moments)
        blocks = _with_parts(layout, blocks, layout.scales, wanted, moments)
    return _with_factor(layout, blocks, wanted, moments)


def _decoded(layout: CodeLayout, blocks: Bytes) -> Floats:
    return ggml.dequantize(blocks, layout.quant_type).T


def _with_factor(layout: CodeLayout, blocks: Bytes, wanted: Floats, moments: Floats) -> Bytes:
    """The scale of a block, and that of its minima, by least squares."""
    numbers = block_scales.read(blocks, layout.quant_type)
    n = numbers.shape[1]
    kept = np.eye(n, dtype=np.float32)
    parts = [_decoded(layout, block_scales.written(blocks, layout.quant_type, numbers * some)) for some in kept]
    squares = np.stack([np.stack([((moments @ a) * b).sum(axis=0) for b in parts]) for a in parts]).astype(np.float64)
    along = np.stack([((moments @ part) * wanted).sum(axis=0) for part in parts]).astype(np.float64)
    factors = np.ones((n, len(blocks)))
    for row in range(len(blocks)):
        square = squares[..., row]
        if n == 2 and np.linalg.det(square) > 1e-3 * square[0, 0] * square[1, 1]:
            factors[:, row] = np.linalg.solve(square, along[:, row])
        elif square.sum() > 0:
            factors[:, row] = along[:, row].sum() / square.sum()
    changed: Floats = numbers * np.clip(factors, 0.8, 1.25).T.astype(np.float32)
    return block_scales.written(blocks, layout.quant_type, changed)


def _with_parts(layout: CodeLayout, blocks: Bytes, scales: PackedNumbers, wanted: Floats, moments: Floats) -> Bytes:
    """Every combination of changes by one of each part is tried, one part after the other."""
    kinds = [scales] if layout.minima is None else [scales, layout.minima]

    def cost(blocks: Bytes) -> Floats:
        off = _decoded(layout, blocks) - wanted
        result: Floats = ((moments @ off) * off).sum(axis=0)
        return result

    for part in range(scales.n_per_block):
        best, least = blocks, cost(blocks)
        for changes in product((0, -1, 1), repeat=len(kinds)):
            tried, fits = blocks, np.ones(len(blocks), dtype=bool)
            for kind, change in zip(kinds, changes, strict=True):
                numbers = kind.read(tried).astype(np.int64)
                numbers[:, part] += change
                fits &= (numbers[:, part] >= 0) & (numbers[:, part] <= kind.most)
                tried = kind.written(tried, np.clip(numbers, 0, kind.most).astype(np.uint32))
            costs = np.where(fits, cost(tried), np.inf)
            best = np.where((costs < least)[:, None], tried, best)
            least = np.minimum(costs, least)
        blocks = best
    return blocks

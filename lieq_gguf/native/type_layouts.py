"""Where each type stores its codes, and the scales and minima of the parts of a block.

Where the scale of a whole block is, stands in ``block_scales``.

Source: the block structs of ggml-common.h and the decoders of ggml-quants.c, in llama.cpp; the codebooks are those of
the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import gguf.quants
import numpy as np
import numpy.typing as npt

from lieq_gguf.native.code_layouts import CodeLayout
from lieq_gguf.native.packed_numbers import Field, PackedNumbers
from lieq_gguf.quant_types import QUANT_TYPES, QuantType

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ1_DELTA = 0.125
_EIGHTS, _SIXTEENS = np.arange(8), np.arange(16)  # parts of a block with a scale each


def code_layout(quant_type: QuantType) -> CodeLayout | None:
    """The layout of a type, or None.

    Plain numbers have none. Nor have the types for trained weights: packed by threes, or scaled by powers of two.
    """
    return _layouts().get(quant_type.name)


@lru_cache(maxsize=1)
def _layouts() -> dict[str, CodeLayout]:
    return {each.quant_type.name: each for each in (*_level_layouts(), *_codebook_layouts())}


def _field(first_bit: int, n_bits: int, offset: int, byte: IntArray, shift: IntArray | int) -> Field:
    return Field(first_bit, n_bits, offset + byte, shift + np.zeros_like(byte))


def _bits(first_bit: int, n_bits: int, offset: int, word: IntArray, shift: IntArray) -> list[Field]:
    """Bits that may spread over the bytes of a word, which begins at ``word``."""
    places = [(first_bit + i, shift + i) for i in range(n_bits)]
    return [_field(first, 1, offset, word + bit // 8, bit % 8) for first, bit in places]


def _strided(offset: int, n_bits: int, run_length: int, first_bit: int = 0, block_size: int = 256) -> Field:
    """Codes in runs: ``8 / n_bits`` runs share ``run_length`` bytes, each at its own shift; then the next bytes."""
    run, place = np.divmod(np.arange(block_size), run_length)
    n_runs = 8 // n_bits
    return _field(first_bit, n_bits, offset, run // n_runs * run_length + place, run % n_runs * n_bits)


def _nibbles(offset: int, parts: IntArray) -> list[Field]:
    return [_field(0, 4, offset, parts // 2, parts % 2 * 4)]


def _packed(name: str, fields: Sequence[Field], flipped_bits: int = 0) -> PackedNumbers | None:
    return PackedNumbers(QUANT_TYPES[name].block_bytes, tuple(fields), flipped_bits) if fields else None


def _level_layouts() -> Iterator[CodeLayout]:
    def layout(
        name: str,
        codes: Sequence[Field],
        levels: Sequence[int],
        scales: Sequence[Field] = (),
        minima: Sequence[Field] = (),
        flipped_code: int = 0,
        flipped_scale: int = 0,
        first_scale: int = 0,
    ) -> CodeLayout:
        return CodeLayout(
            QUANT_TYPES[name],
            PackedNumbers(QUANT_TYPES[name].block_bytes, tuple(codes), flipped_code),
            np.array(levels, dtype=np.float32)[:, None],
            scales=_packed(name, scales, flipped_scale),
            first_scale=first_scale if scales else 1,
            minima=_packed(name, minima),
        )

    small = np.arange(32)
    high_of_5 = [_field(4, 1, offset, small // 8, small % 8) for offset in (2, 4)]
    half, run, place = np.arange(256) // 128, np.arange(256) % 128 // 32, np.arange(256) % 32
    low_of_q6 = _field(0, 4, 0, 64 * half + 32 * (run % 2) + place, 4 * (run // 2))
    j, k = _EIGHTS, _SIXTEENS
    of_q3 = [_field(0, 4, 96, k % 8, k // 8 * 4), _field(4, 2, 104, k % 4, k // 4 * 2)]
    of_q4 = [_field(0, 4, 4, j + j // 4 * 4, 0), _field(4, 2, 4, j % 4, 4 + j // 4 * 2)]
    min_of_q4 = [_field(0, 4, 4, j + 4, j // 4 * 4), _field(4, 2, 4, j % 4 + 4, 4 + j // 4 * 2)]
    of_iq4 = [*_nibbles(4, j), _field(4, 2, 2, j // 4, j % 4 * 2)]
    of_q3_codes = [_strided(32, 2, 32), _strided(0, 1, 32, first_bit=2)]
    yield from (
        layout("Q2_K", [_strided(16, 2, 32)], range(4), [_field(0, 4, 0, k, 0)], [_field(0, 4, 0, k, 4)]),
        layout("Q3_K", of_q3_codes, range(-4, 4), of_q3, first_scale=-32),
        layout("Q4_K", [_strided(16, 4, 32)], range(16), of_q4, min_of_q4),
        layout("Q5_K", [_strided(48, 4, 32), _strided(16, 1, 32, first_bit=4)], range(32), of_q4, min_of_q4),
        layout(
            "Q6_K",
            [low_of_q6, _strided(128, 2, 32, first_bit=4)],
            range(-32, 32),
            [_field(0, 8, 192, k, 0)],
            flipped_scale=0x80,
            first_scale=-128,
        ),
        layout("Q2_0", [_field(0, 2, 2, np.arange(64) // 4, np.arange(64) % 4 * 2)], range(-1, 3)),
        layout("Q4_0", [_strided(2, 4, 16, block_size=32)], range(-8, 8)),
        layout("Q4_1", [_strided(4, 4, 16, block_size=32)], range(16)),
        layout("Q5_0", [_strided(6, 4, 16, block_size=32), high_of_5[0]], range(-16, 16)),
        layout("Q5_1", [_strided(8, 4, 16, block_size=32), high_of_5[1]], range(32)),
        layout("Q8_0", [_field(0, 8, 2, small, 0)], range(-128, 128), flipped_code=0x80),
        layout("IQ4_NL", [_strided(2, 4, 16, block_size=32)], _IQ4_LEVELS),
        layout("IQ4_XS", [_strided(8, 4, 16)], _IQ4_LEVELS, of_iq4, first_scale=-32),
    )


def _codebook_layouts() -> Iterator[CodeLayout]:
    def layout(
        name: str,
        codes: Sequence[Field],
        n_signs: int,
        scales: Sequence[Field],
        unit: float,
        deltas: Sequence[Field] = (),
    ) -> CodeLayout:
        return CodeLayout(
            QUANT_TYPES[name],
            PackedNumbers(QUANT_TYPES[name].block_bytes, tuple(codes)),
            _codebook(name),
            n_signs,
            scales=_packed(name, scales),
            unit=unit,
            first_scale=0.5,
            deltas=_packed(name, deltas),
            delta=_IQ1_DELTA if deltas else 0,
        )

    code = np.arange(32)  # of a block of 256 weights
    word, place = np.divmod(code, 4)
    j, k = _EIGHTS, _SIXTEENS

    def indices(offset: int, first_bits: Sequence[int]) -> list[Field]:
        """The lowest eight bits of each index, in bytes of their own."""
        n = len(first_bits)
        return [_field(first, 8, offset, n * code + i, 0) for i, first in enumerate(first_bits)]

    iq1_s = [*indices(2, [0]), *_bits(8, 3, 34, 2 * word, 3 * place)]
    iq1_m = [*indices(0, [0]), _field(8, 3, 32, code // 2, code % 2 * 4)]
    iq2_xxs = [_field(0, 8, 2, 8 * word + place, 0), *_bits(8, 7, 6, 8 * word, 7 * place)]
    iq2_xs = [_field(0, 8, 2, 2 * code, 0), _field(8, 8, 3, 2 * code, 0)]
    iq2_s = [*indices(2, [0]), _field(8, 2, 66, word, 2 * place), _field(10, 8, 34, code, 0)]
    iq3_xxs = [*indices(2, [0, 8]), *_bits(16, 7, 66, 4 * word, 7 * place)]
    high_of_iq3_s = [_field(8, 1, 66, word, 2 * place), _field(17, 1, 66, word, 2 * place + 1)]
    iq3_s = [*indices(2, [0, 9]), *high_of_iq3_s, _field(18, 8, 74, code, 0)]
    delta_of_iq1_s = [_field(0, 1, 35, 2 * j, 7)]
    delta_of_iq1_m = [_field(0, 1, 32, code // 2, code % 2 * 4 + 3)]
    yield from (
        layout("IQ1_S", iq1_s, 0, [_field(0, 3, 35, 2 * j, 4)], 2, delta_of_iq1_s),
        layout("IQ1_M", iq1_m, 0, _bits(0, 3, 48, k // 4 * 2, k % 4 * 3), 2, delta_of_iq1_m),
        layout("IQ2_XXS", iq2_xxs, 7, [_field(0, 4, 9, 8 * j, 4)], 0.25),
        layout("IQ2_XS", iq2_xs, 7, _nibbles(66, k), 0.25),
        layout("IQ2_S", iq2_s, 8, _nibbles(74, k), 0.25),
        layout("IQ3_XXS", iq3_xxs, 7, [_field(0, 4, 69, 4 * j, 4)], 0.5),
        layout("IQ3_S", iq3_s, 8, _nibbles(106, j), 2),
    )


def _codebook(name: str) -> FloatArray:
    """``[n_entries, n_weights]`` in steps."""
    packed = getattr(gguf.quants, name)
    packed.init_grid()
    entries: FloatArray = np.ascontiguousarray(packed.grid.reshape(packed.grid_shape), dtype=np.float32)
    return entries

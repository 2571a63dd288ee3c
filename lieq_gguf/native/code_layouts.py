"""Where a block stores the codes of its weights, for the types that round weights one by one to a grid.

A block of such a type has scales, and for every weight a code for one of a few levels: ``base + step · level``. How
scales are stored does not matter here: ``grid`` reads base and step off ggml's decoder.

Source: the block structs of ggml-common.h and the decoders of ggml-quants.c, in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES, QuantType

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Field:
    """Some neighbouring bits of every weight's code.

    Attributes:
        first_bit: Position in the code of the lowest of these bits.
        n_bits: Their number.
        byte: ``[block_size]``, the byte of the block that holds them.
        shift: ``[block_size]``, position in that byte of the lowest of them.
    """

    first_bit: int
    n_bits: int
    byte: IntArray
    shift: IntArray


@dataclass(frozen=True)
class CodeLayout:
    """How a type stores its codes.

    Attributes:
        quant_type: The type.
        fields: The groups of bits that make up a code.
        levels: ``[n_codes]``, ascending: the level of each code, in steps.
        flipped_bits: Bits that are stored inverted, as in two's complement.
    """

    quant_type: QuantType
    fields: tuple[Field, ...]
    levels: FloatArray
    flipped_bits: int = 0

    def nearest(self, values: FloatArray) -> tuple[ByteArray, FloatArray]:
        """Codes of the levels nearest to some values, and these levels; values are in steps."""
        if self._is_even:
            levels = np.clip(np.rint(values), self.levels[0], self.levels[-1])
            return (levels - self.levels[0]).astype(np.uint8), levels
        codes = np.searchsorted(self._midpoints, values)
        return codes.astype(np.uint8), self.levels[codes]

    @cached_property
    def _is_even(self) -> bool:
        """Whether the levels are one apart."""
        return bool((np.diff(self.levels) == 1).all())

    @cached_property
    def _midpoints(self) -> FloatArray:
        """``[n_codes − 1]``, where the nearest level changes."""
        return (self.levels[1:] + self.levels[:-1]) / np.float32(2)

    def grid(self, blocks: ByteArray) -> tuple[FloatArray, FloatArray]:
        """Base and step of every weight ``[n_rows, n_per_row]`` of encoded rows ``[n_rows, row_bytes]``."""
        n_per_row = blocks.shape[1] // self.quant_type.block_bytes * self.quant_type.block_size
        first, last = (
            ggml.dequantize(self.pack(blocks, np.full((len(blocks), n_per_row), code, dtype=np.uint8)), self.quant_type)
            for code in (0, len(self.levels) - 1)
        )
        step = (last - first) / (self.levels[-1] - self.levels[0])
        return first - step * self.levels[0], step

    def pack(self, blocks: ByteArray, codes: ByteArray) -> ByteArray:
        """Encoded rows ``[n_rows, row_bytes]`` with other codes ``[n_rows, n_per_row]`` and the same scales."""
        packed = blocks.reshape(-1, self.quant_type.block_bytes) & self._scale_bits
        codes = codes.reshape(-1, self.quant_type.block_size) ^ np.uint8(self.flipped_bits)
        for field in self.fields:
            bits = (codes >> np.uint8(field.first_bit)) & np.uint8((1 << field.n_bits) - 1)
            for shift in np.unique(field.shift):  # weights of the same shift are in different bytes
                weights = np.flatnonzero(field.shift == shift)
                packed[:, field.byte[weights]] |= bits[:, weights] << np.uint8(shift)
        return packed.reshape(blocks.shape)

    @cached_property
    def _scale_bits(self) -> ByteArray:
        """``[block_bytes]``, mask of the bits that do not belong to codes."""
        result = np.full(self.quant_type.block_bytes, 0xFF, dtype=np.uint8)
        for field in self.fields:
            for byte, shift in zip(field.byte, field.shift, strict=True):
                result[byte] &= 0xFF ^ ((1 << field.n_bits) - 1) << int(shift)
        return result


def code_layout(quant_type: QuantType) -> CodeLayout | None:
    """The layout of a type, or None if its weights are not rounded one by one."""
    return _LAYOUTS.get(quant_type.name)


def _field(first_bit: int, n_bits: int, offset: int, byte: IntArray, shift: IntArray) -> Field:
    return Field(first_bit, n_bits, offset + byte, shift + np.zeros_like(byte))


def _strided(offset: int, n_bits: int, run_length: int, first_bit: int = 0, block_size: int = 256) -> Field:
    """Codes in runs: ``8 / n_bits`` runs share ``run_length`` bytes, each at its own shift; then the next bytes."""
    run, place = np.divmod(np.arange(block_size), run_length)
    n_runs = 8 // n_bits
    return _field(first_bit, n_bits, offset, run // n_runs * run_length + place, run % n_runs * n_bits)


def _layouts() -> dict[str, CodeLayout]:
    def layout(name: str, fields: Sequence[Field], first: int, n_codes: int, flipped_bits: int = 0) -> CodeLayout:
        levels = np.arange(first, first + n_codes, dtype=np.float32)
        return CodeLayout(QUANT_TYPES[name], tuple(fields), levels, flipped_bits)

    small = np.arange(32)
    high_of_5 = [_field(4, 1, offset, small // 8, small % 8) for offset in (2, 4)]
    half, run, place = np.arange(256) // 128, np.arange(256) % 128 // 32, np.arange(256) % 32
    low_of_q6 = _field(0, 4, 0, 64 * half + 32 * (run % 2) + place, 4 * (run // 2))
    iq4_levels = np.array(_IQ4_LEVELS, dtype=np.float32)
    layouts = [
        layout("Q2_K", [_strided(16, 2, 32)], 0, 4),
        layout("Q3_K", [_strided(32, 2, 32), _strided(0, 1, 32, first_bit=2)], -4, 8),
        layout("Q4_K", [_strided(16, 4, 32)], 0, 16),
        layout("Q5_K", [_strided(48, 4, 32), _strided(16, 1, 32, first_bit=4)], 0, 32),
        layout("Q6_K", [low_of_q6, _strided(128, 2, 32, first_bit=4)], -32, 64),
        layout("Q2_0", [_field(0, 2, 2, np.arange(64) // 4, np.arange(64) % 4 * 2)], -1, 4),
        layout("Q4_0", [_strided(2, 4, 16, block_size=32)], -8, 16),
        layout("Q4_1", [_strided(4, 4, 16, block_size=32)], 0, 16),
        layout("Q5_0", [_strided(6, 4, 16, block_size=32), high_of_5[0]], -16, 32),
        layout("Q5_1", [_strided(8, 4, 16, block_size=32), high_of_5[1]], 0, 32),
        layout("Q8_0", [_field(0, 8, 2, small, small * 0)], -128, 256, flipped_bits=0x80),
        CodeLayout(QUANT_TYPES["IQ4_NL"], (_strided(2, 4, 16, block_size=32),), iq4_levels),
        CodeLayout(QUANT_TYPES["IQ4_XS"], (_strided(8, 4, 16),), iq4_levels),
    ]
    return {each.quant_type.name: each for each in layouts}


_LAYOUTS = _layouts()

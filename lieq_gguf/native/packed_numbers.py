"""Unsigned numbers of a few bits, at fixed places in the blocks of a type: codes, scales or minima."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[Any]
"""Unsigned integers."""


@dataclass(frozen=True)
class Field:
    """Some neighbouring bits of every number.

    Attributes:
        first_bit: Position in the number of the lowest of these bits.
        n_bits: How many they are.
        byte: ``[n_numbers]``, the byte of the block that holds them.
        shift: ``[n_numbers]``, position in that byte of the lowest of them.
    """

    first_bit: int
    n_bits: int
    byte: IntArray
    shift: IntArray


@dataclass(frozen=True)
class PackedNumbers:
    """Where the numbers are.

    Attributes:
        block_bytes: Bytes of a block.
        fields: The groups of bits that make up a number.
        flipped_bits: Bits that are stored inverted, as the sign in two's complement.
    """

    block_bytes: int
    fields: tuple[Field, ...]
    flipped_bits: int = 0

    @property
    def n_per_block(self) -> int:
        """Numbers in a block."""
        return len(self.fields[0].byte)

    @property
    def most(self) -> int:
        """The largest number that fits."""
        return (1 << sum(field.n_bits for field in self.fields)) - 1

    def read(self, data: ByteArray) -> npt.NDArray[np.uint32]:
        """Numbers ``[n_rows, n_numbers]`` of encoded rows ``[n_rows, row_bytes]``."""
        blocks = data.reshape(-1, self.block_bytes)
        result = np.zeros((len(blocks), self.n_per_block), dtype=np.uint32)
        for field in self.fields:
            bits = blocks[:, field.byte] >> field.shift.astype(np.uint8) & np.uint8((1 << field.n_bits) - 1)
            result |= bits.astype(np.uint32) << np.uint32(field.first_bit)
        return (result ^ np.uint32(self.flipped_bits)).reshape(len(data), -1)

    def written(self, data: ByteArray, numbers: Numbers) -> ByteArray:
        """Encoded rows ``[n_rows, row_bytes]`` with other numbers ``[n_rows, n_numbers]``."""
        blocks = data.reshape(-1, self.block_bytes) & self._other_bits
        numbers = numbers.reshape(-1, self.n_per_block) ^ numbers.dtype.type(self.flipped_bits)
        for field in self.fields:
            bits = (numbers >> field.first_bit).astype(np.uint8) & np.uint8((1 << field.n_bits) - 1)
            for shift in np.unique(field.shift):  # numbers of the same shift are in different bytes
                some = np.flatnonzero(field.shift == shift)
                blocks[:, field.byte[some]] |= bits[:, some] << np.uint8(shift)
        return blocks.reshape(data.shape)

    def filled(self, data: ByteArray, number: int) -> ByteArray:
        """Encoded rows with the same number everywhere."""
        n_numbers = data.shape[1] // self.block_bytes * self.n_per_block
        return self.written(data, np.full((len(data), n_numbers), number, dtype=np.uint32))

    @cached_property
    def _other_bits(self) -> ByteArray:
        """``[block_bytes]``, mask of the bits that belong to none of the numbers."""
        result = np.full(self.block_bytes, 0xFF, dtype=np.uint8)
        for field in self.fields:
            for byte, shift in zip(field.byte, field.shift, strict=True):
                result[byte] &= 0xFF ^ ((1 << field.n_bits) - 1) << int(shift)
        return result

"""What blocks of scaled codes mean, and which code is nearest.

A block has scales, and codes for one of a few levels: ``base + step · level``. A code stands for one weight, or for
eight, whose levels are entries of a codebook. What scales mean does not matter here: ``grid`` reads base and step off
ggml's decoder. ``type_layouts`` has the layout of every type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lieq_gguf.native import ggml
from lieq_gguf.native.packed_numbers import Numbers, PackedNumbers
from lieq_gguf.quant_types import QuantType

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CodeLayout(ABC):
    """How a type stores its weights.

    Attributes:
        quant_type: The type.
        codes: Where the codes are.
        scales: Where the scales of the parts of a block are, if it has parts.
        minima: Where their minima are, if they have any.
    """

    quant_type: QuantType
    codes: PackedNumbers
    scales: PackedNumbers | None
    minima: PackedNumbers | None

    @property
    @abstractmethod
    def n_together(self) -> int:
        """Number of neighbouring weights that share a code."""

    @property
    @abstractmethod
    def spread(self) -> tuple[int, int]:
        """Two codes whose levels differ for every weight."""

    @abstractmethod
    def levels_of(self, codes: Numbers) -> FloatArray:
        """Levels ``[..., n_codes · n_together]``, in steps, of codes ``[..., n_codes]``."""

    @abstractmethod
    def nearest(self, values: FloatArray, importance: FloatArray) -> tuple[Numbers, FloatArray]:
        """Codes of the levels nearest to some values, and these levels.

        Args:
            values: ``[n_together, n_rows]``, in steps.
            importance: ``[n_together]``, weights of the squared errors.

        Returns:
            Codes ``[n_rows]``, and levels ``[n_together, n_rows]``.
        """

    def grid(self, blocks: ByteArray) -> tuple[FloatArray, FloatArray]:
        """Base and step of every weight ``[n_rows, n_per_row]`` of encoded rows ``[n_rows, row_bytes]``."""
        first, last = (ggml.dequantize(self.codes.filled(blocks, code), self.quant_type) for code in self.spread)
        n_codes = first.shape[1] // self.n_together
        low, high = (self.levels_of(np.full((1, n_codes), code, dtype=np.uint32)) for code in self.spread)
        step: FloatArray = (last - first) / (high - low)
        return first - step * low, step


@dataclass(frozen=True)
class LevelLayout(CodeLayout):
    """A code for every weight.

    Attributes:
        levels: ``[n_codes]``, ascending: the level of each code, in steps.
    """

    levels: FloatArray

    @property
    def n_together(self) -> int:
        """One."""
        return 1

    @property
    def spread(self) -> tuple[int, int]:
        """The lowest and the highest level."""
        return 0, len(self.levels) - 1

    def levels_of(self, codes: Numbers) -> FloatArray:
        """Levels ``[..., n_codes]``."""
        found: FloatArray = self.levels[codes]
        return found

    def nearest(self, values: FloatArray, importance: FloatArray) -> tuple[Numbers, FloatArray]:  # noqa: ARG002
        """The nearest levels, one for every row; with one weight, its importance does not matter."""
        if self._is_even:
            levels = np.clip(np.rint(values), self.levels[0], self.levels[-1])
            return (levels[0] - self.levels[0]).astype(np.uint8), levels
        codes = np.searchsorted(self._midpoints, values)
        return codes[0].astype(np.uint8), self.levels[codes]

    @cached_property
    def _is_even(self) -> bool:
        """Whether the levels are one apart."""
        return bool((np.diff(self.levels) == 1).all())

    @cached_property
    def _midpoints(self) -> FloatArray:
        """``[n_codes − 1]``, where the nearest level changes."""
        return (self.levels[1:] + self.levels[:-1]) / np.float32(2)


@dataclass(frozen=True)
class CodebookLayout(CodeLayout):
    """A code for eight weights: one or two indices into a codebook, the first in the lowest bits, and signs above them.

    Attributes:
        entries: ``[n_entries, 4 or 8]``, in steps; without signs if there are any in the code.
        n_signs: 0, 8, or 7 if the last weight's sign makes the number of negative ones even.
    """

    entries: FloatArray
    n_signs: int

    @property
    def n_together(self) -> int:
        """Eight."""
        return 8

    @property
    def spread(self) -> tuple[int, int]:
        """An entry and its negative, or the entries with the lowest and highest levels."""
        if self.n_signs:
            return 0, ((1 << self.n_signs) - 1) << self._n_index_bits * self._n_indices
        sums = self.entries.sum(axis=1)
        return int(sums.argmin()), int(sums.argmax())

    def levels_of(self, codes: Numbers) -> FloatArray:
        """Levels of eight weights for each code."""
        mask = (1 << self._n_index_bits) - 1
        indices = [codes >> i * self._n_index_bits & mask for i in range(self._n_indices)]
        levels: FloatArray = np.concatenate([self.entries[some] for some in indices], axis=-1)
        if self.n_signs:
            bits = codes >> self._n_indices * self._n_index_bits
            is_negative = bits[..., None] >> np.arange(8, dtype=codes.dtype) & 1 == 1
            if self.n_signs == 7:
                is_negative[..., 7] = is_negative[..., :7].sum(axis=-1) % 2 == 1
            levels = np.where(is_negative, -levels, levels)
        return levels.reshape(*codes.shape[:-1], -1)

    def nearest(self, values: FloatArray, importance: FloatArray) -> tuple[Numbers, FloatArray]:
        """The nearest entries.

        With seven signs, the sign that costs least is turned where the number of negative ones is odd, as ggml does.
        """
        values = np.ascontiguousarray(values.T)
        is_negative = values < 0 if self.n_signs else np.zeros(values.shape, dtype=bool)
        if self.n_signs == 7:
            odd = np.flatnonzero(is_negative.sum(axis=1) % 2)
            cheapest = (importance * values[odd] * values[odd]).argmin(axis=1)
            is_negative[odd, cheapest] ^= True
        sizes = np.ones((len(values), 9), dtype=np.float32)  # the last column is for a term without values
        sizes[:, :8] = np.where(is_negative, -values, values)
        codes = np.zeros(len(values), dtype=np.uint32)
        levels = np.empty_like(values)
        width = self.entries.shape[1]
        for i in range(self._n_indices):
            some = slice(i * width, (i + 1) * width)
            weighted = self.entries * importance[some]
            halves = np.float32(0.5) * (weighted * self.entries).sum(axis=1, keepdims=True)
            # half of −|v − entry|², without the term that all entries share; one product is faster than a difference
            closeness = sizes[:, [*range(i * width, (i + 1) * width), 8]] @ np.hstack([weighted, -halves]).T
            index = closeness.argmax(axis=1)
            codes |= index.astype(np.uint32) << np.uint32(i * self._n_index_bits)
            levels[:, some] = self.entries[index]
        if self.n_signs:
            bits = (is_negative[:, : self.n_signs] << np.arange(self.n_signs, dtype=np.uint32)).sum(axis=1)
            codes |= bits.astype(np.uint32) << np.uint32(self._n_indices * self._n_index_bits)
        return codes, np.ascontiguousarray(np.where(is_negative, -levels, levels).T)

    @property
    def _n_index_bits(self) -> int:
        n_entries: int = self.entries.shape[0]
        return (n_entries - 1).bit_length()

    @property
    def _n_indices(self) -> int:
        width: int = self.entries.shape[1]
        return 8 // width

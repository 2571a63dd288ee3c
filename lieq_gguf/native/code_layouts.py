"""What blocks of scaled codes mean: ``type_layouts`` has the data of every type, ``block_encoder`` computes with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lieq_gguf.native.packed_numbers import PackedNumbers
from lieq_gguf.quant_types import QuantType

FloatArray = npt.NDArray[np.float32]

N_TOGETHER = 8
"""Weights that share a code, if its levels are entries of a codebook."""


@dataclass(frozen=True)
class CodeLayout:
    """How a type stores its weights.

    A code stands for the level of one weight; or for those of eight, which are one or two entries of a codebook, the
    first index in the lowest bits, and signs above them. A weight is ``step · (level + delta) − d_min · minimum``, and
    the step of its part of the block is ``d · unit · (first_scale + scale)``.

    Attributes:
        quant_type: The type.
        codes: Where the codes are.
        entries: ``[n_entries, 1, 4 or 8]``, the level or levels of each code or index; without signs if the code has
            any. Single levels ascend.
        n_signs: Signs in a code: 0, 8, or 7 if the last weight's sign makes the number of negative ones even.
        scales: Where the scales of the parts of a block are; None if the block is one part of scale zero.
        unit: See above.
        first_scale: See above.
        minima: Where the minima of the parts are, if they have any.
        deltas: Where one bit for some neighbouring weights is, set if their delta is ``−delta`` instead of ``delta``.
        delta: See above.
    """

    quant_type: QuantType
    codes: PackedNumbers
    entries: FloatArray
    n_signs: int = 0
    scales: PackedNumbers | None = None
    unit: float = 1.0
    first_scale: float = 1.0
    minima: PackedNumbers | None = None
    deltas: PackedNumbers | None = None
    delta: float = 0.0

    @property
    def n_together(self) -> int:
        """Number of neighbouring weights that share a code."""
        return N_TOGETHER if self.entries.shape[1] > 1 else 1

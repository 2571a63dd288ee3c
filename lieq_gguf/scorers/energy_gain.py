"""LieQ's top-k energy gain: how much more energy training has put into the strongest directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lieq_gguf.records.measurement import LayerMeasurement, Spectrum

TOP_SHARE = 0.05
"""``k`` as a share of the rank."""


def top_energy(spectrum: Spectrum) -> float:
    """Energy in the strongest ``TOP_SHARE`` of the directions, in ``(0, 1]``."""
    return float(spectrum[: math.ceil(TOP_SHARE * len(spectrum))].sum())


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """Mean over the projections of ``top_energy(trained) − top_energy(twin)``.

    Source: LieQ, arXiv 2508.03332v2, top-k energy gain.
    """
    return tuple(
        sum(top_energy(s) - top_energy(m.twin_spectra[role]) for role, s in m.spectra.items()) / len(m.spectra)
        for m in measurements
    )

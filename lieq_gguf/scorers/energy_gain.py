"""LieQ's top-k energy gain: how much energy training has moved into the strongest directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lieq_gguf.records.measurement import LayerMeasurement, Spectrum, mean_gain, measured

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
        mean_gain(measured(m.spectra), measured(m.twin_spectra), measured(m.spectra), _gain) for m in measurements
    )


def _gain(trained: Spectrum, twin: Spectrum) -> float:
    return top_energy(trained) - top_energy(twin)

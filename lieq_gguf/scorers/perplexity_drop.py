"""Perplexity drop: how much leaving a layer out costs. LieQ's first version used this score, the second does not."""

from __future__ import annotations

from collections.abc import Sequence

from lieq_gguf.records.measurement import LayerMeasurement, measured


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """Perplexity without the layer minus perplexity.

    Source: LieQ, arXiv 2508.03332v1.
    """
    return tuple(measured(m.perplexity_drop) for m in measurements)

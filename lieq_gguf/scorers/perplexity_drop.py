"""Perplexity drop: what leaving a layer out costs. LieQ's first version scored with it, the second dropped it."""

from __future__ import annotations

from collections.abc import Sequence

from lieq_gguf.errors import ScoringError
from lieq_gguf.records.measurement import LayerMeasurement


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """Perplexity without the layer minus perplexity.

    Raises:
        ScoringError: if the pass was run without measuring it.

    Source: LieQ, arXiv 2508.03332v1.
    """
    drops = [m.perplexity_drop for m in measurements]
    if any(drop is None for drop in drops):
        raise ScoringError("the perplexity without each layer was not measured; ask for --scorer perplexity-drop")
    return tuple(float(drop) for drop in drops if drop is not None)

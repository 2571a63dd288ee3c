"""Block error: how far a layer's output moves when its matrices are quantised."""

from __future__ import annotations

from collections.abc import Sequence

from lieq_gguf.records.measurement import LayerMeasurement, measured


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """Sum over the layer's matrices of ``mean ‖h' − h‖² / ‖h‖²``, each with only that matrix in the probe type.

    Source: ours; docs/method.md.
    """
    return tuple(sum(measured(m.block_errors).values()) for m in measurements)

"""LIM, layer input modification: a layer that changes its input more matters more."""

from __future__ import annotations

from collections.abc import Sequence

from lieq_gguf.records.measurement import LayerMeasurement, measured


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """``−cos(h_l, h_{l+1})``, mean over tokens, in ``[−1, 1]``.

    Source: Layer-wise quantization, arXiv 2406.17415, equation of LIM.
    """
    return tuple(-measured(m.cosine) for m in measurements)

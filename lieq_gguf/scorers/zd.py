"""ZD, z-score distribution: a layer with fewer weights far above its mean matters more. Needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lieq_gguf.errors import ScoringError
from lieq_gguf.records.measurement import LayerMeasurement

if TYPE_CHECKING:
    import torch


def z_share(matrices: Sequence[torch.Tensor]) -> float:
    """Share of a layer's pooled weights with ``z = (w − mean) / std > 1``, in ``[0, 1]``.

    Two passes over the matrices instead of one pooled copy of the layer.

    Raises:
        ScoringError: if all weights are equal.

    Source: Layer-wise quantization, arXiv 2406.17415, ZD.
    """
    n_weights = sum(w.numel() for w in matrices)
    mean = sum(float(w.double().sum()) for w in matrices) / n_weights
    variance = sum(float(((w.double() - mean) ** 2).sum()) for w in matrices) / n_weights
    if variance <= 0:
        raise ScoringError("all weights of a layer are equal; expected a trained model")
    return sum(int((w > mean + variance**0.5).sum()) for w in matrices) / n_weights


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """``−z_share``: the paper ranks a *smaller* share as more important."""
    return tuple(-m.z_share for m in measurements)

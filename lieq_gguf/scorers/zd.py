"""ZD, z-score distribution: a layer with fewer weights far above its mean matters more. Needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lieq_gguf.records.measurement import LayerMeasurement, measured

if TYPE_CHECKING:
    import torch


def z_share(matrices: Sequence[torch.Tensor]) -> float:
    """Share of a layer's pooled weights with ``z = (w − mean) / std > 1``, in ``[0, 1]``.

    Weights that are all equal have none to lose, so their share is 1, the least important.

    Sums are taken row by row, so that they do not depend on the number of threads.

    Source: Layer-wise quantization, arXiv 2406.17415, ZD.
    """
    import torch  # late, since listing the scorers must not load it

    n_weights = sum(w.numel() for w in matrices)
    mean = sum(float(w.sum(dim=1, dtype=torch.float64).sum()) for w in matrices) / n_weights
    variance = sum(float((w - mean).square_().sum(dim=1).double().sum()) for w in matrices) / n_weights
    if variance <= 0:
        return 1.0
    return sum(int((w > mean + variance**0.5).count_nonzero()) for w in matrices) / n_weights


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """``−z_share``: the paper ranks a *smaller* share as more important."""
    return tuple(-measured(m.z_share) for m in measurements)

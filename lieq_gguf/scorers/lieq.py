"""LieQ's compactness gain: how far training has narrowed a layer's representations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lieq_gguf.records.measurement import LayerMeasurement, Spectrum, mean_gain, measured

_ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v", "attn_qkv")


def compactness(spectrum: Spectrum) -> float:
    """Effective rank of a projected representation.

    The exponential of the entropy of its energy spectrum ``p``: 1 when all tokens lie on one line, the length of the
    spectrum when energy is spread evenly.

    Args:
        spectrum: Normalised energies ``[rank]``, summing to 1.

    Returns:
        ``exp(−Σ p_k ln p_k)``, in ``[1, rank]``.

    Source: LieQ, arXiv 2508.03332v2, representational compactness.
    """
    p = spectrum[spectrum > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def compactness_gain(trained: Spectrum, twin: Spectrum) -> float:
    """``(compactness(twin) − compactness(trained)) / compactness(twin)``, below 1; higher = more concentrated.

    Source: LieQ, arXiv 2508.03332v2.
    """
    untrained = compactness(twin)
    return (untrained - compactness(trained)) / untrained


def score(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """Mean compactness gain over all projections of each layer."""
    return tuple(_mean_gain(m, tuple(measured(m.spectra))) for m in measurements)


def score_qkv(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    """Mean compactness gain over query, key and value alone, the paper's attention projections."""
    return tuple(_mean_gain(m, [r for r in _ATTENTION_INPUTS if r in measured(m.spectra)]) for m in measurements)


def _mean_gain(measurement: LayerMeasurement, roles: Sequence[str]) -> float:
    return mean_gain(measured(measurement.spectra), measured(measurement.twin_spectra), roles, compactness_gain)

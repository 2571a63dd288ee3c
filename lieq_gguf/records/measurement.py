"""``LayerMeasurement``: what a pass over the calibration tokens measures in a layer, for every scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from lieq_gguf.errors import ScoringError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Spectrum: TypeAlias = "npt.NDArray[np.float64]"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class LayerMeasurement:
    """The statistics of one decoder layer; None for a statistic that was not measured.

    Attributes:
        layer: Index of the layer.
        cosine: Mean over tokens of the cosine between the layer's input and output.
        z_share: Share of the layer's pooled weights more than one standard deviation above their mean.
        spectra: Role of a projection (``attn_q``, …) to its normalised energies ``p_k = s_k² / Σ s_j²``, descending.
        twin_spectra: The same of the untrained twin.
        block_errors: Role of a matrix to mean over tokens of ``‖h' − h‖² / ‖h‖²`` of the layer's output, ``h'`` with
            this one matrix quantised with a probe type.
        perplexity_drop: Perplexity without the layer minus perplexity.
    """

    layer: int
    cosine: float | None = None
    z_share: float | None = None
    spectra: Mapping[str, Spectrum] | None = None
    twin_spectra: Mapping[str, Spectrum] | None = None
    block_errors: Mapping[str, float] | None = None
    perplexity_drop: float | None = None

    def has(self, statistics: frozenset[str]) -> bool:
        """Whether all of some statistics, by field name, were measured."""
        return all(getattr(self, name) is not None for name in statistics)


STATISTICS = frozenset(field.name for field in fields(LayerMeasurement)) - {"layer"}
"""Names of all statistics."""

COSTLY_STATISTICS = frozenset({"perplexity_drop"})
"""Statistics measured only for a score that needs them: the model is run once without each layer."""


def measured(statistic: _T | None) -> _T:
    """A statistic that a scorer needs.

    Raises:
        ScoringError: if the pass did not measure it.
    """
    if statistic is None:
        raise ScoringError("the pass did not measure what this score needs; name the score before the pass is run")
    return statistic


def mean_gain(
    spectra: Mapping[str, Spectrum],
    twin_spectra: Mapping[str, Spectrum],
    roles: Iterable[str],
    gain: Callable[[Spectrum, Spectrum], float],
) -> float:
    """Mean of ``gain(trained, twin)`` over the projections that are not all zero; 0 if there is none."""
    gains = [gain(spectra[role], twin_spectra[role]) for role in roles if spectra[role].any()]
    return sum(gains) / len(gains) if gains else 0.0

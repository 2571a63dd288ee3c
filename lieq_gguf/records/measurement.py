"""``LayerMeasurement``: what one pass over the calibration tokens learns of a layer, the input of every scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Spectrum = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerMeasurement:
    """Observations of one decoder layer.

    Attributes:
        layer: Index of the layer.
        cosine: Mean over tokens of the cosine between the layer's input and output; NaN if it was not measured.
        z_share: Share of the layer's pooled weights more than one standard deviation above their mean.
        spectra: Role of a projection (``attn_q``, …) to its normalised energies ``p_k = s_k² / Σ s_j²``, descending.
        twin_spectra: The same of the untrained twin. Both are empty where llama.cpp runs the model.
        block_errors: Role of a matrix to mean over tokens of ``‖h' − h‖² / ‖h‖²`` of the layer's output, ``h'`` with
            this one matrix quantised with a probe type.
        perplexity_drop: Perplexity without the layer minus perplexity; None if it was not measured.
    """

    layer: int
    cosine: float
    z_share: float
    spectra: Mapping[str, Spectrum]
    twin_spectra: Mapping[str, Spectrum]
    block_errors: Mapping[str, float] = field(default_factory=dict)
    perplexity_drop: float | None = None

"""``LayerMeasurement``: what one pass over the calibration tokens learns of a layer, the input of every scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Spectrum = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerMeasurement:
    """Observations of one decoder layer.

    Attributes:
        layer: Index of the layer.
        cosine: Mean over tokens of the cosine between the layer's input and output.
        z_share: Share of the layer's pooled weights more than one standard deviation above their mean.
        spectra: Role of a projection (``attn_q``, …) to its normalised energies ``p_k = s_k² / Σ s_j²``, descending.
        twin_spectra: The same of the untrained twin.
    """

    layer: int
    cosine: float
    z_share: float
    spectra: Mapping[str, Spectrum]
    twin_spectra: Mapping[str, Spectrum]

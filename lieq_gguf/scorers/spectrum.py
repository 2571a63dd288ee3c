"""The energy spectrum of a projection, from which LieQ's scores are computed."""

from __future__ import annotations

import numpy as np
import torch

from lieq_gguf.errors import ScoringError
from lieq_gguf.records.measurement import Spectrum


def energy_spectrum(projection: torch.Tensor) -> Spectrum:
    """Normalised energies of the singular values of a projected representation.

    The eigenvalues of the smaller Gram matrix are the squared singular values. In float64, since squaring halves the
    digits and layers with a massive activation have 99.9 % of the energy in one direction.

    Args:
        projection: ``[n_tokens, n_out]``, any float dtype.

    Returns:
        ``p_k = s_k² / Σ s_j²``, ``[min(n_tokens, n_out)]``, descending; zeros if the projection is all zero, as in a
        layer that does nothing yet.

    Raises:
        ScoringError: if the projection is empty or not finite.

    Source: LieQ, arXiv 2508.03332v2, spectrum of a projection.
    """
    z = projection.to("cpu", torch.float64)  # on the CPU, since not every device supports float64
    if z.ndim != 2 or z.numel() == 0 or not bool(torch.isfinite(z).all()):
        raise ScoringError(f"a projection of shape {tuple(z.shape)} is empty or not finite; expected [n_tokens, n_out]")
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0)
    total = energies.sum()
    return np.asarray((energies / total if total > 0 else energies).numpy(), dtype=np.float64)

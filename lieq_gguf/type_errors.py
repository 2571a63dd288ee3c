"""How much error each type makes in a matrix, estimated on a sample of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf import ggml
from lieq_gguf.quant_types import QuantType

N_SAMPLED_ROWS = 32


def relative_errors(
    weights: torch.Tensor,
    importance: npt.NDArray[np.float32] | None,
    types: Sequence[QuantType],
    n_threads: int = 1,
) -> dict[str, float]:
    """Importance-weighted relative error ``Σ im·(W − Ŵ)² / Σ im·W²`` for each type that fits the rows.

    Args:
        weights: ``[n_out, n_in]``.
        importance: ``[n_in]``, mean squared input of each column, or None to weigh all columns alike; types that
            need importance are then left out as well.
        types: Candidate types; those whose blocks do not fit ``n_in`` are left out of the result.
        n_threads: Types tried at a time.

    Returns:
        Type name to error, 0 = exact, 1 = as bad as all zeros.
    """
    n_out, n_in = weights.shape
    rows = np.linspace(0, n_out - 1, min(N_SAMPLED_ROWS, n_out)).round().astype(int)
    sample = weights[torch.from_numpy(rows).to(weights.device)].float().cpu().numpy()
    column_weights = np.ones(n_in, dtype=np.float32) if importance is None else importance
    energy = float((column_weights * sample.astype(np.float64) ** 2).sum())

    def error(quant_type: QuantType) -> float:
        decoded = ggml.dequantize(ggml.quantize(sample, quant_type, importance), quant_type)
        return (
            float((column_weights * (sample.astype(np.float64) - decoded) ** 2).sum()) / energy if energy > 0 else 0.0
        )

    fitting = [t for t in types if t.fits(n_in) and (importance is not None or not t.needs_imatrix)]
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        return {t.name: e for t, e in zip(fitting, pool.map(error, fitting), strict=True)}

"""Moves weights before they are encoded, so that they make good a share of what quantised layers before them lack.

Source: GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695, for the inputs; the hidden states are our own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.writing.error_feedback import Coupling

FloatArray = npt.NDArray[np.float32]

_SHARE_MADE_GOOD = 0.5  # all of it would fit the calibration text too well
_LARGEST_CHANGE = 0.3  # of the size of a row, so that a file stays the model, and rows of zeros stay zero


def correction(lack: torch.Tensor, coupled: Coupling) -> FloatArray:
    """What an input tells of what it lacks, or of what hidden states lack, as far as it is to be made good.

    Args:
        lack: ``mean(δ xᵀ)`` ``[n, n_in]``, ``δ`` what is lacking of the input ``x``, or of hidden states.
        coupled: The second moments of ``x``.

    Returns:
        ``C`` ``[n, n_in]``: ``C x`` is to be added to the input, or to the hidden states.
    """
    return np.float32(_SHARE_MADE_GOOD) * coupled.divided(lack.numpy())


def moved(weights: FloatArray, lacking: FloatArray, factor: float | None = None) -> FloatArray:
    """Weights ``[n_out, n_in]`` that make good a share of what inputs lack, or of what hidden states lack.

    Args:
        weights: The weights.
        lacking: ``correction`` of the input ``[n_in, n_in]``, or of the hidden states ``[n_out, n_in]``.
        factor: By what the output is multiplied before it is added to the hidden states; None if it is not added.
    """
    change = weights @ lacking if factor is None else lacking / np.float32(factor)
    of_weights, of_change = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (weights, change))
    allowed: FloatArray = np.float32(_LARGEST_CHANGE) * of_weights
    result: FloatArray = weights + change * np.minimum(1, allowed / np.maximum(of_change, np.finfo(np.float32).tiny))
    return result

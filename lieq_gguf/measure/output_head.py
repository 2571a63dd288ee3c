"""What follows the last layer: the final norm, and the output matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

_BATCH_ROWS = 2048  # rows of the output matrix converted to float32 at a time


class OutputHead:
    """Final norm and output matrix. The matrix is not copied but converted some rows at a time."""

    def __init__(
        self,
        norm: nn.Module,
        matrix: torch.Tensor,
        device: torch.device,
        divisor: float = 1.0,
        cap: float | None = None,
    ) -> None:
        """Take ``matrix`` ``[n_vocab, d_model]``; logits are divided by ``divisor``, then ``cap · tanh(logits / cap)``.

        Both as in transformers: Granite divides, Falcon-H1 multiplies, Gemma 2 caps.
        """
        self._norm = norm
        self._matrix = matrix
        self._device = device
        self._divisor = divisor
        self._cap = cap

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Inputs of the output matrix ``[…, d_model]``, on the device, of final states ``[…, state_width]``."""
        states = hidden[..., : self._matrix.shape[1]]  # without what is carried along between layers
        result: torch.Tensor = self._norm(states.to(self._device))
        return result

    @property
    def n_vocab(self) -> int:
        """Rows of the output matrix."""
        return int(self._matrix.shape[0])

    def logits(self, hidden: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of final hidden states ``[…, d_model]``, on the device; ``factors`` ``[d_model]`` go to the norm."""
        normed = self.inputs(hidden)
        if factors is not None:
            normed = normed * factors
        return torch.cat([self._products(normed, rows) for rows in self._row_batches()], dim=-1)

    def divergence(
        self,
        hidden: torch.Tensor,
        other: torch.Tensor | None = None,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> float:
        """Mean over tokens of ``KL(p ‖ q)``, where ``p`` is the next-token distribution of ``hidden``.

        Args:
            hidden: Final hidden states ``[…, d_model]``.
            other: Final hidden states for ``q``; None for the same.
            change: Applied to rows ``[n, d_model]`` of the output matrix for ``q``; None for no change.

        The sums over the vocabulary are updated batch by batch of its rows, so that only one batch of logits is held.
        """
        normed = self.inputs(hidden).flatten(0, -2)
        other_normed = normed if other is None else self.inputs(other).flatten(0, -2)
        top = torch.full((normed.shape[0],), -torch.inf, dtype=torch.float64)
        total, other_total, gap = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for rows in self._row_batches():
            z = self._products(normed, rows).cpu().double()
            other_z = self._products(other_normed, rows if change is None else change(rows)).cpu().double()
            new_top = torch.maximum(top, torch.maximum(z, other_z).amax(dim=-1))
            shrink = (top - new_top).exp()
            p = (z - new_top[:, None]).exp()
            gap = gap * shrink + (p * (z - other_z)).sum(dim=-1)
            total = total * shrink + p.sum(dim=-1)
            other_total = other_total * shrink + (other_z - new_top[:, None]).exp().sum(dim=-1)
            top = new_top
        return max(0.0, float((gap / total - total.log() + other_total.log()).mean()))

    def _products(self, normed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = (normed @ rows.T) / self._divisor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _row_batches(self) -> Iterator[torch.Tensor]:
        for start in range(0, self._matrix.shape[0], _BATCH_ROWS):
            yield self._matrix[start : start + _BATCH_ROWS].to(self._device, torch.float32)

"""How much a layer changes its input, as LIM needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting


class Modification(Observer):
    """Mean over tokens of the cosine between a layer's input and output."""

    gives = frozenset({"cosine"})

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self._cosines: list[float] = []
        self._sum, self._n_tokens = 0.0, 0

    def see_output(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a batch."""
        lengths = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
        cosines = torch.linalg.vecdot(before, after) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        self._sum += float(cosines.sum(dtype=torch.float64))
        self._n_tokens += before.shape[0] * before.shape[1]

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:  # noqa: ARG002
        """Keep the layer's mean."""
        self._cosines.append(self._sum / self._n_tokens)
        self._sum, self._n_tokens = 0.0, 0

    def statistics(self, layer: int) -> Mapping[str, Any]:
        """The layer's cosine."""
        return {"cosine": self._cosines[layer]}

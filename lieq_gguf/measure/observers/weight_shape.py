"""The distribution of a layer's weights, as ZD needs it. Uses no tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.scorers.zd import z_share


class WeightShape(Observer):
    """Share of a layer's pooled weights more than one standard deviation above their mean."""

    gives = frozenset({"z_share"})

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self._z_shares: list[float] = []

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:  # noqa: ARG002
        """Measure the layer's matrices."""
        self._z_shares.append(z_share([layer.weight(module).cpu() for module in layer.tensors]))

    def statistics(self, layer: int) -> Mapping[str, Any]:
        """The layer's share."""
        return {"z_share": self._z_shares[layer]}

"""The distribution of a layer's weights, the quantity of ZD. Looks at no token."""

from __future__ import annotations

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer
from lieq_gguf.scorers.zd import z_share


class WeightShape(Observer):
    """Share of a layer's pooled weights more than a standard deviation above their mean.

    Attributes:
        z_shares: One a layer.
    """

    def __init__(self) -> None:
        self.z_shares: list[float] = []

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:  # noqa: ARG002
        """Measure the layer's matrices."""
        self.z_shares.append(z_share([layer.weight(module).cpu() for module in layer.tensors]))

"""How leaving a layer out changes the perplexity: the score of LieQ's first version, and of papers on pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.measure.output_head import OutputHead


class Removal(Observer):
    """Runs the model without each layer once, along with the pass.

    The variant without layer ``l`` starts as the input of layer ``l`` and then passes the later layers like the others,
    so no layer is loaded twice. Costs ``n_layers² / 2`` layer runs on the sample.
    """

    gives = frozenset({"perplexity_drop"})

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self._perplexity_drops: tuple[float, ...] = ()
        self._sample = setting.damage_sample
        self._targets = torch.from_numpy(setting.tokens.ids)[self._sample][:, 1:]
        self._variants: list[torch.Tensor] = []

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Run all variants through the layer, and start the variant without it."""
        before = hidden[self._sample]
        self._variants = [layer.forward(variant) for variant in self._variants]
        self._variants.append(before)

    def conclude(self, output_head: OutputHead, hidden: torch.Tensor) -> None:
        """Compare the perplexities."""
        intact = self._perplexity(output_head.logits(hidden[self._sample]).cpu())
        self._perplexity_drops = tuple(self._perplexity(output_head.logits(v).cpu()) - intact for v in self._variants)

    def statistics(self, layer: int) -> Mapping[str, Any]:
        """Perplexity without the layer minus perplexity, on the sample."""
        return {"perplexity_drop": self._perplexity_drops[layer]}

    def _perplexity(self, logits: torch.Tensor) -> float:
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        return float(torch.nn.functional.cross_entropy(flat, self._targets.reshape(-1)).exp())

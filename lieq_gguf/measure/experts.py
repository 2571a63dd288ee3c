"""A mixture of experts with a linear module for every matrix of every expert.

transformers stacks the matrices of all experts and multiplies without modules, so there is no place to watch the inputs
of an expert, or to change one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Experts(nn.ModuleList):
    """Feed-forward networks, of which each token uses some; same input and output as transformers' stacked ones."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Send tokens through their experts.

        Args:
            hidden: ``[n_tokens, d_model]``.
            chosen: Index of the experts of each token ``[n_tokens, n_used]``.
            shares: Weight of each expert's output ``[n_tokens, n_used]``.
        """
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, place = torch.where(chosen == index)
            if len(token):
                output = expert(hidden[token]) * shares[token, place, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result


class Expert(nn.Module):
    """One gated feed-forward network."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: nn.Module) -> None:
        """Take ``gate_up`` ``[2 n_ff, d_model]`` and ``down`` ``[d_model, n_ff]``."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[n_tokens, d_model]`` to the same shape."""
        result: torch.Tensor = self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


def separate_experts(model: nn.Module) -> None:
    """Replace stacked experts by experts with their own modules and the same random weights."""
    for name in [name for name, module in model.named_modules() if _is_stacked(module)]:
        stacked: Any = model.get_submodule(name)
        weights = zip(stacked.gate_up_proj.detach(), stacked.down_proj.detach(), strict=True)
        experts = Experts(Expert(gate_up, down, stacked.act_fn) for gate_up, down in weights)
        model.set_submodule(name, experts)


def _linear(weight: torch.Tensor) -> nn.Linear:
    n_out, n_in = weight.shape
    result = nn.Linear(n_in, n_out, bias=False, device="meta")
    result.weight = nn.Parameter(weight.clone())
    return result


def _is_stacked(module: nn.Module) -> bool:
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights)

"""A linear module for every matrix of the file, also where transformers has several in one.

It stacks the matrices of all experts and multiplies without modules, so there is no place to watch the inputs of an
expert, or to change one matrix. Some families have gate and up in one module.
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
    """One feed-forward network, with or without a gate."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, activation: nn.Module, *, has_gate: bool) -> None:
        """Take ``up`` ``[n_ff, d_model]``, below the gate of the same shape if there is one, and ``down``."""
        super().__init__()
        self.has_gate = has_gate
        if has_gate:
            gate, up = up.chunk(2)
            self.gate_proj = _linear(gate)
        self.up_proj, self.down_proj = _linear(up), _linear(down)
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[…, d_model]`` to the same shape."""
        if self.has_gate:
            inner = self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)
        else:
            inner = self.activation(self.up_proj(hidden))
        result: torch.Tensor = self.down_proj(inner)
        return result


def separate_matrices(model: nn.Module) -> None:
    """Replace what holds several matrices in one by modules of their own, with the same random weights."""
    for name, module in list(model.named_modules()):
        given: Any = module
        if _is_stacked(module):
            has_gate = hasattr(module, "gate_up_proj")
            ups = given.gate_up_proj if has_gate else given.up_proj
            weights = zip(ups.detach(), given.down_proj.detach(), strict=True)
            experts = (Expert(up, down, given.act_fn, has_gate=has_gate) for up, down in weights)
            model.set_submodule(name, Experts(experts))
        elif isinstance(getattr(module, "input_linear", None), nn.Linear):  # Granite's
            up, down = given.input_linear.weight.detach(), given.output_linear.weight.detach()
            model.set_submodule(name, Expert(up, down, given.activation, has_gate=True))


def _linear(weight: torch.Tensor) -> nn.Linear:
    n_out, n_in = weight.shape
    result = nn.Linear(n_in, n_out, bias=False, device="meta")
    result.weight = nn.Parameter(weight.clone())
    return result


def _is_stacked(module: nn.Module) -> bool:
    up = getattr(module, "gate_up_proj", None)
    weights = (getattr(module, "up_proj", None) if up is None else up, getattr(module, "down_proj", None))
    return all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights)

"""A linear module for every matrix of the file, also where transformers has several in one.

It stacks the matrices of all experts and multiplies without modules, so there is no place to watch the inputs of an
expert, or to change one matrix. Some families have gate and up in one module, of which a few keep them together in the
file too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_TOGETHER, _DOWN = "gate_up_proj", "down_proj"


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

    def __init__(self, ups: Mapping[str, nn.Linear], down: nn.Linear, activation: nn.Module) -> None:
        """Take ``up_proj`` from ``d_model`` to ``n_ff``, after a ``gate_proj`` of the same shape if there is one.

        Or ``gate_up_proj``, which has the rows of the gate and then those of ``up``. ``down`` leads back, and
        ``activation`` is given the output of ``up``, or those of gate and ``up``.
        """
        super().__init__()
        self.names_of_ups = tuple(ups)
        for name, module in ups.items():
            self.add_module(name, module)
        self.down_proj = down
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[…, d_model]`` to the same shape."""
        inner = [self.get_submodule(name)(hidden) for name in self.names_of_ups]
        if self.names_of_ups == (_TOGETHER,):
            inner = inner[0].chunk(2, dim=-1)
        result: torch.Tensor = self.down_proj(self.activation(*inner))
        return result


class Gated(nn.Module):
    """The up times the activated gate."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Two times ``[…, n_ff]`` to the same shape."""
        result: torch.Tensor = self.activation(gate) * up
        return result


class ClampedSwiglu(nn.Module):
    """gpt-oss's: one more than the up times the gate and its sigmoid, both kept within a limit.

    Source: ``GptOssExperts._apply_gate`` in transformers, which takes both in one tensor.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        """Take the factor in the sigmoid, and the limit that the gate has above and the up on both sides."""
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Two times ``[…, n_ff]`` to the same shape."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def mixture_of(module: str) -> str:
    """Name of the mixture that an expert's module belongs to."""
    return module.rsplit(".", 2)[0]


def takes_own_input(module: str) -> bool:
    """Whether an expert's module takes what only this expert has made, not the input of the whole mixture."""
    return module.endswith(f".{_DOWN}")


def separate_matrices(model: nn.Module, *, leaves_gate_with_up: bool = False) -> None:
    """Replace what holds several matrices in one by modules of their own, with the same random weights.

    Args:
        model: transformers' model.
        leaves_gate_with_up: Whether gate and up of an expert stay one matrix, as in the file.
    """
    for name in [name for name, module in model.named_modules() if _has_several(module)]:
        given: Any = model.get_submodule(name)  # one after the other: both forms of all would take twice the memory
        if _is_stacked(given):
            model.set_submodule(name, Experts(_experts(given, leaves_gate_with_up)))
        else:  # Granite's
            gate, up = given.input_linear.weight.detach().chunk(2)
            down = _linear(given.output_linear.weight.detach())
            ups = {"gate_proj": _linear(gate), "up_proj": _linear(up)}
            model.set_submodule(name, Expert(ups, down, Gated(given.activation)))


def _experts(stacked: Any, leaves_gate_with_up: bool) -> Iterator[Expert]:
    """The experts of a module that has their matrices stacked, and says how as transformers does."""
    downs = _matrices(stacked, "down_proj")
    if not hasattr(stacked, "gate_up_proj"):
        for only, down in zip(_matrices(stacked, "up_proj"), downs, strict=True):
            yield Expert({"up_proj": _linear(*only)}, _linear(*down), stacked.act_fn)
        return
    in_turn = not getattr(stacked, "is_concatenated", True)
    activation = ClampedSwiglu(stacked.alpha, stacked.limit) if hasattr(stacked, "alpha") else Gated(stacked.act_fn)
    for (both, bias), down in zip(_matrices(stacked, "gate_up_proj"), downs, strict=True):
        n_ff = len(both) // 2
        rows = {"gate_proj": slice(0, n_ff), "up_proj": slice(n_ff, None)}
        if in_turn:
            rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        elif leaves_gate_with_up:
            rows = {_TOGETHER: slice(None)}
        ups = {part: _linear(both[some], None if bias is None else bias[some]) for part, some in rows.items()}
        yield Expert(ups, _linear(*down), activation)


def _matrices(stacked: Any, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights ``[n_out, n_in]`` and biases ``[n_out]`` of the experts."""
    weights = getattr(stacked, name).detach()
    biases = getattr(stacked, f"{name}_bias", None)
    for index, weight in enumerate(weights):
        is_transposed = getattr(stacked, "is_transposed", False)
        yield weight.T if is_transposed else weight, None if biases is None else biases.detach()[index]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    n_out, n_in = weight.shape
    result = nn.Linear(n_in, n_out, bias=bias is not None, device="meta")
    result.weight = nn.Parameter(weight.contiguous())  # a part of the stacked tensor, where its rows are neighbours
    if bias is not None:
        result.bias = nn.Parameter(bias.contiguous())
    return result


def _has_several(module: nn.Module) -> bool:
    return _is_stacked(module) or isinstance(getattr(module, "input_linear", None), nn.Linear)


def _is_stacked(module: nn.Module) -> bool:
    up = getattr(module, "gate_up_proj", None)
    weights = (getattr(module, "up_proj", None) if up is None else up, getattr(module, "down_proj", None))
    return all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights)

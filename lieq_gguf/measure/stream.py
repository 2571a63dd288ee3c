"""Which modules of a layer add their output to the hidden states, and the hidden states behind each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import nn

from lieq_gguf.measure.layer_model import LayerModel

_N_TOKENS = 16  # enough to see that outputs are added
_TOLERANCE = 1e-3

Additions: TypeAlias = Mapping[str, float]
"""Linear modules and mixtures whose output is added, in the order in which they run, and what it is multiplied by."""


def additions(layer: LayerModel, states: torch.Tensor) -> Additions:
    """Find the modules by what happens when their outputs change.

    A module behind which a norm or another matrix follows does not count.

    Args:
        layer: The layer, with weights.
        states: Some input ``[n_chunks, chunk_size, state_width]``.
    """
    some, width = states[:1, :_N_TOKENS], layer.hidden_part(states).shape[-1]
    candidates: list[str] = []
    with layer.watching_inputs(lambda module, _x: candidates.append(module), with_mixtures=True):
        layer.forward(some, exact=True)
    found: dict[str, float] = {}
    for module in reversed(candidates):
        if not _could_be_added(layer, module, width):
            continue
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(1, some.shape[1], width, generator=generator) * layer.hidden_part(some).std()
        change = change.to(layer.device)
        with _added(dict.fromkeys(found), layer):
            before = layer.hidden_part(layer.forward(some, exact=True))
            with _added({module: change}, layer):
                moved = layer.hidden_part(layer.forward(some, exact=True)) - before
        change = change.cpu()
        factor = float((moved * change).sum() / change.square().sum())
        if factor and float((moved - factor * change).norm()) <= _TOLERANCE * float(moved.norm()):
            found[module] = factor
    return dict(reversed(list(found.items())))


def _could_be_added(layer: LayerModel, module: str, width: int) -> bool:
    candidate = layer.layer.get_submodule(module)
    if not isinstance(candidate, nn.Linear):  # a mixture
        return True
    return candidate.out_features == width and not (module in layer.tensors and layer.tensors[module].of_experts)


@contextmanager
def states_behind(added: Additions, layer: LayerModel) -> Iterator[Callable[[torch.Tensor], dict[str, torch.Tensor]]]:
    """For the length of a ``with``, remember what modules add; the layer must run once.

    Yields a function from the layer's output to the hidden states behind each module, ``[n_chunks, chunk_size,
    d_model]``, from the last to the first.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(module: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        return lambda _m, _x, output: outputs.__setitem__(module, output)

    def behind(states: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, result = layer.hidden_part(states), {}
        for module, factor in reversed(list(added.items())):
            result[module] = hidden
            hidden = hidden - factor * outputs[module].float().cpu().view_as(hidden)
        return result

    with ExitStack() as hooks:
        for module in added:
            hooks.enter_context(layer.layer.get_submodule(module).register_forward_hook(keep(module)))
        yield behind


@contextmanager
def _added(changes: Mapping[str, torch.Tensor | None], layer: LayerModel) -> Iterator[None]:
    """For the length of a ``with``, add to the outputs of modules, or let them be zero."""

    def hook_of(change: torch.Tensor | None) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            if change is None:
                return torch.zeros_like(output)
            fits = output.numel() == change.numel()  # some mixtures have a width of their own
            return output + change.view_as(output) if fits else output

        return hook

    with ExitStack() as hooks:
        for module, change in changes.items():
            hooks.enter_context(layer.layer.get_submodule(module).register_forward_hook(hook_of(change)))
        yield

"""transformers' own model without its weights: one layer of each kind, and what the model gives to its layers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from lieq_gguf.architectures import FAMILIES
from lieq_gguf.measure.experts import separate_matrices

_ROTATED = ("no_rope_layers", "layer_rope_theta")  # 0 for a layer without rotation
_LAYER_LISTS = ("layer_types", *_ROTATED)  # in transformers' configurations, one entry per layer
_SHARING = "kv_sharing_modes"
_REUSE = "reuse"

_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
)  # fmt: skip
_LITTLE = 32  # neurons of a feed-forward network
_N_DENSE = "num_dense_layers"  # how many layers have no experts, the first ones

LayerKind: TypeAlias = tuple[str, ...]
"""What mixes the tokens in a layer, whether it is rotated, whether it uses the keys and values of an earlier one, and
whether it has experts where not all have; layers of the same kind differ only in their weights."""


def layer_kinds(config: PretrainedConfig) -> list[LayerKind]:
    """The kind of every layer: attention over all tokens or a window, another mixer, with or without rotation."""
    n_layers: int = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [""] * n_layers
    lists = [values for key in _ROTATED if (values := getattr(config, key, None))]
    rotated = ["rotated" if all(values[i] for values in lists) else "" for i in range(n_layers)]
    sharing = [_REUSE if mode == _REUSE else "" for mode in sharing_modes(config)]
    dense = ["dense" if i < getattr(config, _N_DENSE, 0) else "" for i in range(n_layers)]
    return [(str(types[i]), rotated[i], sharing[i], dense[i]) for i in range(n_layers)]


def sharing_modes(config: PretrainedConfig) -> list[str | None]:
    """Whether a layer stores its keys and values for later ones, or reuses those of an earlier layer."""
    modes: list[str | None] = getattr(config, _SHARING, None) or [None] * config.num_hidden_layers
    return modes


def examples_of_kinds(config: PretrainedConfig) -> list[int]:
    """The first layer of each kind, in the model's order."""
    kinds = layer_kinds(config)
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def initialised(config: PretrainedConfig, n_vocab: int, seed: int, *, narrow: bool = False) -> nn.Module:
    """A base model with one layer of each kind and a small vocabulary, filled by the model's own initialiser.

    If ``narrow``, the layers have little feed-forward networks, for what needs the rest: of a mixture they take most of
    the memory.
    """
    examples = examples_of_kinds(config)
    values = config.to_dict()
    stored = (*_LAYER_LISTS, "layers_block_type")  # the older name of the first; some families compute it
    changes: dict[str, Any] = {key: [values[key][i] for i in examples] for key in stored if values.get(key)}
    if hasattr(config, _SHARING):
        modes = sharing_modes(config)
        changes["num_kv_shared_layers"] = sum(modes[i] == _REUSE for i in examples)
    by_layer = {int(layer): settings for layer, settings in (values.get("per_layer_config") or {}).items()}
    if by_layer:
        changes["per_layer_config"] = {new: by_layer[old] for new, old in enumerate(examples) if old in by_layer}
    if hasattr(config, _N_DENSE):
        changes[_N_DENSE] = sum(i < getattr(config, _N_DENSE) for i in examples)
    sizes = {"num_hidden_layers": len(examples), "vocab_size": n_vocab}
    if narrow:
        sizes |= {key: _LITTLE for key in _WIDTHS if hasattr(config, key)}
    if hasattr(config, "vocab_size_per_layer_input"):
        sizes["vocab_size_per_layer_input"] = n_vocab
    # the ids of special tokens lie outside the small vocabulary
    special_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if hasattr(config, "scale_depth"):  # divided by the root of the number of layers
        changes["scale_depth"] = config.scale_depth * (len(examples) / config.num_hidden_layers) ** 0.5
    small = type(config).from_dict(values | sizes | changes | special_ids)
    with_rounded_yarn(small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # a text part that is no model of its own has no class with a head
        auto = AutoModelForCausalLM if type(small) in AutoModelForCausalLM._model_mapping else AutoModel
        model = auto.from_config(small, dtype=torch.float32)  # type: ignore[no-untyped-call]
    base: nn.Module = model.eval().base_model
    separate_matrices(base, leaves_gate_with_up=_has_gate_with_up(config))
    without_time_limits(base)
    return base


def _has_gate_with_up(config: PretrainedConfig) -> bool:
    """Whether a file of such a model has gate and up of an expert in one matrix."""
    return any(f.gates_and_ups == "together" for f in FAMILIES if f.model_type == config.model_type)


def with_rounded_yarn(config: PretrainedConfig) -> PretrainedConfig:
    """Let yarn begin and end at whole dimensions, as llama.cpp always does, also where ``truncate`` is off.

    Families that may have it off warn of it.
    """
    rope = getattr(config, "rope_parameters", None)
    if rope and not rope.get("truncate", True):
        config.rope_parameters = {**rope, "truncate": True}
    return config


def without_time_limits(model: nn.Module) -> None:
    """Let Mamba-2 layers keep every time step, as llama.cpp does and the code that Nemotron-H was published with.

    transformers has those of Nemotron-H at 0.001 or more, which changes the published models (a divergence of 0.03 is
    reported in huggingface/transformers, pull request 48989). Other limits are refused before.
    """
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)  # type: ignore[assignment]


def given_to_layers(model: nn.Module, **inputs: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Run a model without its layers, and catch the hidden states and arguments that each layer would get.

    What depends on tokens or on other layers is not among the arguments: ``CarriedAlong`` has it.
    """
    caught: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(hidden: torch.Tensor, *_token_inputs: Any, **around: Any) -> torch.Tensor:
        caught.append((hidden, around))
        return hidden

    layers = list(model.get_submodule("layers").children())
    n_token_inputs = getattr(model, "hidden_size_per_layer_input", None)
    if n_token_inputs and "inputs_embeds" in inputs:  # without them, the model would look for the tokens' ids
        shape = (*inputs["inputs_embeds"].shape[:-1], len(layers), n_token_inputs)
        inputs["per_layer_inputs"] = inputs["inputs_embeds"].new_zeros(shape)
    with ExitStack() as stack:
        for module in layers:
            module.forward = catch  # shadows the class's method
            stack.callback(delattr, module, "forward")
        model(use_cache=False, **inputs)
    return caught

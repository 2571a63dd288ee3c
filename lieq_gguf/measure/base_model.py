"""transformers' own model without its weights: one layer of each kind, and what the model gives to its layers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lieq_gguf.measure.experts import separate_matrices

_LAYER_LISTS = ("layer_types", "no_rope_layers")  # in transformers' configurations, one entry per layer

_N_DENSE = "num_dense_layers"  # how many layers have no experts, the first ones

LayerKind: TypeAlias = tuple[str, ...]
"""Whether a layer has experts, if not all have, and its entries of ``_LAYER_LISTS``. Layers of a kind differ only in
their weights."""


def layer_kinds(config: PretrainedConfig) -> list[LayerKind]:
    """The kind of every layer: without experts first, attention over all tokens or a window, with rotation or not."""
    n_layers: int = config.num_hidden_layers
    n_dense = getattr(config, _N_DENSE, 0)
    lists = [getattr(config, key, None) or [""] * n_layers for key in _LAYER_LISTS]
    if n_dense:
        lists.insert(0, ["dense" if i < n_dense else "experts" for i in range(n_layers)])
    return [tuple(str(values[i]) for values in lists) for i in range(n_layers)]


def initialised(config: PretrainedConfig, n_vocab: int, seed: int) -> nn.Module:
    """A base model with one layer of each kind and a small vocabulary, filled by the model's own initialiser."""
    kinds = layer_kinds(config)
    examples = [kinds.index(kind) for kind in sorted(set(kinds))]
    settings = config.to_dict()
    stored = (*_LAYER_LISTS, "layers_block_type")  # the older name of the first; some families compute it
    lists = {key: [values[i] for i in examples] for key in stored if (values := settings.get(key))}
    # the ids of special tokens lie outside the small vocabulary
    special_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"num_hidden_layers": len(examples), "vocab_size": n_vocab}
    if hasattr(config, _N_DENSE):
        sizes[_N_DENSE] = sum(i < getattr(config, _N_DENSE) for i in examples)
    small = type(config).from_dict(settings | sizes | lists | special_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)  # type: ignore[no-untyped-call]
    base: nn.Module = model.eval().base_model
    separate_matrices(base)
    without_time_limits(base)
    return base


def without_time_limits(model: nn.Module) -> None:
    """Let Mamba-2 layers keep every time step, as llama.cpp does and the code that Nemotron-H was published with.

    transformers has those of Nemotron-H at 0.001 or more, which changes the published models (a divergence of 0.03 is
    reported in huggingface/transformers, pull request 48989). Other limits are refused before.
    """
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)  # type: ignore[assignment]


def given_to_layers(model: nn.Module, **inputs: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Run a model without its layers, and catch the hidden states and arguments that each layer would get."""
    caught: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(hidden: torch.Tensor, **around: Any) -> torch.Tensor:
        caught.append((hidden, around))
        return hidden

    with ExitStack() as stack:
        for module in model.get_submodule("layers").children():
            module.forward = catch  # shadows the class's method
            stack.callback(delattr, module, "forward")
        model(use_cache=False, **inputs)
    return caught


def twin_embedding(config: PretrainedConfig, ids: npt.NDArray[np.int64], seed: int) -> torch.Tensor:
    """Rows of a fresh embedding for the tokens that occur; other rows would only take memory."""
    used, positions = np.unique(ids, return_inverse=True)
    embedding = initialised(config, n_vocab=len(used), seed=seed).get_input_embeddings()  # type: ignore[operator]
    rows: torch.Tensor = embedding.weight.detach()[torch.from_numpy(positions.reshape(ids.shape))]
    return rows

"""EXAONE 4: norms after attention and feed-forward network; of 64 layers, only those with a window are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import (
    Config,
    require_count,
    require_kinds,
    require_layer_types,
    require_usual_heads,
    windowed_layers,
)
from lieq_gguf.architectures.llama3_rope import Llama3Rope
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, HEAD_NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_N_LAYERS_OF_32B = 64


class Exaone4(Llama3Rope):
    """llama.cpp has windows at 64 layers and at no other number, whatever the file says."""

    gguf_name = "exaone4"
    has_windows = True
    model_type = "exaone4"
    source_classes = ("Exaone4ForCausalLM",)
    modules = (
        *(replace(module, bias="") for module in ATTENTION),
        *HEAD_NORMS,
        LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
        *(replace(module, bias="") for module in FEED_FORWARD),
        LayerModule("post_ffw_norm", "post_feedforward_layernorm", ("width",)),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"sliding_window": 4096, "sliding_window_pattern": 4}

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the attention type of every layer."""
        result = super().completed(config)
        if result["sliding_window"] is None or result.get("layer_types") is not None:
            return result
        period = result["sliding_window_pattern"]
        require_count("sliding_window_pattern", period)
        return {**result, "layer_types": list(windowed_layers(result["num_hidden_layers"], period))}

    def check(self, config: Config) -> None:
        """Refuse also windows where the graph has none, and layers without windows where it has some."""
        super().check(config)
        require_usual_heads(config, self.head_dim(config), self.gguf_name)
        n_layers, window = config["num_hidden_layers"], config["sliding_window"]
        if (window is not None) != (n_layers == _N_LAYERS_OF_32B):
            raise ArchitectureError(
                f"sliding_window is {window or 'null'} at {n_layers} layers, but llama.cpp runs exaone4 with windows, "
                f"and without rotation in the other layers, at {_N_LAYERS_OF_32B} layers and at no other number"
            )
        if window is None:
            require_layer_types(config, ("full_attention",) * n_layers, tuple(config.get("layer_types") or ()))
        else:
            require_kinds(config, ("full_attention", "sliding_attention"))

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and which layers have a window."""
        super().add_hyper_parameters(config, writer)
        writer.add_vocab_size(config["vocab_size"])
        if config["sliding_window"] is not None:
            writer.add_sliding_window(config["sliding_window"])
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and the windows where the graph has them; elsewhere nobody reads their keys."""
        config = super().source_config(stored)
        n_layers = config["num_hidden_layers"]
        if n_layers != _N_LAYERS_OF_32B:
            return config | {"sliding_window": None, "layer_types": ["full_attention"] * n_layers}
        return config | {
            "sliding_window": stored.count("attention.sliding_window", self.defaults["sliding_window"]),
            "layer_types": stored.layer_types(n_layers),
        }

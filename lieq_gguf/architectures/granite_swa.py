"""Granite SWA: a Granite with windows, layers without rotation, and a sink that takes attention in every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_kinds
from lieq_gguf.architectures.granite import Granite
from lieq_gguf.architectures.modules import FEED_FORWARD, INTERLEAVED_ATTENTION, NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_PERIOD = 4


class GraniteSwa(Granite):
    """The dense models."""

    gguf_name = "granite_swa"
    has_windows = True
    model_type = "granite_swa"
    source_classes = ("GraniteSWAForCausalLM",)
    modules = (
        NORMS[0],
        *INTERLEAVED_ATTENTION,
        LayerModule("attn_sinks", "self_attn.sinks", ("n_heads",), suffixes=(".weight", "")),
        NORMS[1],
        *FEED_FORWARD,
    )
    tied_by_default = True
    defaults: ClassVar[Mapping[str, Any]] = {"sliding_window": 128}

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the attention type of every layer."""
        if config.get("layer_types") is not None:
            return super().completed(config)
        types = ["sliding_attention" if i % _PERIOD else "full_attention" for i in range(config["num_hidden_layers"])]
        return {**super().completed(config), "layer_types": types}

    def check(self, config: Config) -> None:
        """Refuse also rotations that differ from layer to layer, and layers that nobody knows to be without one."""
        super().check(config)
        require_kinds(config, ("full_attention", "sliding_attention"))
        if config["sliding_window"] is None:
            raise ArchitectureError("sliding_window in config.json is null; expected a number of tokens")
        bases, n_layers = config.get("layer_rope_theta"), config["num_hidden_layers"]
        if bases is not None and len(bases) != n_layers:
            raise ArchitectureError(
                f"layer_rope_theta in config.json has {len(bases)} layers, num_hidden_layers is {n_layers}"
            )
        used = sorted({base for base in bases or () if base})
        if len(used) > 1:
            raise ArchitectureError(
                f"layer_rope_theta in config.json has the bases {used}, but llama.cpp has one for all layers that "
                "are rotated"
            )
        pattern = config.get("no_rope_layers")
        if pattern is not None and [bool(is_rotated) for is_rotated in pattern] != _is_rotated(config):
            raise ArchitectureError(
                f"no_rope_layers in config.json is {pattern}, which transformers does not read; expected "
                "layer_rope_theta with a base of 0 for these layers"
            )

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters; a base for every layer overrules the one for all."""
        base = max(config.get("layer_rope_theta") or (0,))
        return super().rope(config, layer_type) | ({"rope_theta": base} if base else {})

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and which layers have a window and a rotation."""
        super().add_hyper_parameters(config, writer)
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        if config.get("layer_rope_theta"):
            writer.add_array(f"{self.gguf_name}.attention.rope_pattern", _is_rotated(config))

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and which layers have a window and a rotation."""
        config = super().source_config(stored)
        n_layers = config["num_hidden_layers"]
        base = config["rope_parameters"]["rope_theta"]
        pattern = stored.per_layer("attention.rope_pattern", [True] * n_layers)
        return config | {
            "sliding_window": stored.count("attention.sliding_window"),
            "layer_types": stored.layer_types(n_layers),
            "layer_rope_theta": [base if is_rotated else 0 for is_rotated in pattern],
        }


def _is_rotated(config: Config) -> list[bool]:
    bases = config.get("layer_rope_theta")
    return [True] * config["num_hidden_layers"] if bases is None else [bool(base) for base in bases]

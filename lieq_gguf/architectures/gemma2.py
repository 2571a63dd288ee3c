"""Gemma 2: norms before and after each half of a layer, capped logits, every second layer with a sliding window."""

from __future__ import annotations

from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config, require_layer_types, require_number, windowed_layers
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, SANDWICH_NORMS
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_N_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


class Gemma2(Decoder):
    """Norms multiply by one plus their weight."""

    gguf_name = "gemma2"
    has_windows = True
    model_type = "gemma2"
    source_classes = ("Gemma2ForCausalLM",)
    modules = (SANDWICH_NORMS[0], *ATTENTION, *SANDWICH_NORMS[1:3], *FEED_FORWARD, SANDWICH_NORMS[3])
    activation = "gelu_pytorch_tanh"
    rope_types = ("default",)
    default_head_dim = 256
    tied_by_default = True
    norm_offset = 1.0
    output_matrix = "embedding"

    def check(self, config: Config) -> None:
        """Refuse also values other than those built into the graph: rotary base, order of windows, attention scale."""
        super().check(config)
        theta = self.rope(config)["rope_theta"]
        if theta != self.default_theta:
            raise ArchitectureError(f"rope_theta is {theta}, but llama.cpp runs Gemma 2 only with {self.default_theta}")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            require_number(key, config.get(key, 1.0) or 0)
            if not config.get(key, 1.0):
                raise ArchitectureError(f"{key} is {config[key]!r}, but llama.cpp always caps Gemma 2's logits")
        n_layers = config["num_hidden_layers"]
        alternating = windowed_layers(n_layers, 2)
        require_layer_types(config, alternating, tuple(config.get("layer_types") or alternating))
        check_attention_scale(self, config)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, caps and the window."""
        super().add_hyper_parameters(config, writer)
        writer.add_attn_logit_softcapping(config.get("attn_logit_softcapping", 50.0))
        writer.add_final_logit_softcapping(config.get("final_logit_softcapping", 30.0))
        writer.add_sliding_window(config.get("sliding_window") or 4096)

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, the caps, the window and the attention scale built into the graph."""
        config = super().source_config(stored)
        return config | {
            "attn_logit_softcapping": stored.value("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": stored.value("final_logit_softcapping", 30.0),
            "sliding_window": stored.value("attention.sliding_window", 4096),
            "query_pre_attn_scalar": built_in_attention_scale(self, config),
        }

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write nothing: the rotary base is built into the graph."""


def check_attention_scale(family: Decoder, config: Config) -> None:
    """Refuse an attention scale other than llama.cpp's, which depends on the number of layers."""
    given, built_in = config.get("query_pre_attn_scalar", 256), built_in_attention_scale(family, config)
    if given != built_in:
        raise ArchitectureError(
            f"query_pre_attn_scalar is {given}, but llama.cpp runs {family.gguf_name} of "
            f"{config['num_hidden_layers']} layers only with {built_in}"
        )


def built_in_attention_scale(family: Decoder, config: Config) -> int:
    """The value of ``query_pre_attn_scalar`` built into llama.cpp's graph."""
    if config["num_hidden_layers"] == _N_LAYERS_OF_27B[family.gguf_name]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return family.head_dim(config)

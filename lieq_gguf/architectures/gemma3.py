"""Gemma 3, text only: five of six layers have a sliding window and their own rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_layer_types, require_number, windowed_layers
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.gemma2 import built_in_attention_scale, check_attention_scale
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, HEAD_NORMS, SANDWICH_NORMS
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_PERIOD = 6
_LOCAL_THETA = 10000.0


class Gemma3(Decoder):
    """Norms multiply by one plus their weight."""

    gguf_name = "gemma3"
    has_windows = True
    model_type = "gemma3_text"
    source_classes = ("Gemma3ForCausalLM",)
    modules = (SANDWICH_NORMS[0], *ATTENTION, *HEAD_NORMS, *SANDWICH_NORMS[1:3], *FEED_FORWARD, SANDWICH_NORMS[3])
    activation = "gelu_pytorch_tanh"
    rope_types = ("default", "linear")
    default_theta = 1_000_000.0
    default_head_dim = 256
    tied_by_default = True
    norm_offset = 1.0
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256, "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 131072,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "sliding_window": 4096, "vocab_size": 262208,
    }  # fmt: skip

    def check(self, config: Config) -> None:
        """Refuse also values other than those built into the graph: order of windows, attention scale."""
        super().check(config)
        if config.get("attn_logit_softcapping") is not None:
            raise ArchitectureError("attn_logit_softcapping is set, which llama.cpp does not compute for Gemma 3")
        if config.get("final_logit_softcapping") is not None:
            require_number("final_logit_softcapping", config["final_logit_softcapping"])
        if config.get("use_bidirectional_attention"):
            raise ArchitectureError("use_bidirectional_attention is set; expected a model that generates text")
        local = self.rope(config, "sliding_attention")
        if local["rope_type"] != "default":
            raise ArchitectureError(
                f"layers with a sliding window have rope type '{local['rope_type']}', but llama.cpp runs them "
                "only with 'default'"
            )
        n_layers = config["num_hidden_layers"]
        expected = windowed_layers(n_layers, _PERIOD)
        found = config.get("layer_types") or windowed_layers(n_layers, config.get("sliding_window_pattern") or _PERIOD)
        require_layer_types(config, expected, tuple(found))
        check_attention_scale(self, config)

    def has_rotation_by_kind(self, config: Config) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def local_theta(self, config: Config) -> float:
        """Files of version 4 of transformers have a key for it."""
        theta: float = config.get("rope_local_base_freq") or _LOCAL_THETA
        return theta

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, the cap if there is one, and the window."""
        super().add_hyper_parameters(config, writer)
        if config.get("final_logit_softcapping") is not None:
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config.get("sliding_window") or 4096)

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, the cap, the window, both rotations and the attention scale built into the graph."""
        config = super().source_config(stored)
        local = {"rope_type": "default", "rope_theta": stored.number("rope.freq_base_swa", _LOCAL_THETA)}
        return config | {
            "final_logit_softcapping": stored.value("final_logit_softcapping", None),
            "sliding_window": stored.value("attention.sliding_window"),
            "query_pre_attn_scalar": built_in_attention_scale(self, config),
            "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        }

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write both rotations."""
        super().add_rope(config, writer)
        writer.add_float32("gemma3.rope.freq_base_swa", self.rope(config, "sliding_attention")["rope_theta"])

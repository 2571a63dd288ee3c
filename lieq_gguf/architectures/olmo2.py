"""OLMo 2 and 3: norms after attention and feed-forward network, and over all heads of queries and keys together."""

from __future__ import annotations

from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config, require_kinds, windowed_layers
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_PERIOD = 4
_OLMO_3_THETA = 500_000.0


class Olmo2(Decoder):
    """OLMo 3 is the same with a sliding window in three of four layers."""

    gguf_name = "olmo2"
    has_windows = True
    model_type = "olmo2"
    source_classes = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
    modules = (
        *ATTENTION,
        LayerModule("attn_q_norm", "self_attn.q_norm", ("q_width",)),
        LayerModule("attn_k_norm", "self_attn.k_norm", ("kv_width",)),
        LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
        *FEED_FORWARD,
        LayerModule("post_ffw_norm", "post_feedforward_layernorm", ("width",)),
    )
    output_matrix = "own"

    def has_rotation_by_kind(self, config: Config) -> bool:
        """In OLMo 3."""
        return _has_windows(config)

    def usual_theta(self, config: Config) -> float:
        """OLMo 3 has another."""
        return _OLMO_3_THETA if _has_windows(config) else self.default_theta

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the attention type of every layer of OLMo 3."""
        if not _has_windows(config) or config.get("layer_types") is not None:
            return super().completed(config)
        types = list(windowed_layers(config["num_hidden_layers"], _PERIOD))
        return {**super().completed(config), "layer_types": types}

    def check(self, config: Config) -> None:
        """Refuse also layers with different rotations."""
        super().check(config)
        if _has_windows(config):
            require_kinds(config, ("full_attention", "sliding_attention"))
            local = self.rope(config, "sliding_attention")
            theta = self.rope(config)["rope_theta"]
            if local["rope_theta"] != theta:
                raise ArchitectureError(
                    f"layers with a sliding window have rope_theta {local['rope_theta']} and the others {theta}; "
                    "expected the same value"
                )

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and for OLMo 3 which layers have a window."""
        super().add_hyper_parameters(config, writer)
        if _has_windows(config):
            writer.add_sliding_window(config["sliding_window"])
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys. A file with a window is OLMo 3, whose layers with a window have no rotary scaling."""
        config = super().source_config(stored)
        window = stored.value("attention.sliding_window", None)
        if window is None:
            return config
        rope = config["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": stored.number("rope.freq_base_swa", rope["rope_theta"])}
        return config | {
            "architectures": ["Olmo3ForCausalLM"],
            "model_type": "olmo3",
            "sliding_window": window,
            "layer_types": stored.layer_types(config["num_hidden_layers"]),
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        }

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the rotation that all layers share; OLMo 3's files have it twice."""
        super().add_rope(config, writer)
        if _has_windows(config):
            writer.add_float32("olmo2.rope.freq_base_swa", self.rope(config, "sliding_attention")["rope_theta"])


def _has_windows(config: Config) -> bool:
    return config.get("sliding_window") is not None

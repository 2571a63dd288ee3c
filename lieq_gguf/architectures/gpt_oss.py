"""gpt-oss: a mixture of experts with biases everywhere, sinks in every head and windows in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import (
    Config,
    require_count,
    require_experts,
    require_layer_types,
    windowed_layers,
    yarn_range,
)
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.experts import add_expert_counts, expert_sizes, source_expert_counts
from lieq_gguf.architectures.modules import ATTENTION, NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_PERIOD = 2
_BUILT_IN = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
# what transformers' configuration has if config.json has no rotary parameters
_USUAL_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


class GptOss(Decoder):
    """The shares of the chosen experts are a softmax over these alone; their gates and ups are clamped."""

    gguf_name = "gpt-oss"
    has_windows = True
    model_type = "gpt_oss"
    source_classes = ("GptOssForCausalLM",)
    modules = (
        NORMS[0],
        *(replace(module, bias="always") for module in ATTENTION),
        LayerModule("attn_sinks", "self_attn.sinks", ("n_heads",), suffixes=(".weight", "")),
        LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
        LayerModule("ffn_gate_inp", "mlp.router", ("n_experts", "width"), bias="always", is_fixed=True),
        LayerModule("ffn_gate_exps", "mlp.experts.{}.gate_proj", ("n_experts", "n_ff", "width"), bias="always"),
        LayerModule("ffn_up_exps", "mlp.experts.{}.up_proj", ("n_experts", "n_ff", "width"), bias="always"),
        LayerModule("ffn_down_exps", "mlp.experts.{}.down_proj", ("n_experts", "width", "n_ff"), bias="always"),
    )
    default_theta = 150000.0
    default_head_dim = 64
    output_matrix = "own"
    gates_and_ups = "in turn"
    defaults: ClassVar[Mapping[str, Any]] = {
        "attention_bias": True, "hidden_size": 2880, "intermediate_size": 2880, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "num_local_experts": 128, "rms_norm_eps": 1e-5, "sliding_window": 128, "vocab_size": 201088, **_BUILT_IN,
    }  # fmt: skip

    def check(self, config: Config) -> None:
        """Refuse also numbers of experts that cannot be, and what is built into the graph otherwise."""
        super().check(config)
        require_experts(config, "num_local_experts")
        for key, value in _BUILT_IN.items():
            if config[key] != value:
                raise ArchitectureError(
                    f"{key} is {config[key]!r}, but llama.cpp runs {self.gguf_name} models only with {value}"
                )
        if not config["attention_bias"]:
            raise ArchitectureError(f"attention_bias is off, but llama.cpp runs {self.gguf_name} models only with it")
        require_count("sliding_window", config["sliding_window"])
        alternating = windowed_layers(config["num_hidden_layers"], _PERIOD)
        require_layer_types(config, alternating, tuple(config.get("layer_types") or alternating))

    def check_rope(self, rope: Config) -> None:
        """Refuse rotary parameters as in other families, but not a range of yarn that is not rounded."""
        super().check_rope({key: value for key, value in rope.items() if key != "truncate"})

    def caveats(self, config: Config) -> tuple[str, ...]:
        """Also that llama.cpp rounds the range of yarn, which the published models have as it is."""
        caveats, rope = super().caveats(config), self.rope(config)
        if rope["rope_type"] != "yarn" or rope.get("truncate", True):
            return caveats
        low, high = yarn_range(rope, self.head_dim(config), config["max_position_embeddings"])
        return (
            *caveats,
            f"yarn slows the rotation between dimensions {low:.2f} and {high:.2f} of a head (truncate is off), but "
            "llama.cpp rounds them down and up to whole numbers: over some hundred tokens and more, its results will "
            "differ from transformers'",
        )

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters; if there are none, those of the published models, as in transformers."""
        if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
            config = {**config, "rope_parameters": _USUAL_ROPE}
        return super().rope(config, layer_type)

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, and those of experts, which are the only networks."""
        of_experts = {**config, "moe_intermediate_size": config["intermediate_size"]}
        return super().sizes(config) | expert_sizes(of_experts, int(config["num_local_experts"]))

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, those of experts and the window; which layers have it is built into the graph."""
        super().add_hyper_parameters(config, writer)
        add_expert_counts(self.sizes(config), writer)
        writer.add_sliding_window(config["sliding_window"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, those of experts, the window, and what is built into the graph."""
        config = super().source_config(stored)
        counts = source_expert_counts(stored, "num_local_experts")
        return (
            config
            | counts
            | _BUILT_IN
            | {
                "attention_bias": True,
                "intermediate_size": counts["moe_intermediate_size"],
                "layer_types": list(windowed_layers(config["num_hidden_layers"], _PERIOD)),
                "sliding_window": stored.count("attention.sliding_window"),
            }
        )

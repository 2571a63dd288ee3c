"""Qwen 3.5 as a mixture of experts: all tokens go through one more network, which has a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_experts
from lieq_gguf.architectures.experts import add_expert_counts, expert_sizes, source_expert_counts
from lieq_gguf.architectures.modules import EXPERTS, LayerModule
from lieq_gguf.architectures.qwen35 import Qwen35
from lieq_gguf.architectures.stored_parameters import StoredParameters

_NETWORK = (
    *EXPERTS,
    LayerModule("ffn_gate_inp_shexp", "mlp.shared_expert_gate", ("one", "width"), is_fixed=True),
    LayerModule("ffn_gate_shexp", "mlp.shared_expert.gate_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_up_shexp", "mlp.shared_expert.up_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_down_shexp", "mlp.shared_expert.down_proj", ("width", "n_shared_ff")),
)


class Qwen35Moe(Qwen35):
    """Layers as in the dense models, with experts in place of the network."""

    gguf_name = "qwen35moe"
    model_type = "qwen3_5_moe_text"
    source_classes: ClassVar[tuple[str, ...]] = ("Qwen3_5MoeForCausalLM",)
    modules = (*(module for module in Qwen35.modules if module not in Qwen35.network), *_NETWORK)
    network = _NETWORK
    has_network = False
    defaults: ClassVar[Mapping[str, Any]] = {
        **{key: value for key, value in Qwen35.defaults.items() if key != "intermediate_size"}, "hidden_size": 2048,
        "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "shared_expert_intermediate_size": 512,
    }  # fmt: skip

    def check(self, config: Config) -> None:
        """Refuse also numbers of experts that cannot be."""
        super().check(config)
        require_experts(config, "num_experts")
        for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            require_count(key, config[key])

    def sizes(self, config: Config) -> dict[str, int]:
        """The sizes of the dense models, and those of experts."""
        of_experts = expert_sizes(config, int(config["num_experts"]))
        return super().sizes(config) | of_experts | {"n_shared_ff": int(config["shared_expert_intermediate_size"])}

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The keys of the dense models, and those of experts."""
        super().add_hyper_parameters(config, writer)
        sizes = self.sizes(config)
        add_expert_counts(sizes, writer)
        writer.add_expert_shared_feed_forward_length(sizes["n_shared_ff"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The keys of the dense models, and those of experts."""
        return (
            super().source_config(stored)
            | source_expert_counts(stored)
            | {
                "shared_expert_intermediate_size": stored.count("expert_shared_feed_forward_length"),
            }
        )

"""LFM 2 as a mixture of experts: the first layers have a feed-forward network, the others a sigmoid router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_experts
from lieq_gguf.architectures.experts import add_expert_counts, expert_sizes, source_expert_counts
from lieq_gguf.architectures.lfm2 import ATTENTION_LAYER, CONVOLUTION_LAYER, FEED_FORWARD, LAYER_NORMS, Lfm2
from lieq_gguf.architectures.modules import LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_EXPERTS = (
    LayerModule("ffn_gate_inp", "feed_forward.gate", ("n_experts", "width"), is_fixed=True),
    LayerModule("exp_probs_b", "feed_forward.expert_bias", ("n_experts",), suffixes=(".bias", "")),
    LayerModule("ffn_gate_exps", "feed_forward.experts.{}.gate_proj", ("n_experts", "n_expert_ff", "width")),
    LayerModule("ffn_up_exps", "feed_forward.experts.{}.up_proj", ("n_experts", "n_expert_ff", "width")),
    LayerModule("ffn_down_exps", "feed_forward.experts.{}.down_proj", ("n_experts", "width", "n_expert_ff")),
)


class Lfm2Moe(Lfm2):
    """The choice of experts is biased, their shares are not."""

    gguf_name = "lfm2moe"
    model_type = "lfm2_moe"
    source_classes: ClassVar[tuple[str, ...]] = ("Lfm2MoeForCausalLM",)
    modules = (*LAYER_NORMS, *ATTENTION_LAYER, *CONVOLUTION_LAYER, *FEED_FORWARD, *_EXPERTS)
    defaults: ClassVar[Mapping[str, Any]] = {
        "conv_L_cache": 3, "conv_bias": False, "hidden_size": 2048, "intermediate_size": 7168,
        "max_position_embeddings": 128_000, "moe_intermediate_size": 1792, "norm_eps": 1e-5, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "routed_scaling_factor": 1.0, "use_expert_bias": True,
        "vocab_size": 65536,
    }  # fmt: skip

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration; transformers adjusts no width here, whatever it says."""
        return super().completed(config) | {"block_auto_adjust_ff_dim": False}

    def check(self, config: Config) -> None:
        """Refuse also numbers of experts that cannot be, and shares that the graph does not compute."""
        super().check(config)
        require_experts(config, "num_experts")
        require_count("moe_intermediate_size", config["moe_intermediate_size"])
        require_count("num_dense_layers", config["num_dense_layers"], least=0)
        for key in ("norm_topk_prob", "use_expert_bias"):
            if not config[key]:
                raise ArchitectureError(f"{key} is off, but llama.cpp runs {self.gguf_name} models only with it")
        if config["routed_scaling_factor"] != 1:
            raise ArchitectureError(
                f"routed_scaling_factor is {config['routed_scaling_factor']}, but llama.cpp runs {self.gguf_name} only "
                "with 1"
            )

    def sizes(self, config: Config) -> dict[str, int]:
        """The sizes of the dense models, and those of experts."""
        return super().sizes(config) | expert_sizes(config, int(config["num_experts"]))

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """Those of the dense models, with experts in place of the network of later layers."""
        modules = super().layer_modules(config, layer)
        is_dense = layer < config["num_dense_layers"]
        return modules if is_dense else (*(m for m in modules if m not in FEED_FORWARD), *_EXPERTS)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The keys of the dense models, and those of experts."""
        super().add_hyper_parameters(config, writer)
        add_expert_counts(self.sizes(config), writer)
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The keys of the dense models, and those of experts."""
        if stored.value("expert_gating_func") != gguf.ExpertGatingFuncType.SIGMOID:
            raise ArchitectureError("the router is no sigmoid")
        n_dense = stored.value("leading_dense_block_count", 0)
        return (
            super().source_config(stored)
            | source_expert_counts(stored)
            | {
                "num_dense_layers": stored.count("leading_dense_block_count") if n_dense else 0,
            }
        )

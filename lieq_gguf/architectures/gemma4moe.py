"""Gemma 4 as a mixture of experts: every layer has experts beside its feed-forward network, with norms of their own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_experts
from lieq_gguf.architectures.experts import add_expert_counts, expert_sizes, source_expert_counts
from lieq_gguf.architectures.gemma4 import Gemma4
from lieq_gguf.architectures.modules import LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters

_USED = "top_k_experts"
_EXPERTS = (
    LayerModule("post_ffw_norm_1", "post_feedforward_layernorm_1", ("width",)),  # of the network alone
    LayerModule("pre_ffw_norm_2", "pre_feedforward_layernorm_2", ("width",)),  # before the experts
    LayerModule("post_ffw_norm_2", "post_feedforward_layernorm_2", ("width",)),  # and behind them
    # the router's norm has no weights: its input is scaled by column, its shares by expert
    LayerModule("ffn_gate_inp", "router.scale", ("width",), suffixes=(".scale", "")),
    LayerModule("ffn_gate_inp", "router.proj", ("n_experts", "width"), is_fixed=True),
    LayerModule("ffn_down_exps", "router.per_expert_scale", ("n_experts",), suffixes=(".scale", "")),
    LayerModule("ffn_gate_up_exps", "experts.{}.gate_up_proj", ("n_experts", "n_expert_gate_and_up", "width")),
    LayerModule("ffn_down_exps", "experts.{}.down_proj", ("n_experts", "width", "n_expert_ff")),
)


class Gemma4Moe(Gemma4):
    """Layers as in the models without experts. Gate and up of an expert are one matrix, also in the file."""

    modules = (*Gemma4.modules, *_EXPERTS)
    gates_and_ups = "together"

    def has_model(self, config: Config) -> bool:
        """Whether there are experts."""
        return not super().has_model(config)

    def has_file(self, keys: Collection[str]) -> bool:
        """Whether the file tells of experts."""
        return not super().has_file(keys)

    def check(self, config: Config) -> None:
        """Refuse also numbers of experts that cannot be."""
        super().check(config)
        require_experts(config, "num_experts", used=_USED)
        require_count("moe_intermediate_size", config["moe_intermediate_size"])

    def sizes(self, config: Config) -> dict[str, int]:
        """The sizes of the models without experts, and those of experts."""
        of_experts = expert_sizes(config, int(config["num_experts"]), used=_USED)
        return super().sizes(config) | of_experts | {"n_expert_gate_and_up": 2 * of_experts["n_expert_ff"]}

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """Those of the models without experts, and experts."""
        return (*super().layer_modules(config, layer), *_EXPERTS)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The keys of the models without experts, and those of experts."""
        super().add_hyper_parameters(config, writer)
        add_expert_counts(self.sizes(config), writer)

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The keys of the models without experts, and those of experts."""
        return super().source_config(stored) | source_expert_counts(stored, used=_USED) | {"enable_moe_block": True}

"""Qwen 3 as a mixture of experts: a router sends each token to some of many feed-forward networks."""

from __future__ import annotations

from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_experts
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.experts import add_expert_counts, expert_sizes, source_expert_counts
from lieq_gguf.architectures.modules import ATTENTION, EXPERTS, HEAD_NORMS, NORMS
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError


class Qwen3Moe(Decoder):
    """In the file, one tensor holds the same matrix of all experts."""

    gguf_name = "qwen3moe"
    model_type = "qwen3_moe"
    source_classes = ("Qwen3MoeForCausalLM",)
    modules = (NORMS[0], *ATTENTION, *HEAD_NORMS, NORMS[1], *EXPERTS)

    def check(self, config: Config) -> None:
        """Refuse also layers without experts, and shares of experts that do not sum to one."""
        super().check(config)
        require_experts(config, "num_experts" if config.get("num_experts") else "num_local_experts")
        require_count("moe_intermediate_size", config["moe_intermediate_size"])
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise ArchitectureError(
                "some layers have no experts (mlp_only_layers, decoder_sparse_step), but llama.cpp's graph has them in "
                "every layer"
            )
        if not config.get("norm_topk_prob", False):
            raise ArchitectureError("norm_topk_prob is not set, but llama.cpp makes the weights of experts sum to one")

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, the number of experts and their width."""
        n_experts = int(config.get("num_experts") or config["num_local_experts"])
        return super().sizes(config) | expert_sizes(config, n_experts)

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys and those of the experts."""
        counts = source_expert_counts(stored)
        others = {"num_local_experts": counts["num_experts"], "norm_topk_prob": True}
        return super().source_config(stored) | counts | others

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and those of the experts."""
        super().add_hyper_parameters(config, writer)
        add_expert_counts(self.sizes(config), writer)

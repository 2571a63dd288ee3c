"""Granite 3: a Llama with factors at embedding, attention, residual stream and logits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config, require_number, require_usual_heads
from lieq_gguf.architectures.llama import Llama
from lieq_gguf.architectures.stored_parameters import StoredParameters

_FACTORS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


class Granite(Llama):
    """The dense models."""

    gguf_name = "granite"
    model_type = "granite"
    source_classes = ("GraniteForCausalLM",)

    def has_file(self, keys: Collection[str]) -> bool:
        """Whether the file is not one of Granite 4, which has keys of layers that it does not have."""
        return "ssm.inner_size" not in keys

    def check(self, config: Config) -> None:
        """Refuse also heads of an unusual width, which the format cannot store for Granite."""
        super().check(config)
        for key in _FACTORS:
            require_number(key, config.get(key, 1.0))
        require_usual_heads(config, self.head_dim(config), self.gguf_name)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and the factors."""
        without_head_dim = {key: value for key, value in config.items() if key != "head_dim"}
        super().add_hyper_parameters(without_head_dim, writer)
        writer.add_attention_scale(config.get("attention_multiplier", 1.0))
        writer.add_embedding_scale(config.get("embedding_multiplier", 1.0))
        writer.add_residual_scale(config.get("residual_multiplier", 1.0))
        writer.add_logit_scale(config.get("logits_scaling", 1.0))

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys and the factors."""
        return super().source_config(stored) | {
            "attention_multiplier": stored.number("attention.scale", 1.0),
            "embedding_multiplier": stored.number("embedding_scale", 1.0),
            "residual_multiplier": stored.number("residual_scale", 1.0),
            "logits_scaling": stored.number("logit_scale", 1.0),
        }

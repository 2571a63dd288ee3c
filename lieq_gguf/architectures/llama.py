"""Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral: rows of query and key in the order of Llama's own code."""

from __future__ import annotations

from typing import ClassVar

import gguf

from lieq_gguf.architectures.checks import Config
from lieq_gguf.architectures.llama3_rope import Llama3Rope
from lieq_gguf.architectures.modules import FEED_FORWARD, INTERLEAVED_ATTENTION, NORMS, LayerModule


class Llama(Llama3Rope):
    """Llama, and models that use its graph."""

    gguf_name = "llama"
    model_type = "llama"
    source_classes: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "MistralForCausalLM")
    modules: ClassVar[tuple[LayerModule, ...]] = (NORMS[0], *INTERLEAVED_ATTENTION, NORMS[1], *FEED_FORWARD)
    biases: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and two more."""
        super().add_hyper_parameters(config, writer)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(self.head_dim(config))

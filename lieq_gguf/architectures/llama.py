"""Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral: rows of query and key in the order of Llama's own code."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import gguf

from lieq_gguf.architectures.decoder import FEED_FORWARD, INTERLEAVED_ATTENTION, NORMS, Config, Decoder

if TYPE_CHECKING:
    import torch


class Llama(Decoder):
    """Llama, and what was built on its graph."""

    gguf_name = "llama"
    source_classes: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "MistralForCausalLM")
    parts = (NORMS[0], *INTERLEAVED_ATTENTION, NORMS[1], *FEED_FORWARD)
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3", "yarn")

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and two more."""
        super().add_hyper_parameters(config, writer)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(self.head_dim(config))

    def computed_lengths(self, config: Config) -> dict[str, int]:
        """``rope_freqs.weight`` for Llama 3.1's rotary scaling."""
        is_scaled = self.rope(config)["rope_type"] == "llama3"
        return {"rope_freqs.weight": self.head_dim(config) // 2} if is_scaled else {}

    def computed_tensor(self, config: Config, name: str) -> torch.Tensor:  # noqa: ARG002
        """The factor by which Llama 3.1 slows down each rotary frequency, ``[head_dim / 2]``.

        Long waves are slowed by ``factor``, short ones are kept, and those between are blended. In float32 like the
        frequencies themselves. Source: ``rope_type: llama3`` in transformers' ``modeling_rope_utils``.
        """
        import torch

        rope, head_dim = self.rope(config), self.head_dim(config)
        factor = float(rope["factor"])
        low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
        context = float(rope.get("original_max_position_embeddings") or 8192)
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        wavelengths: torch.Tensor = 2 * math.pi / frequencies
        kept = (context / wavelengths - low) / (high - low)
        blended: torch.Tensor = 1 / ((1 - kept) / factor + kept)
        blended[wavelengths < context / high] = 1.0
        blended[wavelengths > context / low] = factor
        return blended

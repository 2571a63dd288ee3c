"""Llama 3.1's rotary scaling, which more than one graph supports: the file holds a factor for every frequency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from lieq_gguf.architectures.checks import Config
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

if TYPE_CHECKING:
    import torch


class Llama3Rope(Decoder):
    """A family whose graph divides rotary frequencies by ``rope_freqs.weight``, if the file has it."""

    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3", "yarn")

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The common parameters, or the factors of Llama 3.1's scaling.

        The file has only the factors, not the parameters of the scaling; transformers' ``longrope`` takes factors and
        gives the same numbers.
        """
        rope = super().source_rope(stored, head_dim)
        if "rope_freqs.weight" not in stored.shapes:
            return rope
        if rope["rope_type"] != "default":
            raise ArchitectureError(f"the rope scaling is of type '{rope['rope_type']}' and has factors as well")
        factors = stored.vector("rope_freqs.weight")
        return rope | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": stored.count("context_length"),
        }

    def computed_lengths(self, config: Config) -> dict[str, int]:
        """``rope_freqs.weight`` for Llama 3.1's rotary scaling."""
        is_scaled = self.rope(config)["rope_type"] == "llama3"
        return {"rope_freqs.weight": self.head_dim(config) // 2} if is_scaled else {}

    def computed_tensor(self, config: Config, name: str) -> torch.Tensor:  # noqa: ARG002
        """The factor by which Llama 3.1 slows down each rotary frequency, ``[head_dim / 2]``.

        Long waves are slowed by ``factor``, short ones are unchanged, and those between are blended. In float32 like
        the frequencies themselves. Source: ``rope_type: llama3`` in transformers' ``modeling_rope_utils``.
        """
        import torch

        rope, head_dim = self.rope(config), self.head_dim(config)
        factor = float(rope["factor"])
        low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
        context = float(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        wavelengths: torch.Tensor = 2 * math.pi / frequencies
        unchanged = (context / wavelengths - low) / (high - low)  # share of the original frequency
        blended: torch.Tensor = 1 / ((1 - unchanged) / factor + unchanged)
        blended[wavelengths < context / high] = 1.0
        blended[wavelengths > context / low] = factor
        return blended

"""Phi 3, 3.5 and 4: query, key and value in one matrix, gate and up in another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_number
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

if TYPE_CHECKING:
    import torch

_ORIGINAL_CONTEXT = 4096
ROPE_FACTORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}


class Phi3(Decoder):
    """Long contexts have two sets of rotary factors; llama.cpp picks the one for the context in use."""

    gguf_name = "phi3"
    model_type = "phi3"
    source_classes = ("Phi3ForCausalLM",)
    modules = (
        NORMS[0],
        LayerModule("attn_qkv", "self_attn.qkv_proj", ("qkv_width", "width")),
        LayerModule("attn_output", "self_attn.o_proj", ("width", "q_width")),
        NORMS[1],
        LayerModule("ffn_up", "mlp.gate_up_proj", ("gate_up_width", "width")),
        LayerModule("ffn_down", "mlp.down_proj", ("width", "n_ff")),
    )
    rope_types = ("default", "longrope")

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes and the rows of the two fused matrices."""
        sizes = super().sizes(config)
        fused = {"qkv_width": sizes["q_width"] + 2 * sizes["kv_width"], "gate_up_width": 2 * sizes["n_ff"]}
        return sizes | fused

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters; earlier files have other names for the long scaling."""
        rope = super().rope(config, layer_type)
        if rope["rope_type"] in ("su", "yarn"):
            rope["rope_type"] = "longrope"
        share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        rope["n_dimensions"] = int(share * config["hidden_size"]) // config["num_attention_heads"]
        return rope

    def check_rope(self, rope: Config) -> None:
        """Refuse also factors that do not fit the heads."""
        super().check_rope(rope)
        check_rope_factors(rope)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and the window, which is 0 where there is none."""
        super().add_hyper_parameters(config, writer)
        writer.add_sliding_window(config.get("sliding_window") or 0)

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the rotated dimensions, and the attention scale of a longer context."""
        rope = self.rope(config)
        original = _original_context(config)
        writer.add_rope_dimension_count(rope["n_dimensions"])
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            writer.add_rope_scaling_attn_factors(
                longrope_attention_factor(rope, config["max_position_embeddings"], original)
            )

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, the window, and the context for which the short factors are made."""
        return super().source_config(stored) | {
            "sliding_window": stored.value("attention.sliding_window", 0) or None,
            "original_max_position_embeddings": stored.count("rope.scaling.original_context_length", _ORIGINAL_CONTEXT),
        }

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The rotated dimensions, and both sets of factors if there are any."""
        rope = {
            "rope_type": "default",
            "rope_theta": stored.number("rope.freq_base", self.default_theta),
            "partial_rotary_factor": stored.count("rope.dimension_count", head_dim) / head_dim,
        }
        if "rope_factors_long.weight" not in stored.shapes:
            return rope
        return rope | {
            "rope_type": "longrope",
            "short_factor": stored.vector("rope_factors_short.weight"),
            "long_factor": stored.vector("rope_factors_long.weight"),
            "attention_factor": stored.number("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": stored.count("rope.scaling.original_context_length", _ORIGINAL_CONTEXT),
        }

    def computed_lengths(self, config: Config) -> dict[str, int]:
        """The two sets of factors."""
        rope = self.rope(config)
        return dict.fromkeys(ROPE_FACTORS, rope["n_dimensions"] // 2) if rope["rope_type"] == "longrope" else {}

    def computed_tensor(self, config: Config, name: str) -> torch.Tensor:
        """One set of factors, as ``config.json`` has it."""
        import torch

        return torch.tensor(self.rope(config)[ROPE_FACTORS[name]], dtype=torch.float32)


def check_rope_factors(rope: Config) -> None:
    """Require a factor for every pair of ``n_dimensions`` in both sets; none where the type is not ``longrope``."""
    expected = rope["n_dimensions"] // 2 if rope["rope_type"] == "longrope" else 0
    for key in ROPE_FACTORS.values():
        factors = rope.get(key) or []
        if len(factors) != expected or not all(isinstance(f, float | int) for f in factors):
            raise ArchitectureError(f"{key} in config.json has {len(factors)} numbers; expected {expected}")


def longrope_attention_factor(rope: Config, context: int, original: int) -> float:
    """By what attention is scaled for a context.

    Source: ``_compute_longrope_parameters`` in transformers' ``modeling_rope_utils``.
    """
    for key in ("factor", "attention_factor"):
        if rope.get(key) is not None:
            require_number(key, rope[key])
    given, factor = rope.get("attention_factor"), rope.get("factor")
    factor = context / original if factor is None else factor
    if given is None:
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return float(given)


def _original_context(config: Config) -> int:
    """Not from the rotary parameters: transformers' configuration overwrites what they say."""
    key = "original_max_position_embeddings"
    length: int = config.get(key) or _ORIGINAL_CONTEXT
    require_count(key, length, least=2)  # its logarithm divides
    return length

"""MiniCPM 3: narrow matrices before queries, keys and values; factors at embedding, residual stream and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import FEED_FORWARD, NORMS, LayerModule
from lieq_gguf.architectures.phi3 import ROPE_FACTORS, check_rope_factors, longrope_attention_factor
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

if TYPE_CHECKING:
    import torch

_IN_THE_GRAPH = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
_THETA = 10000.0  # for which llama.cpp's converter writes no key


class MiniCpm3(Decoder):
    """The factors and the width of values are built into llama.cpp's graph."""

    gguf_name = "minicpm3"
    model_type = "minicpm3"
    source_classes = ("MiniCPM3ForCausalLM",)
    modules = (
        NORMS[0],
        LayerModule("attn_q_a", "self_attn.q_a_proj", ("q_rank", "width"), bias="attention_bias"),
        LayerModule("attn_q_a_norm", "self_attn.q_a_layernorm", ("q_rank",)),
        LayerModule("attn_q_b", "self_attn.q_b_proj", ("q_width", "q_rank")),
        LayerModule("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", ("kv_a_width", "width"), bias="attention_bias"),
        LayerModule("attn_kv_a_norm", "self_attn.kv_a_layernorm", ("kv_rank",)),
        LayerModule("attn_kv_b", "self_attn.kv_b_proj", ("kv_b_width", "kv_rank")),
        LayerModule("attn_output", "self_attn.o_proj", ("width", "value_width"), bias="attention_bias"),
        NORMS[1],
        *FEED_FORWARD,
    )
    rope_types = ("default", "longrope")
    tied_by_default = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, **_IN_THE_GRAPH,
    }  # fmt: skip

    def check(self, config: Config) -> None:
        """Refuse also queries without a narrow matrix, and other factors than those in the graph."""
        super().check(config)
        if config["q_lora_rank"] is None:
            raise ArchitectureError("q_lora_rank is null, but llama.cpp's graph has a narrow matrix for queries")
        for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
            require_count(key, config[key])
        usual = config["hidden_size"] // config["num_attention_heads"]
        for key, expected in (*_IN_THE_GRAPH.items(), ("v_head_dim", usual)):
            given = config.get(key, expected)
            if given != expected and (key, given) != ("v_head_dim", None):
                raise ArchitectureError(
                    f"{key} is {given}, but llama.cpp runs {self.gguf_name} only with {expected}, which is built in"
                )
        if self.rope(config)["rope_type"] == "longrope":
            self._check_lengths(config)

    def _check_lengths(self, config: Config) -> None:
        """Refuse a rotation that changes with the length of the text, for which the file has no keys."""
        rope, context = self.rope(config), config["max_position_embeddings"]
        key = "original_max_position_embeddings"
        original = config.get(key) or rope.get(key) or context
        if original != context or longrope_attention_factor(rope, context, original) != 1:
            raise ArchitectureError(
                f"{key} is {original} and max_position_embeddings {context}, but llama.cpp runs {self.gguf_name} with "
                "the factors of short texts alone; expected the same number, and no scaling of attention"
            )

    def check_rope(self, rope: Config) -> None:
        """Refuse also factors that do not fit the heads."""
        super().check_rope(rope)
        check_rope_factors(rope)

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters with the number of rotated dimensions."""
        return super().rope(config, layer_type) | {"n_dimensions": int(config["qk_rope_head_dim"])}

    def head_dim(self, config: Config) -> int:
        """Width of queries and keys."""
        return int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes and those of the narrow matrices."""
        sizes = super().sizes(config)
        n_heads, value_dim = sizes["n_heads"], sizes["width"] // sizes["n_heads"]
        return sizes | {
            "q_rank": int(config["q_lora_rank"]),
            "kv_rank": int(config["kv_lora_rank"]),
            "kv_a_width": int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]),
            "kv_b_width": n_heads * (int(config["qk_nope_head_dim"]) + value_dim),
            "value_width": n_heads * value_dim,
        }

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and the widths of narrow matrices and keys."""
        super().add_hyper_parameters({key: value for key, value in config.items() if key != "head_dim"}, writer)
        sizes = self.sizes(config)
        writer.add_vocab_size(sizes["n_vocab"])
        writer.add_q_lora_rank(sizes["q_rank"])
        writer.add_kv_lora_rank(sizes["kv_rank"])
        writer.add_key_length(sizes["head_dim"])

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the number of rotated dimensions, and a base that is not llama.cpp's own."""
        rope = self.rope(config)
        writer.add_rope_dimension_count(rope["n_dimensions"])
        if rope["rope_theta"] != _THETA:
            writer.add_rope_freq_base(rope["rope_theta"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, the widths of narrow matrices and keys, and what is built into the graph."""
        config = super().source_config(stored)
        key_dim, n_rotated = config.pop("head_dim"), stored.count("rope.dimension_count")
        return config | _IN_THE_GRAPH | {
            "q_lora_rank": stored.count("attention.q_lora_rank"),
            "kv_lora_rank": stored.count("attention.kv_lora_rank"),
            "qk_nope_head_dim": key_dim - n_rotated,
            "qk_rope_head_dim": n_rotated,
        }  # fmt: skip

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:  # noqa: ARG002
        """The base, and both sets of factors if there are any."""
        rope = {"rope_type": "default", "rope_theta": stored.number("rope.freq_base", _THETA)}
        if "rope_factors_short.weight" not in stored.shapes:
            return rope
        factors = {key: stored.vector(name) for name, key in ROPE_FACTORS.items()}
        return rope | factors | {
            "rope_type": "longrope",
            "original_max_position_embeddings": stored.count("context_length"),
        }  # fmt: skip

    def computed_lengths(self, config: Config) -> dict[str, int]:
        """The two sets of factors."""
        rope = self.rope(config)
        return dict.fromkeys(ROPE_FACTORS, rope["n_dimensions"] // 2) if rope["rope_type"] == "longrope" else {}

    def computed_tensor(self, config: Config, name: str) -> torch.Tensor:
        """One set of factors, as ``config.json`` has it."""
        import torch

        return torch.tensor(self.rope(config)[ROPE_FACTORS[name]], dtype=torch.float32)

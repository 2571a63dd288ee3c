"""Ministral 3, and the text part of Mistral Small 3.1: a Llama whose queries grow with the length of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, check_yarn, require_number
from lieq_gguf.architectures.llama import Llama
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_GROWTH = "llama_4_scaling_beta"


class Ministral3(Llama):
    """llama.cpp has one architecture for both."""

    gguf_name = "mistral3"
    model_type = "ministral3"
    source_classes: ClassVar[tuple[str, ...]] = ("Ministral3ForCausalLM", "Mistral3ForCausalLM")
    rope_types: ClassVar[tuple[str, ...]] = ("default", "yarn")
    biases: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128, "max_position_embeddings": 262144, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "vocab_size": 131072,
    }  # fmt: skip

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration; without rotary settings, those that transformers has for it."""
        result = super().completed(config)
        if _is_plain(result):
            usual = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
            result = {"head_dim": None, "num_attention_heads": 32, "vocab_size": 32000, **usual, **config}
        elif not result.get("rope_parameters"):
            result["rope_parameters"] = {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, _GROWTH: 0.1,
            }  # fmt: skip
        return result

    def check(self, config: Config) -> None:
        """Refuse also a scaling of queries without yarn's length of the text in training."""
        super().check(config)
        rope = self.rope(config)
        if _is_plain(config):
            return
        require_number(_GROWTH, rope.get(_GROWTH))
        if rope["rope_type"] != "yarn":
            raise ArchitectureError(
                f"{_GROWTH} is set with rope type '{rope['rope_type']}', but llama.cpp computes it only with 'yarn'"
            )

    def check_rope(self, rope: Config) -> None:
        """Refuse rotary parameters that the graph does not support."""
        super().check_rope({**rope, "mscale": None, "mscale_all_dim": None, "attention_factor": None})
        if rope["rope_type"] == "yarn":
            check_yarn(rope, takes_all_dims=True)

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and how attention grows."""
        super().add_rope(config, writer)
        rope = self.rope(config)
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        if rope.get(_GROWTH) is not None:
            writer.add_attn_temperature_scale(rope[_GROWTH])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys; without growing queries it is a Mistral."""
        config = super().source_config(stored)
        if _GROWTH in config["rope_parameters"]:
            return config
        return config | {"model_type": "mistral", "sliding_window": None}

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The common parameters, and how attention grows."""
        rope = super().source_rope(stored, head_dim)
        all_dims, growth = (
            stored.value("rope.scaling.yarn_log_multiplier", 0.0),
            stored.value("attention.temperature_scale", 0.0),
        )
        if all_dims:
            rope |= {"mscale": 1.0, "mscale_all_dim": all_dims}
        return rope | ({_GROWTH: growth} if growth else {})


def _is_plain(config: Config) -> bool:
    """Whether it is the text part of a Mistral Small 3.1."""
    return config.get("model_type") == "mistral"

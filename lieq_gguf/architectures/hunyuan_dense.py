"""Hunyuan (dense): queries and keys are normed after the rotation, whose base is stretched for long contexts."""

from __future__ import annotations

from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config, require_number
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_STATED_CONTEXT, _LONG_CONTEXT = 32 * 1024, 256 * 1024


class HunyuanDense(Decoder):
    """A rotary scaling of type ``dynamic`` with ``alpha`` is a larger base, in transformers as in llama.cpp."""

    gguf_name = "hunyuan-dense"
    model_type = "hunyuan_v1_dense"
    source_classes = ("HunYuanDenseV1ForCausalLM",)
    modules = (
        NORMS[0],
        *ATTENTION,
        LayerModule("attn_q_norm", "self_attn.query_layernorm", ("head_dim",)),
        LayerModule("attn_k_norm", "self_attn.key_layernorm", ("head_dim",)),
        NORMS[1],
        *FEED_FORWARD,
    )
    rope_types = ("default", "linear", "yarn", "dynamic")

    def head_dim(self, config: Config) -> int:
        """Width of an attention head, which transformers needs to be told."""
        return int(config["head_dim"])

    def check_rope(self, rope: Config) -> None:
        """Refuse also a base that depends on the length of the text, which is what ``dynamic`` means by itself."""
        super().check_rope(rope)
        if rope["rope_type"] == "dynamic":
            require_number("alpha", rope.get("alpha") or None)
            if rope["alpha"] <= 0:
                raise ArchitectureError(f"alpha in config.json is {rope['alpha']}; expected a positive number")

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the stretched base, and the context for which it is made.

        ``config.json`` of the published models states an eighth of that context; llama.cpp's converter corrects it.
        """
        super().add_rope(config, writer)
        rope = self.rope(config)
        if rope["rope_type"] != "dynamic":
            return
        head_dim = self.head_dim(config)
        writer.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2)))
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        stated = config["max_position_embeddings"]
        context = _LONG_CONTEXT if stated == _STATED_CONTEXT else stated
        writer.add_rope_scaling_orig_ctx_len(context)
        writer.add_context_length(context)

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The common parameters; beside a stretched base, the keys of a scaling mean nothing."""
        rope = super().source_rope(stored, head_dim)
        if stored.value("rope.scaling.type", None) == "none":
            stored.value("rope.scaling.factor", None)
            stored.value("rope.scaling.original_context_length", None)
        return rope

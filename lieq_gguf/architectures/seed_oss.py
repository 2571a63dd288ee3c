"""Seed-OSS: biases at query, key and value, which a switch can turn off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, NORMS, LayerModule


class SeedOss(Decoder):
    """The graph adds no biases to the outputs of attention and feed-forward network."""

    gguf_name = "seed_oss"
    model_type = "seed_oss"
    source_classes = ("SeedOssForCausalLM",)
    modules = (
        NORMS[0],
        *ATTENTION[:3],
        replace(ATTENTION[3], bias="attention_out_bias"),
        LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
        *FEED_FORWARD,
    )
    biases = ("attention_bias",)
    default_head_dim = 128
    defaults: ClassVar[Mapping[str, Any]] = {"attention_bias": True}

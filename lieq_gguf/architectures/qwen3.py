"""Qwen 3: queries and keys are normed head by head."""

from __future__ import annotations

from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, HEAD_NORMS, NORMS


class Qwen3(Decoder):
    """The dense sizes."""

    gguf_name = "qwen3"
    model_type = "qwen3"
    source_classes = ("Qwen3ForCausalLM",)
    modules = (NORMS[0], *ATTENTION, *HEAD_NORMS, NORMS[1], *FEED_FORWARD)
    default_head_dim = 128

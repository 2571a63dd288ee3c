"""Qwen 2 and 2.5: biases at query, key and value."""

from __future__ import annotations

from dataclasses import replace

from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, NORMS


class Qwen2(Decoder):
    """Rotates halves as transformers does, so no row is reordered."""

    gguf_name = "qwen2"
    model_type = "qwen2"
    source_classes = ("Qwen2ForCausalLM",)
    modules = (
        NORMS[0],
        *(replace(module, bias="always") for module in ATTENTION[:3]),
        replace(ATTENTION[3], bias=""),
        NORMS[1],
        *(replace(module, bias="") for module in FEED_FORWARD),
    )

"""Qwen 2 and 2.5: biases at query, key and value."""

from __future__ import annotations

from dataclasses import replace

from lieq_gguf.architectures.decoder import ATTENTION, FEED_FORWARD, NORMS, Decoder


class Qwen2(Decoder):
    """Halves rotated as in transformers, so that no row is reordered."""

    gguf_name = "qwen2"
    model_type = "qwen2"
    source_classes = ("Qwen2ForCausalLM",)
    parts = (
        NORMS[0],
        *(replace(part, bias="always") for part in ATTENTION[:3]),
        replace(ATTENTION[3], bias=""),
        NORMS[1],
        *(replace(part, bias="") for part in FEED_FORWARD),
    )

"""Arcee: a Llama whose feed-forward network has no gate and squares what is positive."""

from __future__ import annotations

from lieq_gguf.architectures.llama import Llama
from lieq_gguf.architectures.modules import FEED_FORWARD, INTERLEAVED_ATTENTION, NORMS


class Arcee(Llama):
    """llama.cpp's converter treats it as a Llama; biases, which a Llama may have, its graph does not load."""

    gguf_name = "arcee"
    model_type = "arcee"
    source_classes = ("ArceeForCausalLM",)
    modules = (NORMS[0], *INTERLEAVED_ATTENTION, NORMS[1], *FEED_FORWARD[1:])
    activation = "relu2"
    biases = ()

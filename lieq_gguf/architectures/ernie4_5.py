"""ERNIE 4.5: a Llama whose rows of query and key are already in the order of Llama's own code."""

from __future__ import annotations

from dataclasses import replace

from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, NORMS


class Ernie45(Decoder):
    """The dense models. transformers, too, rotates neighbouring rows, so none is reordered."""

    gguf_name = "ernie4_5"
    model_type = "ernie4_5"
    source_classes = ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
    modules = (
        NORMS[0],
        *(replace(module, bias="use_bias") for module in ATTENTION),
        NORMS[1],
        *(replace(module, bias="use_bias") for module in FEED_FORWARD),
    )
    default_theta = 500_000.0
    default_head_dim = 128
    tied_by_default = True

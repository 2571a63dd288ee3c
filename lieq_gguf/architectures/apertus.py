"""Apertus: no gate, and an activation (xIELU) whose numbers each layer has learnt; heads are normed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf

from lieq_gguf.architectures.checks import Config
from lieq_gguf.architectures.llama3_rope import Llama3Rope
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, HEAD_NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters

_ACTIVATION = "mlp.act_fn"
_NUMBERS = ("alpha_p", "alpha_n", "beta", "eps")
_THETA = 12_000_000.0
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": _THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # transformers' default


class Apertus(Llama3Rope):
    """llama.cpp keeps the numbers of the activations in the header, as they are in the weights."""

    gguf_name = "apertus"
    model_type = "apertus"
    source_classes = ("ApertusForCausalLM",)
    modules = (
        LayerModule("attn_norm", "attention_layernorm", ("width",)),
        *ATTENTION,
        *HEAD_NORMS,
        LayerModule("ffn_norm", "feedforward_layernorm", ("width",)),
        *(replace(module, bias="") for module in FEED_FORWARD[1:]),
    )
    biases = ("attention_bias",)
    activation = "xielu"
    header_parameters = tuple(f"{_ACTIVATION}.{name}" for name in _NUMBERS)
    default_theta = _THETA
    output_matrix = "own"

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters, which are scaled if ``config.json`` has none."""
        if config.get("rope_parameters") is None and not config.get("rope_scaling"):
            return dict(_ROPE)
        return super().rope(config, layer_type)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, two more, and the numbers of the activations."""
        super().add_hyper_parameters(config, writer)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(self.head_dim(config))
        for name in _NUMBERS:
            getattr(writer, f"add_xielu_{name}")(config[f"{_ACTIVATION}.{name}"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys and the numbers of the activations."""
        config = super().source_config(stored)
        n_layers = config["num_hidden_layers"]
        numbers = {f"{_ACTIVATION}.{name}": stored.numbers(f"xielu.{name}", n_layers) for name in _NUMBERS}
        return config | numbers | {"hidden_act": self.activation}

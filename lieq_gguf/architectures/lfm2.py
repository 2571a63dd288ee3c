"""LFM 2 and 2.5: most layers have a gated short convolution in place of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_kinds
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

ATTENTION_LAYER = (
    LayerModule("attn_q", "self_attn.q_proj", ("q_width", "width")),
    LayerModule("attn_k", "self_attn.k_proj", ("kv_width", "width")),
    LayerModule("attn_v", "self_attn.v_proj", ("kv_width", "width")),
    LayerModule("attn_output", "self_attn.out_proj", ("width", "q_width")),
    LayerModule("attn_q_norm", "self_attn.q_layernorm", ("head_dim",)),
    LayerModule("attn_k_norm", "self_attn.k_layernorm", ("head_dim",)),
)
CONVOLUTION_LAYER = (
    LayerModule("shortconv.in_proj", "conv.in_proj", ("three_widths", "width"), bias="conv_bias"),
    LayerModule(
        "shortconv.conv", "conv.conv", ("width", "n_kernel"), is_fixed=True, stored_shape=("width", "one", "n_kernel")
    ),
    LayerModule("shortconv.out_proj", "conv.out_proj", ("width", "width")),
)
LAYER_NORMS = (LayerModule("attn_norm", "operator_norm", ("width",)), LayerModule("ffn_norm", "ffn_norm", ("width",)))
FEED_FORWARD = (
    LayerModule("ffn_gate", "feed_forward.w1", ("n_ff", "width")),
    LayerModule("ffn_up", "feed_forward.w3", ("n_ff", "width")),
    LayerModule("ffn_down", "feed_forward.w2", ("width", "n_ff")),
)
_KINDS = ("full_attention", "conv")


class Lfm2(Decoder):
    """The dense models."""

    gguf_name = "lfm2"
    model_type = "lfm2"
    source_classes: ClassVar[tuple[str, ...]] = ("Lfm2ForCausalLM", "LFM2ForCausalLM")
    modules: ClassVar[tuple[LayerModule, ...]] = (*LAYER_NORMS, *ATTENTION_LAYER, *CONVOLUTION_LAYER, *FEED_FORWARD)
    final_norm = ("token_embd_norm", "embedding_norm")
    norm_epsilon = "norm_eps"
    default_theta = 1_000_000.0
    tied_by_default = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "conv_L_cache": 3,
        "conv_bias": False, "max_position_embeddings": 128_000, "norm_eps": 1e-5,
    }  # fmt: skip

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the names that it has in later files."""
        renamed = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
        result = super().completed(config) | {new: config[old] for old, new in renamed.items() if old in config}
        if config.get("layer_types") is None:
            n_layers = range(int(config["num_hidden_layers"]))
            attending = config.get("full_attn_idxs")
            kinds = [_KINDS[0] if attending is None or layer in attending else _KINDS[1] for layer in n_layers]
            result["layer_types"] = kinds
        return result

    def check(self, config: Config) -> None:
        """Refuse also heads of an unusual width, and kinds of layers that the graph does not have."""
        super().check(config)
        require_count("conv_L_cache", config["conv_L_cache"], least=2)
        require_kinds(config, _KINDS)
        sizes = self.sizes(config)
        if sizes["q_width"] != sizes["width"]:
            raise ArchitectureError(
                f"{sizes['n_heads']} heads of width {sizes['head_dim']} are not as wide as the model, "
                f"{sizes['width']}, but llama.cpp runs {self.gguf_name} only so"
            )

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, with the width of the feed-forward network as transformers adjusts it."""
        sizes = super().sizes(config)
        n_ff = sizes["n_ff"]
        if config.get("block_auto_adjust_ff_dim"):
            n_ff, multiple = int(2 * n_ff / 3), int(config["block_multiple_of"])
            if config["block_ffn_dim_multiplier"] is not None:
                n_ff = int(config["block_ffn_dim_multiplier"] * n_ff)
            n_ff = -(-n_ff // multiple) * multiple
        return sizes | {"n_ff": n_ff, "three_widths": 3 * sizes["width"], "n_kernel": int(config["conv_L_cache"])}

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """Attention or convolution, and a feed-forward network."""
        mixer = ATTENTION_LAYER if config["layer_types"][layer] == _KINDS[0] else CONVOLUTION_LAYER
        return (LAYER_NORMS[0], *mixer, LAYER_NORMS[1], *FEED_FORWARD)

    def kv_heads(self, config: Config) -> list[int]:
        """None in a layer with a convolution."""
        n_kv_heads = self.sizes(config)["n_kv_heads"]
        return [n_kv_heads if kind == _KINDS[0] else 0 for kind in config["layer_types"]]

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, the size of the vocabulary, and the length of the convolution."""
        super().add_hyper_parameters(config, writer)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_shortconv_l_cache(config["conv_L_cache"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, the kinds of layers, and the length of the convolution."""
        config = super().source_config(stored)
        counts = stored.per_layer("attention.head_count_kv", 0)
        counts = counts if isinstance(counts, list) else [counts] * config["num_hidden_layers"]
        return config | {
            "layer_types": [_KINDS[0] if count else _KINDS[1] for count in counts],
            "conv_L_cache": stored.count("shortconv.l_cache"),
            "block_auto_adjust_ff_dim": False,
        }

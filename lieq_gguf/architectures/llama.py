"""The Llama family: Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import TensorSpec

GGUF_NAME = "llama"
SOURCE_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def check(config: Mapping[str, Any]) -> None:
    """Refuse what is no Llama, and activations and rotary variants that llama.cpp's Llama graph does not compute."""
    for key in _COUNTS:
        if not isinstance(config[key], int) or config[key] < 1:
            raise ArchitectureError(f"{key} in config.json is {config[key]!r}; expected a positive integer")
    for key in ("num_key_value_heads", "head_dim"):
        if config.get(key) is not None and (not isinstance(config[key], int) or config[key] < 1):
            raise ArchitectureError(f"{key} in config.json is {config[key]!r}; expected a positive integer")
    if not isinstance(config["rms_norm_eps"], float | int):
        raise ArchitectureError(f"rms_norm_eps in config.json is {config['rms_norm_eps']!r}; expected a number")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ArchitectureError(f"hidden_act is '{activation}', but llama.cpp runs Llama models with 'silu' only")
    rope = _rope(config)
    if not isinstance(rope["rope_theta"], float | int):
        raise ArchitectureError(f"rope_theta in config.json is {rope['rope_theta']!r}; expected a number")
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ArchitectureError(
            f"rope type '{rope['rope_type']}' is not supported; supported are {', '.join(_ROPE_TYPES)}"
        )
    if rope["rope_type"] != "default" and not isinstance(rope.get("factor"), float | int):
        raise ArchitectureError(f"rope type '{rope['rope_type']}' has no factor in config.json; expected a number")
    # llama.cpp scales attention by a formula of its own, which these replace in transformers.
    unsupported = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    if rope["rope_type"] == "yarn" and unsupported:
        raise ArchitectureError(
            f"yarn rope scaling with {unsupported[0]} is not supported; expected yarn's own scaling"
        )


def tensors(config: Mapping[str, Any], source_names: frozenset[str]) -> tuple[TensorSpec, ...]:
    """Embedding, layers, final norm, output; biases where the source has them."""
    width, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_heads = config["num_attention_heads"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    head_dim = _head_dim(config)
    # (GGUF role, module in the source layer, shape, heads in rotary layout)
    parts: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
        ("attn_norm", "input_layernorm", (width,), 0),
        ("attn_q", "self_attn.q_proj", (n_heads * head_dim, width), n_heads),
        ("attn_k", "self_attn.k_proj", (n_kv_heads * head_dim, width), n_kv_heads),
        ("attn_v", "self_attn.v_proj", (n_kv_heads * head_dim, width), 0),
        ("attn_output", "self_attn.o_proj", (width, n_heads * head_dim), 0),
        ("ffn_norm", "post_attention_layernorm", (width,), 0),
        ("ffn_gate", "mlp.gate_proj", (n_ff, width), 0),
        ("ffn_up", "mlp.up_proj", (n_ff, width), 0),
        ("ffn_down", "mlp.down_proj", (width, n_ff), 0),
    )

    def all_tensors() -> Iterator[TensorSpec]:
        yield TensorSpec("token_embd.weight", "model.embed_tokens.weight", (n_vocab, width))
        if _rope(config)["rope_type"] == "llama3":
            yield TensorSpec("rope_freqs.weight", None, (head_dim // 2,))
        for layer in range(config["num_hidden_layers"]):
            for role, module, shape, rotary_heads in parts:
                source = f"model.layers.{layer}.{module}"
                yield TensorSpec(f"blk.{layer}.{role}.weight", f"{source}.weight", shape, layer, rotary_heads)
                if f"{source}.bias" in source_names:
                    flag = "mlp_bias" if module.startswith("mlp.") else "attention_bias"
                    if not config.get(flag, False):
                        raise ArchitectureError(
                            f"the weights hold {source}.bias, but {flag} in config.json is not set; "
                            "transformers would leave it out and llama.cpp not"
                        )
                    yield TensorSpec(f"blk.{layer}.{role}.bias", f"{source}.bias", shape[:1], layer, rotary_heads)
        yield TensorSpec("output_norm.weight", "model.norm.weight", (width,))
        if not config.get("tie_word_embeddings", False):
            yield TensorSpec("output.weight", "lm_head.weight", (n_vocab, width))

    return tuple(all_tensors())


def add_hyper_parameters(config: Mapping[str, Any], writer: gguf.GGUFWriter) -> None:
    """The ``llama.*`` keys, as llama.cpp's converter writes them."""
    n_heads = config["num_attention_heads"]
    rope = _rope(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or n_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def computed_tensor(config: Mapping[str, Any], name: str) -> npt.NDArray[np.float32]:
    """``rope_freqs.weight``: the factor by which Llama 3 slows down each rotary frequency, ``[head_dim / 2]``.

    Long waves are slowed by ``factor``, short ones are kept, and those between are blended. Source: Llama 3.1's
    ``rope_type: llama3`` as defined in transformers' ``modeling_rope_utils``.
    """
    if name != "rope_freqs.weight":
        raise ArchitectureError(f"'{name}' is not a computed tensor of the Llama family")
    rope = _rope(config)
    head_dim = _head_dim(config)
    factor = float(rope["factor"])
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    context = float(rope.get("original_max_position_embeddings") or 8192)
    factors = []
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (exponent / head_dim)
        share = (context / wavelength - low) / (high - low)
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return np.array(factors, dtype=np.float32)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form: transformers 5 has ``rope_parameters``, older files two separate keys."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ArchitectureError(f"rope_parameters in config.json is {given!r}; expected an object")
    rope = dict(given)
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = str(rope["rope_type"]).lower()
    return rope

"""The modules of a decoder layer, by llama.cpp's names and transformers'."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerModule:
    """A module of a decoder layer.

    Attributes:
        role: GGUF name without layer and suffix, such as ``attn_q``.
        name: Name in the source's layer, such as ``self_attn.q_proj``; with ``{}`` for the index of an expert.
        shape: Shape of its weight, in names of :meth:`Decoder.sizes`.
        heads: Name of the number of heads whose rows llama.cpp's rotary layout reorders; empty if it keeps the order.
        bias: Key of ``config.json`` that says whether there is a bias; ``always``; or empty for never.
        is_fixed: Whether it stays in F32 even though it has rows: llama.cpp does not quantise it.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    heads: str = ""
    bias: str = ""
    is_fixed: bool = False


NORMS = (
    LayerModule("attn_norm", "input_layernorm", ("width",)),
    LayerModule("ffn_norm", "post_attention_layernorm", ("width",)),
)
ATTENTION = (
    LayerModule("attn_q", "self_attn.q_proj", ("q_width", "width"), bias="attention_bias"),
    LayerModule("attn_k", "self_attn.k_proj", ("kv_width", "width"), bias="attention_bias"),
    LayerModule("attn_v", "self_attn.v_proj", ("kv_width", "width"), bias="attention_bias"),
    LayerModule("attn_output", "self_attn.o_proj", ("width", "q_width"), bias="attention_bias"),
)
# Llama's own code rotates neighbouring rows, transformers the two halves; llama.cpp's older graphs follow Llama's code
INTERLEAVED_ATTENTION = (
    LayerModule("attn_q", "self_attn.q_proj", ("q_width", "width"), heads="n_heads", bias="attention_bias"),
    LayerModule("attn_k", "self_attn.k_proj", ("kv_width", "width"), heads="n_kv_heads", bias="attention_bias"),
    *ATTENTION[2:],
)
HEAD_NORMS = (
    LayerModule("attn_q_norm", "self_attn.q_norm", ("head_dim",)),
    LayerModule("attn_k_norm", "self_attn.k_norm", ("head_dim",)),
)
FEED_FORWARD = (
    LayerModule("ffn_gate", "mlp.gate_proj", ("n_ff", "width"), bias="mlp_bias"),
    LayerModule("ffn_up", "mlp.up_proj", ("n_ff", "width"), bias="mlp_bias"),
    LayerModule("ffn_down", "mlp.down_proj", ("width", "n_ff"), bias="mlp_bias"),
)
SANDWICH_NORMS = (
    LayerModule("attn_norm", "input_layernorm", ("width",)),
    LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
    LayerModule("ffn_norm", "pre_feedforward_layernorm", ("width",)),
    LayerModule("post_ffw_norm", "post_feedforward_layernorm", ("width",)),
)

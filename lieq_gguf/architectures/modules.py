"""The modules of a decoder layer, by llama.cpp's names and transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

GatesAndUps: TypeAlias = Literal["halves", "in turn", "together"]
"""Rows of gates and ups of stacked experts, see :class:`Decoder`."""


@dataclass(frozen=True)
class LayerModule:
    """A module of a decoder layer.

    Attributes:
        role: GGUF name without layer and suffix, such as ``attn_q``.
        name: Name in the source's layer, such as ``self_attn.q_proj``; with ``{}`` for the index of an expert.
        shape: Shape of its weight, in names of :meth:`Decoder.sizes`.
        rows: Name in :meth:`Decoder.orders` of the order of its rows in the file; empty if they keep their order.
        columns: The same of its columns.
        bias: Key of ``config.json`` that says whether there is a bias; ``always``; or empty for never.
        is_fixed: Whether it stays in F32 even though it has rows: llama.cpp does not quantise it.
        suffixes: What follows the names in the file and in the source; a parameter without a module has none.
        has_own_scale: Whether it is a norm that multiplies by its weight alone where the family's others add one.
        is_negated_exp: Whether the file has ``-exp(w)``.
        stored_shape: Shape of its weight in the source, if that has the same numbers in another shape.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    rows: str = ""
    columns: str = ""
    bias: str = ""
    is_fixed: bool = False
    suffixes: tuple[str, str] = (".weight", ".weight")
    has_own_scale: bool = False
    is_negated_exp: bool = False
    stored_shape: tuple[str, ...] = ()


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
    LayerModule("attn_q", "self_attn.q_proj", ("q_width", "width"), rows="rotated_queries", bias="attention_bias"),
    LayerModule("attn_k", "self_attn.k_proj", ("kv_width", "width"), rows="rotated_keys", bias="attention_bias"),
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
EXPERTS = (
    LayerModule("ffn_gate_inp", "mlp.gate", ("n_experts", "width"), is_fixed=True),
    LayerModule("ffn_gate_exps", "mlp.experts.{}.gate_proj", ("n_experts", "n_expert_ff", "width")),
    LayerModule("ffn_up_exps", "mlp.experts.{}.up_proj", ("n_experts", "n_expert_ff", "width")),
    LayerModule("ffn_down_exps", "mlp.experts.{}.down_proj", ("n_experts", "width", "n_expert_ff")),
)
SANDWICH_NORMS = (
    LayerModule("attn_norm", "input_layernorm", ("width",)),
    LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
    LayerModule("ffn_norm", "pre_feedforward_layernorm", ("width",)),
    LayerModule("post_ffw_norm", "post_feedforward_layernorm", ("width",)),
)

"""Shapes and decode costs of models that are nowhere on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lieq_gguf.allocation.decode_costs import DecodeCosts
from lieq_gguf.records.spec import ModelSpec, TensorSpec

COSTS = DecodeCosts(
    "a test", "made up",
    {"Q2_K": 25, "Q3_K": 40, "Q4_K": 28, "Q5_K": 33, "Q6_K": 40, "Q8_0": 45, "IQ2_XXS": 55, "IQ3_XXS": 60},
)  # fmt: skip


def make_spec(n_layers: int, width: int = 256, n_ff: int = 512, n_kv: int = 128, tied: bool = True) -> ModelSpec:
    """A Llama's tensors, without a model behind them."""
    shapes = {
        "attn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (n_kv, width),
        "attn_v": (n_kv, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_gate": (n_ff, width),
        "ffn_up": (n_ff, width),
        "ffn_down": (width, n_ff),
    }
    return spec_of([shapes] * n_layers, width, tied)


def spec_of(layers: Sequence[Mapping[str, tuple[int, ...]]], width: int = 256, tied: bool = True) -> ModelSpec:
    tensors = [TensorSpec("token_embd.weight", "e", (1000, width))]
    for layer, shapes in enumerate(layers):
        tensors += [TensorSpec(f"blk.{layer}.{role}.weight", role, shape, layer) for role, shape in shapes.items()]
    tensors.append(TensorSpec("output_norm.weight", "n", (width,)))
    if not tied:
        tensors.append(TensorSpec("output.weight", "o", (1000, width)))
    return ModelSpec("synthetic", "llama", {}, len(layers), tuple(tensors), tied)

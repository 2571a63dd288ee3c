"""Every supported family as a tiny real model: random weights in the files that transformers writes for it.

This list is what ``docs/models.md`` is made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support import tokenizer_fixtures as fixtures

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 16.0, "original_max_position_embeddings": 64}
PHI_3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 40 for i in range(32)],
    "long_factor": [1.5 + i / 8 for i in range(32)],
}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GRANITE_4 = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "position_embedding_type": "nope",
    "shared_intermediate_size": 512,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.02,
    "residual_multiplier": 0.3,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
FALCON_H1 = {
    "head_dim": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_ssm": 256,
    "mamba_d_state": 64,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.6,
    "embedding_multiplier": 5.65,
    "key_multiplier": 0.4,
    "lm_head_multiplier": 0.04,
    "mlp_multipliers": [0.9, 0.6],
    "ssm_in_multiplier": 1.2,
    "ssm_multipliers": [0.4, 0.5, 0.35, 0.7, 0.3],
    "ssm_out_multiplier": 0.5,
    "tie_word_embeddings": False,
}
NEMOTRON_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
    "routed_scaling_factor": 2.5,
}
NEMOTRON = NEMOTRON_EXPERTS | {
    "head_dim": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 64,
}
# transformers writes the numbers of experts whether there are any or not, and a list of layers
NEMOTRON_PUBLISHED = dict.fromkeys(
    [*NEMOTRON_EXPERTS, "layers_block_type", "n_shared_experts", "n_group", "topk_group"]
)


def in_eights(write_tokenizer: Callable[[Path], int]) -> Callable[[Path], int]:
    """A tokenizer with a vocabulary in eights, as llama.cpp's converter wants it beside Mamba-2 layers."""
    return lambda path: -(-write_tokenizer(path) // 8) * 8


@dataclass(frozen=True)
class TinyModel:
    """A model to write.

    Attributes:
        family: llama.cpp's name of the architecture.
        model_type: transformers' name of it.
        stands_for: Models of this structure, for people.
        write_tokenizer: Writes the tokenizer's files and gives the size of the vocabulary.
        settings: What differs from ``SIZES``.
        converter_options: What llama.cpp's converter has to be told.
        without_defaults: Whether the converter may not see what transformers' configuration has by default.
        published: Keys of ``config.json`` as in published files, where transformers writes others; None removes one.
    """

    family: str
    model_type: str
    stands_for: str
    write_tokenizer: Callable[[Path], int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    converter_options: tuple[str, ...] = ()
    without_defaults: bool = False
    published: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
        """Write the model directory; ``settings`` overrules."""
        path.mkdir(parents=True, exist_ok=True)
        n_vocab = self.write_tokenizer(path)
        config = AutoConfig.for_model(
            self.model_type, **({"vocab_size": n_vocab} | SIZES | dict(self.settings) | settings)
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # as trained ones, whether the family multiplies by the weight or by one more
                if name.endswith("norm.weight"):
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
                elif name.endswith(".bias"):
                    parameter.normal_(0, 0.5)
                elif name.endswith((".D", ".dt_bias")):  # which begin as ones
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.5))
            for name, buffer in model.named_buffers():
                if name.endswith(("e_score_correction_bias", "expert_bias")):
                    buffer.normal_(0, 0.1)
        model.save_pretrained(path)
        if self.published:
            edit_config(path, **self.published)
        return path


TINY_MODELS: Mapping[str, TinyModel] = {
    "llama": TinyModel("llama", "llama", "Llama 2, TinyLlama", fixtures.write_llama_2, {"tie_word_embeddings": False}),
    "llama3": TinyModel(
        "llama", "llama", "Llama 3.1, Llama 3.2", fixtures.write_llama_3,
        {"rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True},
    ),
    "smollm2": TinyModel("llama", "llama", "SmolLM2", fixtures.write_smollm2, {"tie_word_embeddings": True}),
    "mistral": TinyModel(
        "llama", "mistral", "Mistral Nemo, Ministral", fixtures.write_tekken, {"head_dim": 128, "sliding_window": None}
    ),
    "qwen2": TinyModel("qwen2", "qwen2", "Qwen2, Qwen2.5", fixtures.write_qwen2, {"tie_word_embeddings": True}),
    "qwen3": TinyModel(
        "qwen3", "qwen3", "Qwen3", fixtures.write_qwen3, {"head_dim": 128, "tie_word_embeddings": True}
    ),
    "qwen3moe": TinyModel(
        "qwen3moe", "qwen3_moe", "Qwen3-30B-A3B", fixtures.write_qwen3,
        {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
            "head_dim": 64,
        },
    ),
    "gemma2": TinyModel(
        "gemma2", "gemma2", "Gemma 2", fixtures.write_gemma,
        {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 32},
    ),
    "gemma3": TinyModel(
        "gemma3", "gemma3_text", "Gemma 3 (text)", fixtures.write_gemma,
        {"num_hidden_layers": 7, "head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 32},
    ),
    "phi3": TinyModel("phi3", "phi3", "Phi-3", fixtures.write_phi_3, {"sliding_window": 2047}),
    "phi3-long": TinyModel(
        "phi3", "phi3", "Phi-3.5", fixtures.write_phi_3,
        {"rope_parameters": PHI_3_ROPE, "original_max_position_embeddings": 256},
    ),
    "phi4-mini": TinyModel(
        "phi3", "phi3", "Phi-4-mini", fixtures.write_phi_4_mini,
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": PHI_3_ROPE | {
                "partial_rotary_factor": 0.75, "short_factor": [1.0] * 24, "long_factor": [1.25] * 24
            },
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": TinyModel("smollm3", "smollm3", "SmolLM3", fixtures.write_smollm3, {"num_hidden_layers": 5}),
    "olmo2": TinyModel("olmo2", "olmo2", "OLMo 2", fixtures.write_olmo2),
    "olmo3": TinyModel(
        "olmo2", "olmo3", "Olmo 3", fixtures.write_olmo2,
        {
            "num_hidden_layers": 5,
            "sliding_window": 32,
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": YARN_ROPE["rope_theta"]},
            },
        },
    ),
    "lfm2": TinyModel(
        "lfm2", "lfm2", "LFM2, LFM2.5", fixtures.write_llama_3,
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    ),
    "lfm2moe": TinyModel(
        "lfm2moe", "lfm2_moe", "LFM2-8B-A1B", fixtures.write_llama_3,
        {
            "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        },
    ),
    "qwen35": TinyModel(
        "qwen35", "qwen3_5_text", "Qwen3.5", fixtures.write_qwen3,
        {
            "num_hidden_layers": 4, "head_dim": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": True,
        },
        converter_options=("--no-mtp",),
    ),
    "qwen35moe": TinyModel(
        "qwen35moe", "qwen3_5_moe_text", "Qwen3.5-35B-A3B", fixtures.write_qwen3,
        {
            "num_hidden_layers": 4, "head_dim": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
        },
        converter_options=("--no-mtp",),
        published={"intermediate_size": None},
    ),
    "granite": TinyModel(
        "granite", "granite", "Granite 3", fixtures.write_granite,
        {
            "embedding_multiplier": 12.0, "attention_multiplier": 0.02, "residual_multiplier": 0.3,
            "logits_scaling": 8.0, "tie_word_embeddings": True,
        },
    ),
    "granite-h": TinyModel(
        "granitehybrid", "granitemoehybrid", "Granite 4 H-Micro, H-350M, H-1B", in_eights(fixtures.write_granite),
        GRANITE_4 | {"num_local_experts": 0, "num_experts_per_tok": 0},
        published={"layer_types": ["mamba", "attention", "mamba"]},
    ),
    "granite-h-moe": TinyModel(
        "granitehybrid", "granitemoehybrid", "Granite 4 H-Tiny, H-Small", in_eights(fixtures.write_granite),
        GRANITE_4 | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256},
        published={"layer_types": ["mamba", "attention", "mamba"]},
    ),
    "granite-4": TinyModel(
        "granite", "granitemoehybrid", "Granite 4 Micro, 350M, 1B", in_eights(fixtures.write_granite),
        GRANITE_4 | {
            "layer_types": ["full_attention"] * 3, "num_local_experts": 0, "num_experts_per_tok": 0,
            "position_embedding_type": "rope",
        },
        published={"layer_types": ["attention"] * 3},
    ),
    "falcon-h1": TinyModel(
        "falcon-h1", "falcon_h1", "Falcon-H1 0.5B to 7B", fixtures.write_llama_3, FALCON_H1 | {"mamba_rms_norm": False}
    ),
    "falcon-h1-34b": TinyModel(
        "falcon-h1", "falcon_h1", "Falcon-H1 34B", fixtures.write_llama_3,
        FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
    ),
    "nemotron-h": TinyModel(
        "nemotron_h", "nemotron_h", "Nemotron-H, Nemotron Nano 2", in_eights(fixtures.write_tekken),
        NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        published=NEMOTRON_PUBLISHED | {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4},
        without_defaults=True,  # which has experts, and the converter then takes the graph with experts
    ),
    "nemotron-3": TinyModel(
        "nemotron_h_moe", "nemotron_h", "Nemotron 3 Nano", in_eights(fixtures.write_tekken),
        NEMOTRON | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
        published=NEMOTRON_PUBLISHED | NEMOTRON_EXPERTS | {
            "hybrid_override_pattern": "ME*E", "norm_eps": 1e-5, "rope_theta": 10000,
        },
    ),
    "nemotron-3-super": TinyModel(
        "nemotron_h_moe", "nemotron_h", "Nemotron 3 Super", in_eights(fixtures.write_tekken),
        NEMOTRON | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 256,
            "hidden_size": 512, "n_group": 2,
        },
        published=NEMOTRON_PUBLISHED | NEMOTRON_EXPERTS | {"hybrid_override_pattern": "ME*E", "n_group": 2},
    ),
}  # fmt: skip


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a model's ``config.json``; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")

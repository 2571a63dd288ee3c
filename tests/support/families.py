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
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
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


NORMS = ("norm.weight", "layernorm_1.weight", "layernorm_2.weight")


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
        head_norms: Weights of the norms of queries and keys; random heads of width one attend to single tokens, which
            magnifies rounding.
    """

    family: str
    model_type: str
    stands_for: str
    write_tokenizer: Callable[[Path], int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    converter_options: tuple[str, ...] = ()
    without_defaults: bool = False
    published: Mapping[str, Any] = field(default_factory=dict)
    head_norms: float = 1.0

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any("expert" in key and value for key, value in self.settings.items())

    def write(self, path: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
        """Write the model directory; ``settings`` overrules."""
        path.mkdir(parents=True, exist_ok=True)
        n_vocab = self.write_tokenizer(path)
        sizes = {"vocab_size": n_vocab, "vocab_size_per_layer_input": n_vocab}
        config = AutoConfig.for_model(self.model_type, **(sizes | SIZES | dict(self.settings) | settings))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # as trained ones, whether the family multiplies by the weight or by one more
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.mul_(self.head_norms)
                if name.endswith((*NORMS, ".alpha_p", ".alpha_n", "router.scale", "per_expert_scale")):
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
                elif name.endswith((".bias", "_proj_bias", ".sinks")):
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
        "lfm2", "lfm2", "LFM2, LFM2.5", fixtures.write_lfm2,
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    ),
    "lfm2moe": TinyModel(
        "lfm2moe", "lfm2_moe", "LFM2-8B-A1B", fixtures.write_lfm2,
        {
            "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        },
    ),
    "qwen35": TinyModel(
        "qwen35", "qwen3_5_text", "Qwen3.5", fixtures.write_qwen3_5,
        {
            "num_hidden_layers": 4, "head_dim": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": True,
        },
        converter_options=("--no-mtp",),
    ),
    "qwen35moe": TinyModel(
        "qwen35moe", "qwen3_5_moe_text", "Qwen3.5-35B-A3B", fixtures.write_qwen3_5,
        {
            "num_hidden_layers": 4, "head_dim": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
        },
        converter_options=("--no-mtp",),
        published={"intermediate_size": None},
    ),
    "ministral3": TinyModel(
        "mistral3", "ministral3", "Ministral 3", fixtures.write_ministral_3,
        {
            "head_dim": 128, "tie_word_embeddings": True,
            "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    ),
    "gemma4": TinyModel(
        "gemma4", "gemma4_text", "Gemma 4 E2B, E4B", fixtures.write_gemma_4,
        {
            "num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "head_dim": 64, "global_head_dim": 128, "num_kv_shared_layers": 3, "sliding_window": 32,
            "hidden_size_per_layer_input": 256, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
            "pad_token_id": 0,
        },
        head_norms=1 / 3,
    ),
    "gemma4-moe": TinyModel(
        "gemma4", "gemma4_text", "Gemma 4 26B-A4B", fixtures.write_gemma_4,
        {
            "num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "head_dim": 64, "global_head_dim": 128, "sliding_window": 32, "attention_k_eq_v": True,
            "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
            "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 256,
            "pad_token_id": 0,
        },
        head_norms=1 / 3,
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
    "exaone4-32b": TinyModel(  # at 64 layers the graph has windows
        "exaone4", "exaone4", "EXAONE 4 32B", fixtures.write_exaone_4,
        {"num_hidden_layers": 64, "intermediate_size": 256, "sliding_window": 32},
    ),
    "exaone4": TinyModel(
        "exaone4", "exaone4", "EXAONE 4 1.2B", fixtures.write_exaone_4,
        {
            "sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA_3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "ernie4_5": TinyModel(
        "ernie4_5", "ernie4_5", "ERNIE 4.5 (dense)", fixtures.write_ernie_4_5, {"head_dim": 128}
    ),
    "arcee": TinyModel("arcee", "arcee", "AFM 4.5B", fixtures.write_smollm2, {"rope_parameters": YARN_ROPE}),
    "seed-oss": TinyModel("seed_oss", "seed_oss", "Seed-OSS", fixtures.write_seed_oss, {"head_dim": 128}),
    "hunyuan": TinyModel(
        "hunyuan-dense", "hunyuan_v1_dense", "Hunyuan without long contexts", fixtures.write_hunyuan_dense,
        {"head_dim": 64, "eod_token_id": None},
    ),
    "hunyuan-long": TinyModel(
        "hunyuan-dense", "hunyuan_v1_dense", "Hunyuan 0.5B to 7B", fixtures.write_hunyuan_dense,
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
            "head_dim": 128, "max_position_embeddings": 32768, "eod_token_id": None, "tie_word_embeddings": True,
        },
    ),
    "glm4": TinyModel("glm4", "glm4", "GLM-4-0414", fixtures.write_glm_4, {"head_dim": 128}),
    "glm": TinyModel(
        "chatglm", "glm", "GLM-4-9B, GLM-Edge", fixtures.write_glm_4,
        {
            "head_dim": 64, "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
    ),
    "apertus": TinyModel("apertus", "apertus", "Apertus", fixtures.write_apertus),
    "granite_swa": TinyModel(
        "granite_swa", "granite_swa", "Granite with windows", fixtures.write_granite,
        {
            "num_hidden_layers": 4, "sliding_window": 32, "embedding_multiplier": 12.0, "attention_multiplier": 0.02,
            "residual_multiplier": 0.3, "logits_scaling": 8.0, "layer_rope_theta": [0, 10000.0, 10000.0, 0],
            "no_rope_layers": [0, 1, 1, 0],  # which llama.cpp's converter reads
        },
    ),
    "gpt-oss": TinyModel(
        "gpt-oss", "gpt_oss", "gpt-oss 20B, 120B", fixtures.write_gpt_oss,
        {
            "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256,
            "sliding_window": 32, "max_position_embeddings": 131072, "rope_parameters": GPT_OSS_ROPE,
        },
    ),
    "minicpm3": TinyModel(
        "minicpm3", "minicpm3", "MiniCPM3-4B", fixtures.write_llama_2,
        {
            "hidden_size": 512, "q_lora_rank": 256, "kv_lora_rank": 256, "num_key_value_heads": 4,
            "rope_parameters": PHI_3_ROPE | {"short_factor": [1.0 + i / 20 for i in range(16)],
                                             "long_factor": [1.5 + i / 4 for i in range(16)]},
        },
    ),
}  # fmt: skip

_OLDER_FORM = "the converter reads the keys of an older form of config.json"
_ORDINARY = "added tokens without a role are ordinary for the converter"
ON_PURPOSE = {
    "granite-4": {"tokenizer.ggml.add_space_prefix": "the architecture has it; no blank is added either way"},
    "gemma4": {"tokenizer.ggml.token_type": _ORDINARY},
    "gemma4-moe": {"tokenizer.ggml.token_type": _ORDINARY},
    "glm": {
        "chatglm.context_length": _OLDER_FORM,
        "chatglm.attention.layer_norm_rms_epsilon": _OLDER_FORM,
        "chatglm.rope.freq_base": _OLDER_FORM,
        "chatglm.attention.key_length": "the usual width, which the converter leaves out",
        "chatglm.attention.value_length": "the usual width, which the converter leaves out",
        "tokenizer.ggml.add_bos_token": "llama.cpp's default, which is left out",
    },
}
"""Model to keys of metadata in which its file differs from the converter's, and why."""


TEXT_PARTS: Mapping[str, TinyModel] = {
    "qwen3vl": TinyModel(
        "qwen3vl", "qwen3_vl_text", "Qwen3-VL", fixtures.write_qwen3,
        {
            "head_dim": 128, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
    ),
}  # fmt: skip
"""Families that transformers has only inside a model of images."""


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a model's ``config.json``; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    removed = {key for key, value in changes.items() if value is None}
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in removed}), encoding="utf-8")

"""Every family: the streamed pass and the file are transformers' model, and llama.cpp's converter makes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from support import converter
from support.families import GPT_OSS_ROPE, ON_PURPOSE, SIZES, TEXT_PARTS, TINY_MODELS, edit_config
from support.reports import edit_weights
from support.requests import convert_plainly, on_text, request_of
from support.shared import made_once
from support.tolerances import (
    DEEP_F16_LOGITS,
    F16_LOGITS,
    FLOAT32_LOGITS,
    MIXTURE_LOGITS,
    MIXTURE_SHARE,
    assert_logits_close,
)
from transformers import AutoConfig, AutoModelForCausalLM

from lieq_gguf import pipeline
from lieq_gguf.architectures import FAMILIES, Decoder, family_named
from lieq_gguf.errors import ArchitectureError, LieqError, SourceError
from lieq_gguf.evaluation.inspection import inspect
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.measure.base_model import with_rounded_yarn, without_time_limits
from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.passes import PassOptions
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.measurement import measured
from lieq_gguf.sources.model_directory import ModelDirectory

N_TOKENS = 128  # more than the windows of the tiny models
# llama.cpp's converter gives them any length
WITHOUT_POSITIONS = ("granite-h", "granite-h-moe", "nemotron-h", "nemotron-3", "nemotron-3-super")
ONE_OF_EACH_CLASS = pytest.mark.parametrize(
    "name", {(model.family, model.model_type, model.has_experts): n for n, model in TINY_MODELS.items()}.values()
)
EVERY_MODEL = pytest.mark.parametrize("name", TINY_MODELS)


@dataclass(frozen=True)
class Written:
    """A tiny model, our F16 file of it, and what transformers makes of some tokens."""

    path: Path
    f16_file: Path
    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def written(shared: Path) -> Callable[[str], Written]:
    @cache
    def write(name: str) -> Written:
        def make(folder: Path) -> None:
            convert_plainly(TINY_MODELS[name].write(folder / name), folder / "f16.gguf")

        folder = made_once(shared / "families" / name, make)
        path = folder / name
        config = with_rounded_yarn(AutoConfig.from_pretrained(path))  # as llama.cpp has it
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
        without_time_limits(model)  # which transformers alone has
        n_vocab = model.config.vocab_size
        ids = np.random.default_rng(0).integers(8, n_vocab - 8, (2, N_TOKENS))
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
        return Written(path, folder / "f16.gguf", ids, logits)

    return write


def test_every_family_has_a_model() -> None:
    tiny = {**TINY_MODELS, **TEXT_PARTS}  # test_wrappers.py has the latter
    assert {model.family for model in tiny.values()} == {family.gguf_name for family in FAMILIES}


@EVERY_MODEL
def test_streamed_layers_are_the_whole_model(name: str, written: Callable[[str], Written]) -> None:
    model = written(name)
    source = ModelDirectory(model.path)
    layer = LayerModel(source.transformers_config(), torch.device("cpu"))
    tensors = {t.name: t for t in source.spec.tensors}
    with torch.inference_mode():
        hidden = layer.embed(source, model.ids)
        for index in range(source.spec.n_layers):
            layer.load(source, index)
            hidden = layer.forward(hidden)
        output = tensors.get("output.weight", source.spec.embedding)
        logits = layer.output_head(source, source.read(output)).logits(hidden)
    assert_logits_close(logits.numpy(), model.logits, FLOAT32_LOGITS)


@EVERY_MODEL
def test_f16_file_computes_what_transformers_does(name: str, written: Callable[[str], Written]) -> None:
    model = written(name)
    with open_model(model.f16_file, n_ctx=N_TOKENS, n_threads=2) as loaded:
        found = loaded.logits(model.ids[0].tolist())
    is_mixture = any("_exps" in tensor.spec.name for tensor in GgufFile(model.f16_file).tensors)
    bounds = (MIXTURE_LOGITS, MIXTURE_SHARE) if is_mixture else (F16_LOGITS,)
    assert_logits_close(found, model.logits[0], *((DEEP_F16_LOGITS,) if name == "exaone4-32b" else bounds))


@ONE_OF_EACH_CLASS
def test_every_matrix_is_measured(name: str, written: Callable[[str], Written]) -> None:
    source, tokens = ModelDirectory(written(name).path), CalibrationTokens(written(name).ids, "random")
    result = run_pass(source, tokens, PassOptions(error_types=(QUANT_TYPES["Q2_K"],)))
    for measurement, matrices in zip(result.measurements, source.spec.layer_matrices, strict=True):
        errors, spectra = measured(measurement.block_errors), measured(measurement.spectra)
        assert {role for role, error in errors.items() if error > 0} == {t.role for t in matrices}
        assert spectra.keys() == {t.role for t in matrices if not t.of_experts}
        for tensor in matrices:
            assert float(np.sum(result.importance.in_sum2[tensor.name])) > 0
            assert 0 < result.type_errors[tensor.name]["Q2_K"] < 1


@ONE_OF_EACH_CLASS
def test_conversion_to_few_bits_runs(name: str, written: Callable[[str], Written], tmp_path: Path) -> None:
    file = convert(written(name).path, tmp_path / "small.gguf", 2.7)
    meter = GgufFile(file).bit_meter()
    assert 2.6 < meter.layer_bpw <= 2.7
    with open_model(file, n_ctx=64, n_threads=2) as loaded:
        prompt = loaded.tokenize("The quick brown fox", add_special_tokens=True)
        assert np.isfinite(loaded.logits(prompt)).all()


@EVERY_MODEL
def test_cache_and_bytes_of_a_token_are_those_of_the_model(name: str, written: Callable[[str], Written]) -> None:
    source = ModelDirectory(written(name).path)
    config, found = source.transformers_config(), inspect(written(name).f16_file)
    # values are as wide as keys, of which they can be made
    width = 2 * sum(t.shape[0] for t in source.spec.tensors if t.role == "attn_k" and t.is_matrix)
    if not width:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        of_head = getattr(config, "qk_head_dim", head_dim) + getattr(config, "v_head_dim", head_dim)
        width = config.num_key_value_heads * of_head * config.num_hidden_layers
    n_ctx = 4096 if name in WITHOUT_POSITIONS else min(config.max_position_embeddings, 4096)
    assert (found.n_ctx, found.kv_cache_bytes) == (n_ctx, 2 * width * n_ctx)
    n_experts = next((n for key in ("num_experts", "num_local_experts") if (n := getattr(config, key, 0))), 1)
    n_idle = n_experts - getattr(config, "num_experts_per_tok", getattr(config, "top_k_experts", None) or n_experts)
    sizes = {t.spec.name: t.data.nbytes for t in GgufFile(found.file).tensors}
    idle = sum(size for tensor, size in sizes.items() if "_exps." in tensor) * n_idle // n_experts
    tables = ["per_layer_token_embd.weight", *(["token_embd.weight"] if "output.weight" in sizes else [])]
    assert found.bytes_per_token == sum(sizes.values()) - idle - sum(sizes.get(table, 0) for table in tables)


@pytest.mark.slow
@EVERY_MODEL
def test_same_file_as_llama_cpps_converter(name: str, written: Callable[[str], Written], converted: Path) -> None:
    result = converter.compare_files(written(name).f16_file, converted / f"{name}.gguf")
    on_purpose = ON_PURPOSE.get(name, {})
    assert (result.tensors, {k: words for k, words in result.keys.items() if k not in on_purpose}) == ({}, {})
    assert on_purpose.keys() <= result.keys.keys()
    assert result.n_tensors == len(ModelDirectory(written(name).path).spec.tensors)
    assert result.n_keys > 20


@pytest.fixture(scope="module")
def converted(written: Callable[[str], Written], llama_cpp: Path, shared: Path) -> Path:
    """Folder with what llama.cpp's converter makes of every tiny model."""

    def make(folder: Path) -> None:
        jobs = [
            converter.Job(
                written(n).path,
                written(n).f16_file,
                folder / f"{n}.gguf",
                tiny.converter_options,
                tiny.without_defaults,
            )
            for n, tiny in TINY_MODELS.items()
        ]
        converter.run_converter(jobs, llama_cpp)

    return made_once(shared / "converted", make)


def convert(source: Path, target: Path, bits: float) -> Path:
    return pipeline.convert(request_of(source, bits, target, "Q2_K,Q3_K", on_text(None, 256))).output


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.defaults], ids=lambda f: f.gguf_name)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(family: Decoder) -> None:
    config = AutoConfig.for_model(family.model_type).to_dict()
    assert dict(family.defaults) == {key: config[key] for key in family.defaults}


def test_an_older_configuration_of_lfm2_is_the_same_model(tmp_path: Path) -> None:
    path = TINY_MODELS["lfm2"].write(tmp_path / "lfm2")
    expected = ModelDirectory(path).spec.tensors
    edit_config(
        path, layer_types=None, full_attn_idxs=[2], intermediate_size=None, block_ff_dim=512, tie_word_embeddings=None,
        tie_embedding=True, block_multiple_of=None, conv_bias=None,
    )  # fmt: skip
    assert ModelDirectory(path).spec.tensors == expected
    assert ModelDirectory(path).transformers_config().layer_types == ["conv", "conv", "full_attention", "conv"]


def test_an_attention_factor_that_says_what_is_so_anyway_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = TINY_MODELS["ministral3"].write(tmp_path / "model")
    rope = dict(TINY_MODELS["ministral3"].settings["rope_parameters"]) | {"attention_factor": 1.0}
    edit_config(path, rope_parameters=rope)
    assert ModelDirectory(path).family.gguf_name == "mistral3"


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [1.0] * 32}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama.cpp runs qwen2"),
    "rotary scaling": ("gemma2", {"rope_parameters": LINEAR}, "rope type 'linear' is not supported"),
    "base of rotation": ("gemma2", {"rope_parameters": LINEAR | {"rope_type": "default", "rope_theta": 5.0}}, "is 5.0"),
    "no cap": ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
    "other windows": ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer 0 of 2 .* full_attention"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
    "cap": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "local rotation": (
        "gemma3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": LINEAR}},
        "sliding window have rope type 'linear'",
    ),
    "all windows": ("gemma3", {"layer_types": ["sliding_attention"] * 7}, "layer 5 of 7 .* sliding_attention"),
    "number of factors": ("phi3", {"rope_parameters": LONGROPE}, "short_factor in config.json has 3 numbers"),
    "rotation everywhere": ("smollm3", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
    "windows": ("smollm3", {"use_sliding_window": True}, "use_sliding_window"),
    "two rotations": (
        "olmo3",
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
        "rope_theta 10000.0 and the others 500000.0",
    ),
    "kinds of layers": ("olmo3", {"layer_types": ["full_attention"] * 2}, "has 2 layers, num_hidden_layers is 5"),
    "kind of a layer": ("olmo3", {"layer_types": ["chunked_attention"] * 5}, "has 'chunked_attention'; expected full"),
    "head width": ("granite", {"head_dim": 32}, "head_dim is 32"),
    "windows at two layers": ("exaone4", {"sliding_window": 32}, "sliding_window is 32 at 2 layers"),
    "kinds without windows": (
        "exaone4",
        {"layer_types": ["sliding_attention"] * 2},
        "layer 0 of 2 .* sliding_attention",
    ),
    "kinds of 64 layers": (
        "exaone4-32b",
        {"layer_types": ["full_attention"] * 63},
        "has 63 layers, num_hidden_layers is 64",
    ),
    "no windows at 64 layers": ("exaone4", {"num_hidden_layers": 64}, "sliding_window is null at 64 layers"),
    "heads": ("exaone4", {"head_dim": 32}, "head_dim is 32"),
    "biases": ("ernie4_5", {"use_bias": True}, "use_bias is set, but llama.cpp runs ernie4_5 models without"),
    "biases of Ministral": (
        "ministral3",
        {"attention_bias": True},
        "attention_bias is set, but llama.cpp runs mistral3",
    ),
    "gate": ("arcee", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    "bias of the output": ("seed-oss", {"attention_out_bias": True}, "attention_out_bias is set"),
    "stretched by length": (
        "hunyuan",
        {"rope_parameters": LINEAR | {"rope_type": "dynamic"}},
        "alpha in config.json is None",
    ),
    "rotated share": (
        "glm4",
        {"rope_parameters": {"partial_rotary_factor": 1.5}},
        "192 of 128 dimensions of each head",
    ),
    "glm heads": ("glm", {"head_dim": 32}, "head_dim is 32"),
    "bases of rotation": ("granite_swa", {"layer_rope_theta": [1, 2, 2, 0]}, r"has the bases \[1, 2\]"),
    "rotated layers": ("granite_swa", {"layer_rope_theta": None}, "no_rope_layers .* which transformers does not read"),
    "factor of the embedding": ("minicpm3", {"scale_emb": 10}, "scale_emb is 10"),
    "longer context": ("minicpm3", {"max_position_embeddings": 4096}, "is 1024 and max_position_embeddings 4096"),
    "experts of a token": ("gemma4-moe", {"top_k_experts": 9}, "top_k_experts is 9, more than the 8 experts"),
    "dense layers": ("qwen3moe", {"mlp_only_layers": [0]}, "some layers have no experts"),
    "width of Mamba-2": ("granite-h", {"mamba_expand": 4, "mamba_d_head": 128}, "are 1024 wide, .* hidden_size, 512"),
    "kind of layer": ("granite-h", {"layer_types": ["mamba", "attention", "moe"]}, "layer_types .* 'moe'"),
    "no bias": ("granite-h", {"mamba_conv_bias": False}, "mamba_conv_bias is off"),
    "bias": ("granite-h", {"mamba_proj_bias": True}, "mamba_proj_bias is set"),
    "time steps": ("granite-h", {"time_step_limit": [0.0, 0.1]}, "time_step_limit is 0 to 0.1"),
    "groups": ("granite-h", {"mamba_n_groups": 3}, "mamba_n_heads is 8; expected a multiple of mamba_n_groups, 3"),
    "norm before the gate": ("falcon-h1-34b", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate is set"),
    "width of heads": ("falcon-h1", {"mamba_d_ssm": 512}, "mamba_d_ssm is 512; expected 8 heads of width 32"),
    "bias of a projection": ("falcon-h1", {"projectors_bias": True}, "projectors_bias is set"),
    "number of multipliers": (
        "falcon-h1",
        {"ssm_multipliers": [1.0]},
        r"ssm_multipliers .* is \[1.0\]; expected 5 numbers",
    ),
    "networks beside experts": ("nemotron-3", {"hybrid_override_pattern": "ME*-"}, "has 'mlp'; expected linear_attent"),
    "letter": ("nemotron-h", {"hybrid_override_pattern": "M-*X"}, "has 'X'; expected"),
    "activation of networks": ("nemotron-h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu', .* with 'relu2'"),
    "least time step": ("nemotron-h", {"time_step_limit": [0.01, float("inf")]}, "time_step_limit is 0.01 to inf"),
    "chosen groups": ("nemotron-3", {"n_group": 3}, "8 experts in 3 groups, of which 1 are used"),
    "too many experts": ("nemotron-3-super", {"num_experts_per_tok": 5}, "is 5, more than the 4 experts"),
    "shares as they are": ("lfm2moe", {"norm_topk_prob": False}, "norm_topk_prob is off"),
    "scaled shares": ("lfm2moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    "experts without Mamba-2": (
        "granite-4",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        "experts in a model without Mamba-2",
    ),
    "shares": ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is not set"),
    "limit of gates": ("gpt-oss", {"swiglu_limit": 6.0}, "swiglu_limit is 6.0, but llama.cpp runs gpt-oss .* 7.0"),
    "slope of gates": ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0, but llama.cpp runs gpt-oss .* 1.702"),
    "biases of attention": ("gpt-oss", {"attention_bias": False}, "attention_bias is off"),
    "first layer": ("gpt-oss", {"layer_types": ["full_attention"] * 2}, "layer 0 of 2 .* has full_attention"),
    "range of yarn": ("arcee", {"rope_parameters": GPT_OSS_ROPE}, "truncate off is not supported"),
    "null in yarn": ("arcee", {"rope_parameters": GPT_OSS_ROPE | {"truncate": None}}, "truncate off is not supported"),
    "biases of a convolution": ("lfm2", {"conv_bias": True}, "conv_bias is set"),
    "width of all heads": ("lfm2", {"head_dim": 32}, "4 heads of width 32 are not as wide"),
    "kinds of hybrid layers": (
        "lfm2",
        {"layer_types": ["conv", "mamba"] * 2},
        "layer_types in config.json has 'mamba'",
    ),
    "number of layers": ("qwen35", {"layer_types": ["full_attention"]}, "has 1 layers, num_hidden_layers is 4"),
    "two widths": ("qwen35", {"linear_value_head_dim": 32}, "linear_key_head_dim is 64 and linear_value_head_dim 32"),
    "values by key": ("qwen35", {"linear_num_value_heads": 5}, "expected a multiple of linear_num_key_heads, 2"),
    "no gate": ("qwen35", {"attn_output_gate": False}, "attn_output_gate is off"),
    "growth without yarn": (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta is set with rope type 'default'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_graph_does_not_compute(case: str, tmp_path: Path) -> None:
    name, change, words = REFUSED[case]
    path = TINY_MODELS[name].write(tmp_path / name)
    edit_config(path, **change)
    with pytest.raises(ArchitectureError, match=words):
        ModelDirectory(path)


DAMAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "no experts used": ("qwen3moe", {"num_experts_per_tok": 0}),
    "more used than there are": ("qwen3moe", {"num_experts_per_tok": 9}),
    "no number of experts": ("gemma4-moe", {"num_experts": None}),
    "width of experts": ("qwen3moe", {"moe_intermediate_size": "x"}),
    "kinds of layers": ("gemma2", {"layer_types": 5}),
    "cap": ("gemma2", {"attn_logit_softcapping": "x"}),
    "window": ("gemma2", {"sliding_window": "x"}),
    "scale": ("granite", {"logits_scaling": "x"}),
    "rotation": ("olmo3", {"rope_parameters": {"full_attention": 5}}),
    "factors": ("phi3-long", {"rope_parameters": {"rope_type": "longrope", "short_factor": 5, "long_factor": 5}}),
    "share": ("glm4", {"rope_parameters": {"partial_rotary_factor": "half"}}),
    "bases": ("granite_swa", {"layer_rope_theta": 5}),
    "no rotation": ("smollm3", {"no_rope_layers": 5}),
    "layers of Mamba-2": ("granite-h", {"layer_types": 5}),
    "number of layers": ("granite-h", {"layer_types": None, "num_hidden_layers": "x"}),
    "time steps": ("granite-h", {"time_step_limit": [0.0, "x"]}),
    "no pattern": ("nemotron-h", {"hybrid_override_pattern": None}),
    "pattern": ("nemotron-h", {"hybrid_override_pattern": 5}),
    "latent width": ("nemotron-3-super", {"moe_latent_size": "x"}),
    "dense layers": ("lfm2moe", {"num_dense_layers": "x"}),
    "no window": ("gpt-oss", {"sliding_window": 0}),
    "more experts used": ("gpt-oss", {"num_experts_per_tok": 9}),
    "width of stacked experts": ("gpt-oss", {"intermediate_size": 128}),
    "factor": ("falcon-h1", {"key_multiplier": "x"}),
    "factors of Mamba-2": ("falcon-h1", {"ssm_multipliers": "x"}),
    "number of experts": ("granite-h-moe", {"num_local_experts": None, "num_experts_per_tok": 9}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_configuration_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, change = DAMAGED[case]
    path = TINY_MODELS[name].write(tmp_path / name)
    edit_config(path, **change)
    with pytest.raises(LieqError) as refusal:
        ModelDirectory(path)
    assert "\n" not in str(refusal.value)


def test_one_matrix_with_two_factors_is_refused(tmp_path: Path) -> None:
    path = TINY_MODELS["falcon-h1"].write(tmp_path / "falcon", tie_word_embeddings=True)
    with pytest.raises(ArchitectureError, match=r"embedding_multiplier is 5\.65 and lm_head_multiplier 0\.04"):
        ModelDirectory(path)


def test_a_bias_that_is_missing_is_refused_from_the_headers(tmp_path: Path) -> None:
    path = TINY_MODELS["smollm2"].write(tmp_path / "smollm2")
    edit_config(path, attention_bias=True)
    with pytest.raises(SourceError, match=r"has no tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        ModelDirectory(path)


@pytest.mark.parametrize(
    ("beta", "words"),
    [
        (None, r"has no tensor model\.layers\.1\.mlp\.act_fn\.beta"),
        (torch.ones(2), r"beta in .* has shape \(2,\); by config\.json expected \(1,\)"),
    ],
)
def test_numbers_for_the_header_that_are_missing_are_refused(
    beta: torch.Tensor | None, words: str, tmp_path: Path
) -> None:
    path = TINY_MODELS["apertus"].write(tmp_path / "apertus")

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.mlp.act_fn.beta"]
        if beta is not None:
            weights["model.layers.1.mlp.act_fn.beta"] = beta

    edit_weights(change)(path)
    with pytest.raises(SourceError, match=words):
        ModelDirectory(path)


@pytest.mark.parametrize(
    ("name", "change", "is_warned_of"),
    [
        ("mistral", {"sliding_window": 512}, True),
        ("mistral", {"sliding_window": 4096}, False),
        ("phi3", {"sliding_window": 512}, True),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": False}, False),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True}, True),
        ("gemma2", {}, False),
        ("olmo3", {}, False),
    ],
)
def test_windows_that_llama_cpp_does_not_compute_are_warned_of(
    name: str, change: dict[str, Any], is_warned_of: bool, tmp_path: Path
) -> None:
    path = TINY_MODELS[name].write(tmp_path / name)
    edit_config(path, **change)
    assert any("look back" in warning for warning in ModelDirectory(path).warnings) == is_warned_of


def test_the_range_of_yarn_that_llama_cpp_rounds_is_warned_of(tmp_path: Path) -> None:
    path = TINY_MODELS["gpt-oss"].write(tmp_path / "model")
    assert any("between dimensions 8.09 and 17.40 of a head" in text for text in ModelDirectory(path).warnings)
    edit_config(path, rope_parameters=GPT_OSS_ROPE | {"truncate": True})
    assert ModelDirectory(path).warnings == ()


@pytest.mark.parametrize(("name", "kind"), [("granite-h", "rope"), ("granite-4", "nope")])
def test_rotation_of_granite_4_is_that_of_its_configuration(name: str, kind: str, tmp_path: Path) -> None:
    """The proof of equality compares what both compute. llama.cpp's converter looks at the kinds of layers alone."""
    path = TINY_MODELS[name].write(tmp_path / name, position_embedding_type=kind)
    [rotates] = [v for k, v in keys(convert_plainly(path, tmp_path / "f16.gguf")).items() if k.endswith("finetuned")]
    assert rotates == (kind == "rope")


GEMMA_3_BEFORE = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def test_older_configuration_of_gemma_3_is_the_same_model(tmp_path: Path) -> None:
    new = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
           "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    path = TINY_MODELS["gemma3"].write(tmp_path / "gemma3", rope_parameters=new)
    expected = keys(convert_plainly(path, tmp_path / "new.gguf"))
    edit_config(path, rope_parameters=None, layer_types=None, sliding_window_pattern=6, **GEMMA_3_BEFORE)
    assert keys(convert_plainly(path, tmp_path / "old.gguf")) == expected
    assert expected["gemma3.rope.scaling.factor"] == 8.0


_ARCHITECTURES = tuple(f"{family.gguf_name}." for family in FAMILIES)


def keys(file: Path) -> dict[str, Any]:
    """The hyper-parameters in a file."""
    return {name: f.contents() for name, f in gguf.GGUFReader(file).fields.items() if name.startswith(_ARCHITECTURES)}


ROPE_KEYS: dict[str, dict[str, Any]] = {
    "none": {},
    "version 4": {"rope_theta": 3e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "version 5": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}},
    "base beside": {"rope_theta": 2e5, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}},
    "base outside": {"rope_theta": 2e5, "rope_parameters": {"rope_type": "default"}},
    "both": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e5},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "both, base outside": {
        "rope_theta": 2e5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e5},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}
OF_ONE_KIND = (
    "llama", "qwen3", "granite", "smollm3", "olmo2", "exaone4", "ernie4_5", "arcee", "seed-oss", "hunyuan", "glm4",
    "apertus", "gpt-oss",
)  # fmt: skip
OF_KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "version 4": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "version 4, local": {"rope_theta": 1e6, "rope_local_base_freq": 2e4},
    "version 5": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    },
    "both": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "for one kind": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 123.0}},
}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, keys) for name in OF_ONE_KIND for keys in ROPE_KEYS.values()),
        *((name, keys) for name in ("gemma3", "olmo3") for keys in OF_KINDS.values()),
    ],
)
def test_rotary_keys_mean_what_they_mean_to_transformers(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    config = SIZES | {"vocab_size": 100} | {k: v for k, v in tiny.settings.items() if k != "rope_parameters"} | keys
    (tmp_path / "config.json").write_text(json.dumps({"model_type": tiny.model_type} | config))
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    family = family_named(tiny.family)
    assert family is not None
    for kind in ("full_attention", "sliding_attention"):
        expected = read.get(kind, read)
        found = family.rope(config, kind)
        for key in ("rope_type", "rope_theta", "factor", "partial_rotary_factor"):
            assert found.get(key) == expected.get(key), (kind, key)


@pytest.mark.parametrize("head_dim", [{}, {"head_dim": None}, {"head_dim": 32}])
@pytest.mark.parametrize("name", ["llama", "ernie4_5", "seed-oss"])
def test_head_dim_means_what_it_means_to_transformers(name: str, head_dim: dict[str, Any], tmp_path: Path) -> None:
    """A missing one can be the family's usual width where one that is null is the model's width over the heads."""
    model_type = TINY_MODELS[name].model_type
    config = {key: value for key, value in SIZES.items() if key != "pad_token_id"} | head_dim
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    [family] = [family for family in FAMILIES if family.model_type == model_type]
    assert family.head_dim(config) == AutoConfig.from_pretrained(tmp_path).head_dim

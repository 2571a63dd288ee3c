"""LoRA adapters against the formulas of PEFT, written out here on whole matrices, and against PEFT."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import RunCli
from support.models import write_model
from support.requests import convert_plainly
from support.tolerances import FLOAT32_SUMS
from transformers import AutoModelForCausalLM

from lieq_gguf.errors import SourceError
from lieq_gguf.measure.cache import passes_folder
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.sources.adapter import LoraAdapter, load_adapter
from lieq_gguf.sources.model_directory import ModelDirectory

PREFIX = "base_model.model."
RANK, ALPHA = 4, 8
LINEAR = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}
MODULES = {f"model.layers.{layer}.{name}": shape for layer in range(3) for name, shape in LINEAR.items()}
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def config(**changes: Any) -> dict[str, Any]:
    """``adapter_config.json`` with all that PEFT writes into it by default."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/untied",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "layer_replication": None,
        "inference_mode": True,
        **changes,
    }


def eighths(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small multiples of 1/8, whose products and sums float32 holds exactly: no order of adding them differs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator) / 8


def pair(module: str, rank: int = RANK, seed: int = 0) -> Tensors:
    """A and B of a linear module."""
    n_out, n_in = MODULES[module]
    return {
        f"{PREFIX}{module}.lora_A.weight": eighths(rank, n_in, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": eighths(n_out, rank, seed=seed + 1),
    }


def all_pairs() -> Tensors:
    return {key: value for seed, module in enumerate(MODULES) for key, value in pair(module, seed=2 * seed).items()}


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config(**changes)), encoding="utf-8")
    save_file(dict(tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in BF16 with an output matrix of its own and biases; read-only."""
    path = tmp_path_factory.mktemp("models") / "untied"
    return write_model(path, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)


def read_all(source: ModelDirectory) -> Tensors:
    return {str(t.source_name): source.read(t) for t in source.spec.tensors}


def assert_merged(base: Path, adapter: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """The named tensors are the expected ones, in float32 if they are sums; the others are the base's, as stored."""
    stored, found = load_file(base / "model.safetensors"), read_all(ModelDirectory(base, adapter))
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        wanted = expected.get(name, stored[name])
        assert tensor.dtype == wanted.dtype
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
        assert (name in expected) != torch.equal(tensor.to(stored[name].dtype), stored[name])


def weight(base: Path, module: str) -> torch.Tensor:
    return load_file(base / "model.safetensors")[f"{module}.weight"].float()


# What is merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_product_is_added_in_float32(untied: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {key: value.to(dtype) for key, value in all_pairs().items()}
    expected = {}
    for seed, (module, (n_out, n_in)) in enumerate(MODULES.items()):
        a, b = eighths(RANK, n_in, seed=2 * seed), eighths(n_out, RANK, seed=2 * seed + 1)
        expected[f"{module}.weight"] = weight(untied, module) + ALPHA / RANK * (b @ a)
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors), expected)


@pytest.mark.parametrize(("prefix", "infix"), [("", ""), (PREFIX, ".default"), ("", ".my_lora")])
def test_names_without_prefix_and_with_the_name_of_an_adapter(
    untied: Path, tmp_path: Path, prefix: str, infix: str
) -> None:
    a, b = eighths(RANK, 256), eighths(256, RANK, seed=1)
    tensors = {f"{prefix}{Q_PROJ}.lora_A{infix}.weight": a, f"{prefix}{Q_PROJ}.lora_B{infix}.weight": b}
    expected = {f"{Q_PROJ}.weight": weight(untied, Q_PROJ) + 2 * (b @ a)}
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors), expected)


def test_rank_stabilised_scale(untied: Path, tmp_path: Path) -> None:
    tensors = pair(Q_PROJ, rank=8)
    product = tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"] @ tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"]
    expected = {f"{Q_PROJ}.weight": weight(untied, Q_PROJ) + ALPHA / math.sqrt(8) * product}
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors, r=8, use_rslora=True), expected)


@pytest.mark.parametrize(
    ("ranks", "alphas", "rank", "alpha"),
    [
        ({"q_proj": 2}, {}, 2, ALPHA),  # the end of a module's name
        ({"self_attn.q_proj": 2}, {"layers.0.self_attn.q_proj": 16}, 2, 16),
        ({r"^model\.layers\.0\..*": 2}, {".*": 1}, 2, 1),  # an expression for all of it
        ({"q_proj": 2, Q_PROJ: 3}, {"q_proj": 4, "self_attn.q_proj": 1}, 2, 4),  # the first that matches
        ({"proj": 2, "layers.0": 3, "_proj": 5}, {"up_proj": 1}, RANK, ALPHA),  # no end at a point, no match
        ({"k_proj|q_proj": 2}, None, 2, ALPHA),
    ],
)
def test_ranks_and_alphas_by_module(
    untied: Path, tmp_path: Path, ranks: dict[str, int], alphas: dict[str, int] | None, rank: int, alpha: int
) -> None:
    tensors = pair(Q_PROJ, rank=rank)
    product = tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"] @ tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"]
    expected = {f"{Q_PROJ}.weight": weight(untied, Q_PROJ) + alpha / rank * product}
    adapter = write_adapter(tmp_path / "lora", tensors, rank_pattern=ranks, alpha_pattern=alphas)
    assert_merged(untied, adapter, expected)


def test_embedding_and_output(untied: Path, tmp_path: Path) -> None:
    n_vocab = len(weight(untied, "lm_head"))
    a, b = eighths(RANK, n_vocab), eighths(256, RANK, seed=1)
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
        f"{PREFIX}lm_head.lora_A.weight": b.T.contiguous(),
        f"{PREFIX}lm_head.lora_B.weight": a.T.contiguous(),
    }
    expected = {
        "model.embed_tokens.weight": weight(untied, "model.embed_tokens") + 2 * (b @ a).T,
        "lm_head.weight": weight(untied, "lm_head") + 2 * (a.T @ b.T),
    }
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors), expected)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight"])
def test_dora_scales_the_weights_of_each_output(untied: Path, tmp_path: Path, suffix: str) -> None:
    adapted = weight(untied, Q_PROJ) + 2 * (eighths(256, RANK, seed=1) @ eighths(RANK, 256))
    magnitude = 1 + torch.rand(256, generator=torch.Generator().manual_seed(3))
    norms = torch.tensor([math.sqrt(sum(float(w) ** 2 for w in row)) for row in adapted])
    infix = ".default" if "default" in suffix else ""
    tensors = {
        f"{PREFIX}{Q_PROJ}.lora_A{infix}.weight": eighths(RANK, 256),
        f"{PREFIX}{Q_PROJ}.lora_B{infix}.weight": eighths(256, RANK, seed=1),
        f"{PREFIX}{Q_PROJ}.lora_magnitude_vector{suffix}": magnitude,
    }
    source = ModelDirectory(untied, write_adapter(tmp_path / "lora", tensors, use_dora=True))
    found = read_all(source)[f"{Q_PROJ}.weight"]
    torch.testing.assert_close(found, magnitude[:, None] * adapted / norms[:, None], rtol=FLOAT32_SUMS, atol=0)
    torch.testing.assert_close(found.norm(dim=1), magnitude, rtol=FLOAT32_SUMS, atol=0)


def test_dora_of_an_embedding_scales_its_columns(untied: Path, tmp_path: Path) -> None:
    n_vocab = len(weight(untied, "lm_head"))
    a, b = eighths(RANK, n_vocab), eighths(256, RANK, seed=1)
    magnitude = 1 + torch.rand(256, generator=torch.Generator().manual_seed(3))
    name = f"{PREFIX}model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": a,
        f"{name}.lora_embedding_B": b,
        f"{name}.lora_magnitude_vector": magnitude,
    }
    source = ModelDirectory(untied, write_adapter(tmp_path / "lora", tensors, use_dora=True))
    found = read_all(source)["model.embed_tokens.weight"]
    adapted = weight(untied, "model.embed_tokens") + 2 * (b @ a).T
    norms = (adapted.double() ** 2).sum(dim=0).sqrt()
    torch.testing.assert_close(found.double(), magnitude * adapted / norms, rtol=FLOAT32_SUMS, atol=0)


@pytest.mark.parametrize("infix", ["", ".base_layer", ".modules_to_save", ".modules_to_save.default"])
def test_saved_modules_and_biases_take_the_place_of_the_bases(untied: Path, tmp_path: Path, infix: str) -> None:
    stored = load_file(untied / "model.safetensors")
    tensors = {f"{PREFIX}lm_head.original_module.weight": stored["lm_head.weight"]}
    expected = {}
    for module, kind in (("lm_head", "weight"), ("model.embed_tokens", "weight"), (UP_PROJ, "bias")):
        expected[f"{module}.{kind}"] = stored[f"{module}.{kind}"].float() + 1
        tensors[f"{PREFIX}{module}{infix}.{kind}"] = expected[f"{module}.{kind}"]
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head"], bias="all"), expected)


def test_update_of_a_saved_base_is_added_to_that(untied: Path, tmp_path: Path) -> None:
    saved = weight(untied, Q_PROJ) + 1
    tensors = pair(Q_PROJ) | {f"{PREFIX}{Q_PROJ}.base_layer.weight": saved}
    product = tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"] @ tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"]
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors), {f"{Q_PROJ}.weight": saved + 2 * product})


def test_of_two_copies_of_a_saved_module_the_plain_one_counts(untied: Path, tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}model.norm.weight": torch.ones(256),
        f"{PREFIX}model.norm.modules_to_save.weight": torch.zeros(256),
    }
    assert_merged(untied, write_adapter(tmp_path / "lora", tensors), {"model.norm.weight": torch.ones(256)})


@pytest.mark.parametrize("start", [False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_taken(untied: Path, tmp_path: Path, start: object) -> None:
    adapter = write_adapter(tmp_path / "lora", pair(Q_PROJ), init_lora_weights=start)
    assert ModelDirectory(untied, adapter).adapter is not None


def test_layer_that_is_run_has_merged_weights(untied: Path, tmp_path: Path) -> None:
    tensors = pair(UP_PROJ)
    layer = LayerModel(ModelDirectory(untied).transformers_config(), torch.device("cpu"))
    layer.load(ModelDirectory(untied, write_adapter(tmp_path / "lora", tensors)), 1)
    product = tensors[f"{PREFIX}{UP_PROJ}.lora_B.weight"] @ tensors[f"{PREFIX}{UP_PROJ}.lora_A.weight"]
    assert torch.equal(layer.weight("mlp.up_proj"), weight(untied, UP_PROJ) + 2 * product)


# Against PEFT itself

PEFT_CASES: dict[str, dict[str, Any]] = {
    "LoRA and a saved module": {"modules_to_save": ["lm_head"]},
    "LoRA with biases": {"bias": "all"},
    "ranks and alphas by module": {
        "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\..*": 8},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
    },
    "rsLoRA": {"use_rslora": True, "r": 8},
    "DoRA and a saved module": {"use_dora": True, "modules_to_save": ["lm_head"]},
    "rsLoRA and DoRA with biases": {"use_rslora": True, "use_dora": True, "bias": "lora_only"},
}


def merged_by_peft(base: Path, adapter: Path, **settings: Any) -> Tensors:
    """Save an adapter, every number of which has moved from where it starts, and merge it as PEFT does."""
    from peft import LoraConfig, get_peft_model

    targets = [*(name.rpartition(".")[2] for name in LINEAR), "embed_tokens"]
    values = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(values | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.empty_like(parameter).normal_(0, 0.1)
    model.save_pretrained(adapter, save_embedding_layers=True)  # as it does, with a warning, where they are adapted
    merged: Tensors = model.merge_and_unload().state_dict()
    return merged


def rounding(source: ModelDirectory, name: str, merged: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far our tensor and PEFT's can be apart, by the number of roundings in float32 and to the base's ``dtype``.

    A sum is off by one rounding of the sum of magnitudes a term at most: ``W + scale * B A`` has the rank's products,
    their scale and the base's weight. With DoRA that error is scaled as the sum is. The norm adds its own: that of its
    terms, a rounding for every two of them, since the root halves it, and those of root, quotient and product. PEFT
    rounds the result to the type of the base, and of an embedding the product as well; we do not.
    """
    assert source.adapter is not None
    update = source.adapter.updates.get(name)
    if update is None:
        return torch.zeros_like(merged)
    tensors, weight = load_file(source.adapter.file), load_file(source.path / "model.safetensors")[name].float()
    a, b = tensors[update.a], tensors[update.b]
    if update.is_embedding:
        a, b = b.T, a.T
    unit, of_base = torch.finfo(torch.float32).eps / 2, torch.finfo(dtype).eps / 2
    product = update.scale * (b.abs() @ a.abs())
    error = 2 * (len(a) + 2) * unit * (weight.abs() + product)
    if update.is_embedding:
        error += of_base * product
    if update.magnitude is not None:
        dim = 0 if update.is_embedding else 1
        norms = (weight + update.scale * (b @ a)).norm(dim=dim, keepdim=True)
        of_norm = error.norm(dim=dim, keepdim=True) / norms + (merged.shape[dim] + 6) * unit
        error = error * tensors[update.magnitude].view_as(norms).abs() / norms + of_norm * merged.abs()
    return error + of_base * (merged.abs() + error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_merged_tensors_are_those_of_peft(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Every tensor, up to roundings; what the adapter does not touch is as stored."""
    base = write_model(tmp_path / "base", dtype=dtype, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    expected = merged_by_peft(base, tmp_path / "lora", **PEFT_CASES[case])
    source = ModelDirectory(base, tmp_path / "lora")
    found, stored = read_all(source), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        wanted = expected[name].float()
        assert bool(((tensor.float() - wanted).abs() <= rounding(source, name, wanted, dtype)).all()), name
    changed = {name for name, tensor in found.items() if not torch.equal(tensor.float(), stored[name].float())}
    adapted = {f"{module}.weight" for module in (*MODULES, "model.embed_tokens")}
    saved = {"lm_head.weight"} if "modules_to_save" in PEFT_CASES[case] else set()
    biases = {name for name in stored if name.endswith(".bias")} if "bias" in PEFT_CASES[case] else set()
    assert changed == adapted | saved | biases


# The whole way


def save_merged(base: Path, adapter: Path, path: Path, dtype: torch.dtype) -> Path:
    """The model as it is once all of the adapter's pairs are merged beforehand, by the formula alone."""
    shutil.copytree(base, path)
    weights, tensors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for module in MODULES:
        a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        weights[f"{module}.weight"] = weights[f"{module}.weight"].float() + ALPHA / RANK * (b @ a)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def f16_tensors(source: Path, output: Path, adapter: Path | None = None) -> dict[str, np.ndarray[Any, Any]]:
    convert_plainly(source, output, source=SourceOptions(adapter=adapter))
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(output).tensors}


def test_f16_file_is_that_of_a_model_merged_beforehand_in_float32(tiny_model: Path, tmp_path: Path) -> None:
    """Bit by bit, rotary rows included; against one saved in BF16, up to that rounding."""
    adapter = write_adapter(tmp_path / "lora", all_pairs())
    found = f16_tensors(tiny_model, tmp_path / "a.gguf", adapter)
    expected = f16_tensors(save_merged(tiny_model, adapter, tmp_path / "f32", torch.float32), tmp_path / "b.gguf")
    rounded = f16_tensors(save_merged(tiny_model, adapter, tmp_path / "bf16", torch.bfloat16), tmp_path / "c.gguf")
    plain = f16_tensors(tiny_model, tmp_path / "d.gguf")
    assert found.keys() == expected.keys()
    for name, data in found.items():
        np.testing.assert_array_equal(data, expected[name])
        halves = 2**-8 + 2 * 2**-11  # of a unit in the last place of BF16, and of F16 twice
        np.testing.assert_allclose(data.astype(np.float64), rounded[name].astype(np.float64), rtol=halves, atol=2**-24)
        is_merged = name.startswith("blk.") and "norm" not in name
        assert is_merged == (not np.array_equal(data, plain[name]))


def test_quantised_file_is_that_of_a_model_merged_beforehand_in_float32(
    run_cli: RunCli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """Scores, importance, types and error feedback see the merged model; the header says what was merged."""
    adapter = write_adapter(tmp_path / "my-lora", all_pairs())
    merged = save_merged(tiny_model, adapter, tmp_path / "merged", torch.float32)
    options = ["--bits", 3.4, "--calibration", calibration_text, "--n-tokens", 512, "-t", 1, "--types", "Q2_K,Q4_K"]
    done = run_cli("convert", tiny_model, "--adapter", adapter, "-o", tmp_path / "a.gguf", *options)
    assert done.exit_code == 0, done.stderr
    assert run_cli("convert", merged, "-o", tmp_path / "b.gguf", *options).exit_code == 0
    found, expected = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert (mine.name, mine.tensor_type) == (theirs.name, theirs.tensor_type)
        np.testing.assert_array_equal(mine.data, theirs.data)
    assert found.fields["lieq.adapter"].contents() == "my-lora"
    assert "lieq.adapter" not in expected.fields
    assert found.fields["lieq.layer_scores"].contents() == expected.fields["lieq.layer_scores"].contents()


def test_f16_file_by_the_command_line(run_cli: RunCli, tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", all_pairs())
    f16 = ("--bits", 16, "--types", "F16", "-o", tmp_path / "a.gguf")
    assert run_cli("convert", tiny_model, "--adapter", adapter, *f16).exit_code == 0
    expected = f16_tensors(tiny_model, tmp_path / "b.gguf", adapter)
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name])


def test_scores_and_importance_are_of_the_merged_model_and_kept_apart(
    run_cli: RunCli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    adapters = [write_adapter(tmp_path / name, pair(UP_PROJ, seed=i)) for i, name in enumerate("ab")]
    shared = ["--calibration", calibration_text, "--n-tokens", 256, "--threads", 1]
    lim = []
    for chosen in ([], ["--adapter", adapters[0]], ["--adapter", adapters[1]], ["--adapter", adapters[0]]):
        scored = run_cli("score", tiny_model, *chosen, "--types", "Q2_K", "--json", *shared)
        lim.append([layer["lim"] for layer in json.loads(scored.stdout)["layers"]])
        assert (
            run_cli("imatrix", tiny_model, *chosen, "-f", "-o", tmp_path / f"{len(lim)}.gguf", *shared).exit_code == 0
        )
    assert lim[1] == lim[3]
    assert len({tuple(scores) for scores in lim}) == 3
    assert len(list(passes_folder().iterdir())) == 6
    matrices = [(tmp_path / f"{i}.gguf").read_bytes() for i in (1, 2, 3, 4)]
    assert matrices[1] == matrices[3]
    assert len(set(matrices)) == 3


def test_scores_of_the_base_are_refused_with_an_adapter(
    run_cli: RunCli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    adapter, scores = write_adapter(tmp_path / "lora", pair(UP_PROJ)), tmp_path / "scores.json"
    cheap = ("--calibration", calibration_text, "--n-tokens", 256, "--types", "Q2_K,Q4_K")
    assert run_cli("score", tiny_model, "-o", scores, *cheap).exit_code == 0
    done = run_cli("plan", tiny_model, "--bits", 3.4, "--scores-file", scores, "--adapter", adapter, *cheap[-2:])
    assert done.exit_code == 1
    assert "scores are for another tiny, whose weights differ from those of tiny" in done.stderr


def test_fingerprint_depends_on_the_adapter_and_not_on_its_place(tiny_model: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", pair(UP_PROJ))
    others = [
        write_adapter(tmp_path / "b", pair(UP_PROJ, seed=1)),
        write_adapter(tmp_path / "c", pair(UP_PROJ), lora_alpha=16),
        None,
    ]
    fingerprints = {ModelDirectory(tiny_model, other).fingerprint for other in (first, *others)}
    assert len(fingerprints) == 4
    same = ModelDirectory(tiny_model, Path(shutil.copytree(first, tmp_path / "elsewhere")))
    assert same.fingerprint == ModelDirectory(tiny_model, first).fingerprint


def test_headers_are_checked_without_torch(tiny_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from lieq_gguf.sources.model_directory import ModelDirectory\n"
        "source = ModelDirectory(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(len(source.adapter.updates), source.fingerprint, 'torch' in sys.modules)"
    )
    adapter = write_adapter(tmp_path / "lora", all_pairs())
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_model, adapter],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    fingerprint = ModelDirectory(tiny_model, adapter).fingerprint
    assert (done.stdout, done.stderr) == (f"21 {fingerprint} False\n", "")


# What is noted


def adapter_of(base: Path, adapter: Path) -> LoraAdapter:
    return load_adapter(adapter, base, ModelDirectory(base).spec)


@pytest.mark.parametrize("name", ["someone/untied", "/models/UNTIED/", "untied", None, ""])
def test_adapter_of_this_base_needs_no_note(untied: Path, tmp_path: Path, name: str | None) -> None:
    adapter = write_adapter(tmp_path / "lora", pair(Q_PROJ), base_model_name_or_path=name)
    shutil.copy(untied / "tokenizer.json", adapter)
    assert adapter_of(untied, adapter).notes == ()


def test_another_base_and_another_tokenizer_are_noted(run_cli: RunCli, untied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", pair(Q_PROJ), base_model_name_or_path="someone/else")
    (adapter / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    base, template = adapter_of(untied, adapter).notes
    assert "someone/else" in base
    assert "chat_template.jinja" in template
    f16 = ("--bits", 16, "--types", "F16", "--no-imatrix", "--dry-run")
    assert f"note: {base}\nnote: {template}\n" in run_cli("convert", untied, "--adapter", adapter, *f16).stderr


# What is refused

Change = Callable[[Path], object]


def with_config(**changes: Any) -> Change:
    return lambda path: write_adapter(path, pair(Q_PROJ), **changes)


def with_tensors(tensors: Mapping[str, torch.Tensor], **changes: Any) -> Change:
    return lambda path: write_adapter(path, tensors, **changes)


def with_value(value: float, dtype: torch.dtype) -> Change:
    tensors = {key: tensor.to(dtype) for key, tensor in pair(Q_PROJ).items()}
    tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"][255, 3] = value
    return with_tensors(tensors)


def renamed(**names: str) -> Change:
    """Good pairs under other names."""
    tensors = pair(Q_PROJ)
    for old, new in names.items():
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    return with_tensors(tensors)


def without(name: str) -> Change:
    def change(path: Path) -> None:
        with_config()(path)
        (path / name).unlink()

    return change


def overwritten(name: str, content: bytes) -> Change:
    def change(path: Path) -> None:
        with_config()(path)
        (path / name).write_bytes(content)

    return change


def nothing(path: Path) -> None:
    assert not path.exists()


def pickled(path: Path) -> None:
    with_config()(path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def cut(path: Path) -> None:
    with_config()(path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


MERGE = "merge_and_unload"
A, B = f"{PREFIX}{Q_PROJ}.lora_A", f"{PREFIX}{Q_PROJ}.lora_B"
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no directory": (nothing, ("does not exist", "adapter_config.json")),
    "a file": (lambda path: path.write_text("x"), ("is a file", "expected a directory")),
    "no configuration": (without("adapter_config.json"), ("has no adapter_config.json", "as PEFT saves it")),
    "damaged configuration": (overwritten("adapter_config.json", b"{"), ("adapter_config.json cannot be read",)),
    "list": (overwritten("adapter_config.json", b"[]"), ("holds a list; expected a JSON object",)),
    "no weights": (without("adapter_model.safetensors"), ("holds no weights; expected adapter_model.safetensors",)),
    "pickle": (pickled, ("only pickled weights (adapter_model.bin)", "save_pretrained")),
    "cut": (cut, ("damaged or incomplete", "download it again")),
    "empty": (with_tensors({}), ("holds no tensors",)),
    "another kind": (with_config(peft_type="LOHA"), ("peft_type 'LOHA'", "expected 'LORA'", MERGE)),
    "no kind": (with_config(peft_type=None), ("peft_type None",)),
    "transposed": (with_config(fan_in_fan_out=True), ("fan_in_fan_out", "transposed", MERGE)),
    "layers repeated": (with_config(layer_replication=[[0, 2], [1, 3]]), ("layer_replication", MERGE)),
    "lora_bias": (with_config(lora_bias=True), ("lora_bias", MERGE)),
    "Megatron": (with_config(megatron_config={"a": 1}), ("megatron_config", MERGE)),
    "parameters": (with_config(target_parameters=["experts"]), ("target_parameters", MERGE)),
    "single tokens": (with_config(trainable_token_indices=[5]), ("trainable_token_indices", MERGE)),
    "blocks": (with_config(use_bdlora={"nblocks": 2}), ("use_bdlora", MERGE)),
    "KaSA": (with_config(kasa_config={"beta": 1}), ("kasa_config", "base's weights", MERGE)),
    "sampled": (with_config(monteclora_config={"a": 1}), ("monteclora_config", MERGE)),
    "activated": (with_config(alora_invocation_tokens=[1, 2]), ("alora_invocation_tokens", "cannot be merged")),
    "router": (with_config(arrow_config={"top_k": 3}), ("arrow_config", "cannot be merged")),
    "pooled": (with_config(use_qalora=True), ("use_qalora", "cannot be merged")),
    **{
        start: (with_config(init_lora_weights=start), (f"'{start.lower()}'", "changes the base's weights", MERGE))
        for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    },
    "rank is text": (with_config(r="4"), ("r in ", "is '4'", "expected a positive integer")),
    "rank is missing": (with_config(r=None), ("is None", "expected a positive integer")),
    "rank is zero": (with_config(rank_pattern={"q_proj": 0}), ("is 0 for model.layers.0", "positive integer")),
    "alpha is missing": (with_config(lora_alpha=None), ("lora_alpha", "is None", "expected a number")),
    "alpha is infinite": (with_config(lora_alpha=math.inf), ("lora_alpha", "is inf", "expected a number")),
    "pattern is a list": (with_config(alpha_pattern=["q_proj"]), ("alpha_pattern", "expected an object")),
    "pattern is none": (with_config(rank_pattern={"(": 2}), ("rank_pattern", "'('", "not a regular expression")),
    "another rank": (with_config(r=8), ("lora_A.weight", "(4, 256)", "a rank of 8")),
    "A of another width": (
        with_tensors(pair(Q_PROJ) | {f"{A}.weight": torch.ones(RANK, 128)}),
        ("lora_A.weight", "(4, 128)", "needs (4, 256)", "another model"),
    ),
    "B of another width": (
        with_tensors(pair(Q_PROJ) | {f"{B}.weight": torch.ones(128, RANK)}),
        ("lora_B.weight", "(128, 4)", "needs (256, 4)", "another model"),
    ),
    "A is a vector": (with_tensors(pair(Q_PROJ) | {f"{A}.weight": torch.ones(RANK)}), ("(4,)", "needs (4, 256)")),
    "A is a number": (with_tensors(pair(Q_PROJ) | {f"{A}.weight": torch.ones(())}), ("()", "a rank of 4")),
    "A alone": (with_tensors({f"{A}.weight": torch.ones(RANK, 256)}), ("has lora_A for", "expected lora_A, lora_B")),
    "integers": (
        with_tensors(pair(Q_PROJ) | {f"{A}.weight": torch.ones(RANK, 256, dtype=torch.int8)}),
        ("lora_A.weight", "is I8; expected BF16, F16, F32"),
    ),
    **{
        f"{value} in {dtype}": (with_value(value, dtype), ("lora_B.weight", "NaN or infinite"))
        for value, dtype in (
            (math.nan, torch.float32),
            (-math.inf, torch.float32),
            (math.nan, torch.float16),
            (math.inf, torch.bfloat16),
        )
    },
    "damaged saved module": (
        with_tensors({f"{PREFIX}model.norm.weight": torch.full((256,), math.nan)}),
        ("model.norm.weight", "NaN or infinite"),
    ),
    "deeper model": (
        renamed(**{"layers.0": "layers.7"}),
        ("layers.7.self_attn.q_proj.lora_", "3 layers has no model.layers.7.self_attn.q_proj.weight", "another model"),
    ),
    "another architecture": (renamed(q_proj="qkv_proj"), ("has no model.layers.0.self_attn.qkv_proj.weight",)),
    "a norm": (renamed(**{"self_attn.q_proj": "input_layernorm"}), ("vector", "expected a matrix")),
    "unknown part": (
        with_tensors(pair(Q_PROJ) | {f"{PREFIX}{Q_PROJ}.lora_diag": torch.ones(RANK)}),
        ("lora_diag, which is not part of a LoRA adapter", MERGE),
    ),
    "two adapters": (
        with_tensors({key.replace(".weight", f".{n}.weight"): t for n in "ab" for key, t in pair(Q_PROJ).items()}),
        ("several adapters (a, b)", "expected one"),
    ),
    "DoRA without magnitude": (with_config(use_dora=True), ("expected lora_A, lora_B, lora_magnitude_vector",)),
    "magnitude without DoRA": (
        with_tensors(pair(Q_PROJ) | {f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(256)}),
        ("has lora_A, lora_B, lora_magnitude_vector", "expected lora_A, lora_B:"),
    ),
    "magnitude of another width": (
        with_tensors(pair(Q_PROJ) | {f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(128)}, use_dora=True),
        ("lora_magnitude_vector", "(128,)", "needs (256,)"),
    ),
    "resized vocabulary": (
        with_tensors({f"{PREFIX}lm_head.weight": torch.ones(999, 256)}),
        ("lm_head.weight", "(999, 256)", "vocabulary was resized", MERGE),
    ),
    "saved module of another model": (
        with_tensors({f"{PREFIX}model.norm.weight": torch.ones(128)}),
        ("model.norm.weight", "(128,)", "another model"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(untied: Path, tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    change(tmp_path / "lora")
    with pytest.raises(SourceError) as refused:
        ModelDirectory(untied, tmp_path / "lora")
    message = str(refused.value)
    assert "\n" not in message
    assert "lora" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.lora_embedding_A", "lm_head.lora_A.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
def test_refuses_to_untie_embedding_and_output(tiny_model: Path, tmp_path: Path, name: str) -> None:
    adapter = write_adapter(tmp_path / "lora", {f"{PREFIX}{name}": torch.ones(RANK, 256)})
    with pytest.raises(SourceError, match="embedding and output of tiny are one matrix, and the adapter unties them; "):
        ModelDirectory(tiny_model, adapter)


def test_refuses_dora_on_weights_that_are_all_zero(untied: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(untied, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights[f"{Q_PROJ}.weight"][7] = 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    tensors = pair(Q_PROJ) | {f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(256)}
    tensors[f"{B}.weight"][7] = 0
    source = ModelDirectory(base, write_adapter(tmp_path / "lora", tensors, use_dora=True))
    with pytest.raises(SourceError, match=r"q_proj.weight has an output whose weights are all zero"):
        read_all(source)


def test_adapter_in_place_of_its_base_is_told_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="lora is an adapter; give its base model, and the adapter with --adapter"):
        ModelDirectory(write_adapter(tmp_path / "lora", pair(Q_PROJ)))


@pytest.mark.parametrize("command", ["convert", "score", "imatrix", "plan"])
def test_what_is_wrong_is_one_line_and_leaves_nothing_behind(
    run_cli: RunCli, tiny_model: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "out").mkdir()
    adapter = write_adapter(tmp_path / "lora", pair(Q_PROJ), init_lora_weights="pissa")
    bits = ("--bits", 4) if command in ("convert", "plan") else ()
    done = run_cli(command, tiny_model, "--adapter", adapter, *bits, "-o", tmp_path / "out" / "file")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []
    assert not passes_folder().exists()

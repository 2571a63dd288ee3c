"""Directories whose weights are published quantised: each is the model that its dequantised weights are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import RunCli, run_apart
from support.converter import Job, compare_files, run_converter
from support.families import TINY_MODELS
from support.published import (
    Published,
    Tensors,
    awq,
    compressed_tensors,
    fp8,
    gptq,
    mxfp4,
    mxfp8,
    naive,
    packed,
    write_both,
)
from support.reports import edit_json, edit_weights
from support.requests import convert_plainly
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lieq_gguf.errors import ArchitectureError, SourceError
from lieq_gguf.evaluation.divergence import ComparisonOptions, evaluate
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.published.mxfp4 import Mxfp4
from lieq_gguf.sources.tensor_names import EMBEDDING, HEAD

UP = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts"
EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
BY_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def int4(**weights: Any) -> dict[str, Any]:
    return compressed_tensors("pack-quantized", {"num_bits": 4, "type": "int", **weights})


def float8(**weights: Any) -> dict[str, Any]:
    return compressed_tensors("float-quantized", {"num_bits": 8, "type": "float", **weights})


def int8(**weights: Any) -> dict[str, Any]:
    return compressed_tensors("int-quantized", {"num_bits": 8, "type": "int", **weights})


def by_row(_weight: torch.Tensor) -> tuple[int, int]:
    return 1, _weight.shape[1]


def whole(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


FORMATS: dict[str, tuple[str, Published]] = {
    "fp8": ("llama", Published(FP8, fp8((128, 128)))),
    "fp8, experts": ("qwen3moe", Published(FP8, fp8((128, 128)))),
    "fp8, fused": ("phi3", Published(FP8, fp8((128, 128)))),
    "fp8, one scale": ("mistral", Published(BY_TENSOR, fp8(None))),
    "fp8, AutoFP8": ("qwen2", Published(BY_TENSOR, fp8(None, "weight_scale"))),
    "fp8, blocks cut off": ("qwen3", Published(FP8 | {"weight_block_size": [96, 96]}, fp8((96, 96)))),
    "mxfp8": ("llama", Published({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, mxfp8)),
    "float8, channel": ("llama", Published(float8(strategy="channel"), naive(by_row, torch.float8_e4m3fn))),
    "float8, tensor": ("llama", Published(float8(strategy="tensor"), naive(whole, torch.float8_e4m3fn))),
    "float8, zeros": (
        "llama",
        Published(float8(strategy="channel", symmetric=False), naive(by_row, torch.float8_e4m3fn, zeros=True)),
    ),
    "float8, experts": ("qwen3moe", Published(float8(strategy="channel"), naive(by_row, torch.float8_e4m3fn))),
    "float8, block": (
        "smollm2",
        Published(
            float8(strategy="block", block_structure=[128, 64]), naive(lambda _: (128, 64), torch.float8_e4m3fn)
        ),
    ),
    "int8": ("qwen2", Published(int8(strategy="channel"), naive(by_row, torch.int8))),
    "int8, zeros": (
        "llama", Published(int8(strategy="channel", symmetric=False), naive(by_row, torch.int8, zeros=True)),
    ),
    "int4": ("llama", Published(int4(strategy="group", group_size=64), packed(4, 64))),
    "int4, experts": ("qwen3moe", Published(int4(group_size=64), packed(4, 64))),
    "int4, zeros": ("qwen2", Published(int4(group_size=32, symmetric=False), packed(4, 32, zeros=True))),
    "int4, channel": ("llama", Published(int4(strategy="channel", symmetric=False), packed(4, None, zeros=True))),
    "int4, act order": (
        "llama", Published(int4(strategy="group", group_size=64, actorder="group"), packed(4, 64, act_order=True)),
    ),
    "int8, packed": (
        "llama", Published(compressed_tensors("pack-quantized", {"num_bits": 8, "group_size": 128}), packed(8, 128)),
    ),
    "gptq": ("qwen2", Published(GPTQ, gptq(4, 64))),
    "gptq, act order": ("llama", Published(GPTQ | {"desc_act": True}, gptq(4, 64, act_order=True))),
    "gptq, version 2": ("llama", Published(GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, 64, version=2))),
    "gptq, 8 bits": ("llama", Published(GPTQ | {"bits": 8, "group_size": -1}, gptq(8, None))),
    "gptq, 2 bits": ("llama", Published(GPTQ | {"bits": 2, "group_size": 32}, gptq(2, 32))),
    "awq": ("qwen3", Published(AWQ, awq(64))),
    "mxfp4": (
        "gpt-oss", Published({"quant_method": "mxfp4"}, mxfp4, ("experts.gate_up_proj", "experts.down_proj")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_is_that_of_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    """Which includes the proof of equality for both."""
    family, published = FORMATS[name]
    model = TINY_MODELS[family].write(tmp_path / "model")
    quantised, plain = write_both(model, published)
    files = [convert_plainly(path, tmp_path / f"{path.parent.name}.gguf", "F32") for path in (quantised, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()


KNOWN_TO_TRANSFORMERS = ("fp8", "fp8, experts", "fp8, fused", "fp8, one scale", "mxfp8", "mxfp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, DTYPES[0]) for name in KNOWN_TO_TRANSFORMERS), *(("fp8", d) for d in DTYPES[1:])]
)
def test_transformers_dequantises_to_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """But AutoFP8, of whose scales it does not know, and blocks that are cut off, which it refuses."""
    family, published = FORMATS[name]
    quantised, _ = write_both(TINY_MODELS[family].write(tmp_path / "model", dtype), published)
    expected = AutoModelForCausalLM.from_pretrained(quantised)
    assert expected.dtype == dtype
    found = ModelDirectory(quantised).load_model()
    for (at, weight), (_, other) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(weight.float(), other), at


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_is_decoded_by_transformers_own_function_to_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every code with every scale, expert by expert, also those that the type of the model cannot hold."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)  # of a byte, in blocks
    path = TINY_MODELS["gpt-oss"].write(tmp_path / "model", dtype, num_hidden_layers=1)
    quantised, _ = write_both(path, FORMATS["mxfp4"][1])

    def spread(weights: Tensors) -> None:
        for name in (name for name in weights if name.endswith("_blocks")):
            scales = weights[name.replace("_blocks", "_scales")]
            weights[name] = codes.repeat(len(scales.flatten()) // 16 + 1, 1)[: scales.numel()].view_as(weights[name])
            scales.copy_(torch.arange(scales.numel()).mul(7).div(16, rounding_mode="floor").byte().view_as(scales))

    edit_weights(spread)(quantised)
    stored = load_file(quantised / "model.safetensors")
    source = ModelDirectory(quantised)
    for name, rows in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        parts = (stored[f"model.layers.0.mlp.experts.{name}_{end}"] for end in ("blocks", "scales"))
        expected = convert_moe_packed_tensors(*parts, dtype=dtype).transpose(1, 2)
        for i, role in enumerate(rows):
            found = source.read(next(t for t in source.spec.tensors if t.name == f"blk.0.ffn_{role}_exps.weight"))
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected[:, i :: len(rows)], rtol=0, atol=0, equal_nan=True)


def test_encoding_what_mxfp4_can_hold_changes_nothing() -> None:
    """Whatever the largest number of a block is, and so the scale that ggml gives it."""
    rng = np.random.default_rng(0)
    largest = np.arange(1, 8).repeat(32)[:, None, None]
    codes = rng.integers(0, largest + 1, (len(largest), 8, 32)) | rng.integers(0, 2, (len(largest), 8, 32)) << 3
    codes[..., :1] = largest
    blocks, scales = codes[..., ::2] | codes[..., 1::2] << 4, rng.integers(8, 247, (len(largest), 8))
    parts = {"blocks": torch.from_numpy(blocks.astype(np.uint8)), "scales": torch.from_numpy(scales.astype(np.uint8))}
    weights, quant_type = Mxfp4("float32").decode("", parts).numpy(), QUANT_TYPES["MXFP4"]
    assert np.array_equal(ggml.dequantize(ggml.quantize(weights, quant_type), quant_type), weights)


def test_a_plan_with_mxfp4_keeps_published_experts(
    made: Callable[[str], Path], calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    path, file = made("mxfp4"), tmp_path / "out.gguf"
    few = ("--calibration", calibration_text, "--n-tokens", 512, "--threads", 1, "--profile", "quality")
    done = run_cli("convert", path, "--bits", 4.5, "--types", "+MXFP4", "-o", file, *few)
    assert done.exit_code == 0, done.stderr
    assert_same_experts(path, file)


@pytest.mark.slow
def test_llama_cpps_converter_repacks_mxfp4_to_the_same_numbers(
    made: Callable[[str], Path], llama_cpp: Path, tmp_path: Path
) -> None:
    ours = convert_plainly(made("mxfp4"), tmp_path / "ours.gguf", "BF16")
    run_converter([Job(made("mxfp4"), ours, tmp_path / "theirs.gguf")], llama_cpp)
    assert_same_experts(made("mxfp4"), tmp_path / "theirs.gguf")
    found = compare_files(ours, tmp_path / "theirs.gguf")
    assert {name.split(".", 2)[2] for name in found.tensors if "exps" in name} == {f"{r}.weight" for r in EXPERT_ROLES}


def assert_same_experts(path: Path, file: Path) -> None:
    """Require that a file has the experts of a directory in MXFP4, and with the same numbers."""
    source, written = ModelDirectory(path), GgufSource(file, SourceOptions(allow_requantize=True))
    experts = [t for t in source.spec.tensors if t.role in EXPERT_ROLES and t.is_matrix]
    assert (written.why_not_supported, len(experts)) == ("", 6)
    for tensor in experts:
        assert written.stored_type(tensor).name == "MXFP4"
        assert torch.equal(written.read(tensor), source.read(tensor).float())


def test_biases_of_experts_that_are_all_zero_are_kept(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("mxfp4"), tmp_path / "model"))
    edit_weights(changed("gate_up_proj_bias", torch.zeros_like, EXPERTS))(path)
    assert ModelDirectory(path).spec == ModelDirectory(made("mxfp4")).spec


IN_LIBRARY = [name for name, (_, p) in FORMATS.items() if "config_groups" in p.settings and "act order" not in name]


@pytest.mark.parametrize("name", IN_LIBRARY)
def test_compressed_tensors_decompresses_to_the_same(name: str, tmp_path: Path) -> None:
    """But columns out of order, which later versions of the library refuse."""
    pytest.importorskip("compressed_tensors")
    family, published = FORMATS[name]
    settings = {**published.settings, "dequantize": True}  # transformers' key, for when it loads
    published = Published(settings, published.quantise)
    quantised, _ = write_both(TINY_MODELS[family].write(tmp_path / "model"), published)
    expected = AutoModelForCausalLM.from_pretrained(quantised)
    found = ModelDirectory(quantised).load_model()
    for (at, weight), (_, other) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(weight.float(), other), at


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory of each format, made once; read-only."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            family, published = FORMATS[name]
            folder = tmp_path_factory.mktemp("published")
            done[name], _ = write_both(TINY_MODELS[family].write(folder / "model"), published)
        return done[name]

    return make


# How files are laid out


def assert_same_file(quantised: Path, plain: Path, folder: Path) -> None:
    files = [convert_plainly(path, folder / f"{i}.gguf", "F32") for i, path in enumerate((quantised, plain))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_modules_in_different_formats(tmp_path: Path) -> None:
    """A name comes before a pattern, a pattern before a class; what has no parts is plain, whatever the lists say."""
    by_row_float8 = float8(strategy="channel")["config_groups"]["group_0"]
    groups = {
        "rest": int4(group_size=64)["config_groups"]["group_0"] | {"format": "pack-quantized"},
        "attention": by_row_float8 | {"targets": ["re:.*self_attn.*"], "format": "float-quantized"},
        "one": int8(strategy="channel")["config_groups"]["group_0"]
        | {"targets": ["model.layers.0.self_attn.v_proj"], "format": "int-quantized"},
    }
    settings = compressed_tensors("mixed-precision", {}, config_groups=groups)
    model = TINY_MODELS["llama"].write(tmp_path / "model")
    first = Published(settings, packed(4, 64), ("up_proj.weight", "down_proj.weight"))
    quantised, plain = write_both(model, first, tmp_path / "1")
    for i, (quantise, of) in enumerate(
        [
            (naive(by_row, torch.float8_e4m3fn), ("q_proj.weight", "1.self_attn.v_proj.weight")),
            (naive(by_row, torch.int8), ("0.self_attn.v_proj.weight",)),
        ]
    ):
        more = Published(settings, quantise, of)
        quantised, _ = write_both(quantised, more, tmp_path / f"quantised{i}")
        _, plain = write_both(plain, more, tmp_path / f"plain{i}")
    assert load_file(quantised / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert_same_file(quantised, plain, tmp_path)


def split_in_two(path: Path, prefix: str = "") -> list[Path]:
    """Put the tensors into two files in turn, under names with a prefix."""
    weights = {prefix + name: weight for name, weight in load_file(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    shards: dict[str, Tensors] = {"model-0.safetensors": {}, "model-1.safetensors": {}}
    for i, name in enumerate(sorted(weights)):
        shards[f"model-{i % 2}.safetensors"][name] = weights[name]
    for file, shard in shards.items():
        save_file(shard, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [path / file for file in shards]


@pytest.mark.parametrize("name", ["fp8", "int4, zeros", "gptq"])
def test_parts_in_different_shards_and_with_another_prefix(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """As the text part of a model of images and text."""
    path = Path(shutil.copytree(made(name), tmp_path / "model"))
    split_in_two(path, "language_model.")
    assert_same_file(path, made(name), tmp_path)


def test_a_shard_that_is_cut_off(made: Callable[[str], Path], tmp_path: Path) -> None:
    """The biases are read before anything else."""
    path = Path(shutil.copytree(made("gptq"), tmp_path / "model"))
    for file in split_in_two(path):
        file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(SourceError, match=r"model-\d\.safetensors is damaged or incomplete"):
        ModelDirectory(path)


def test_a_quantised_head_of_a_tied_model(tmp_path: Path) -> None:
    """It is used, as a plain one that differs from the embedding is."""
    model = TINY_MODELS["smollm2"].write(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert ModelDirectory(model).spec.has_tied_embeddings
    quantised, plain = write_both(model, Published(GPTQ, gptq(4, 64), HEAD))
    source = ModelDirectory(quantised)
    assert not source.spec.has_tied_embeddings
    assert torch.equal(source.read_head(), load_file(plain / "model.safetensors")[HEAD])
    assert_same_file(quantised, plain, tmp_path)


def test_head_and_embedding_that_are_quantised_alike(tmp_path: Path) -> None:
    model = TINY_MODELS["smollm2"].write(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    quantised, plain = write_both(
        model, Published(int8(strategy="channel"), naive(by_row, torch.int8), (HEAD, EMBEDDING))
    )
    assert ModelDirectory(quantised).spec.has_tied_embeddings
    assert_same_file(quantised, plain, tmp_path)


def test_biases_of_zeros_that_the_model_does_not_have(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Some versions of AutoGPTQ wrote one for every module."""
    with_zeros = Path(shutil.copytree(made("gptq, act order"), tmp_path / "model"))
    weights = load_file(with_zeros / "model.safetensors")
    biases = {
        f"{at.removesuffix('qweight')}bias": torch.zeros(weight.shape[1], dtype=torch.float16)
        for at, weight in weights.items()
        if at.endswith("qweight")
    }
    save_file(weights | biases, with_zeros / "model.safetensors", metadata={"format": "pt"})
    assert_same_file(with_zeros, made("gptq, act order"), tmp_path)
    biases[f"{UP}.bias"][5] = 1
    save_file(weights | biases, with_zeros / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchitectureError, match=rf"the weights hold {UP}.bias, but mlp_bias .* is not set"):
        ModelDirectory(with_zeros)


# What is done with such a source


@pytest.mark.parametrize("name", ["fp8, experts", "int4, zeros", "gptq, act order", "mxfp4"])
def test_scores_feedback_verify_and_eval(
    name: str, made: Callable[[str], Path], calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """All of them need transformers' model with the weights as they are decoded here."""
    path, file = made(name), tmp_path / "out.gguf"
    few = ("--calibration", calibration_text, "--n-tokens", 512, "--types", "Q2_K,Q3_K,Q4_K", "--threads", 1)
    done = run_cli("convert", path, "--bits", 3.5, "-o", file, *few)
    assert done.exit_code == 0, done.stderr
    assert f"the weights are published in {FORMATS[name][1].settings['quant_method']}: the errors of new" in done.stderr
    assert run_cli("verify", file, "--source", path, "-q").exit_code == 0
    full = convert_plainly(path, tmp_path / "f32.gguf", "F32")
    same, other = evaluate([full, file], path, calibration_text.read_text(), ComparisonOptions(64, 3))
    assert same.kld.value < 1e-5 < 1e-4 < other.kld.value


@pytest.mark.parametrize("name", ["fp8", "gptq, act order"])
def test_an_adapter_is_merged_into_the_decoded_weights(name: str, tmp_path: Path) -> None:
    family, published = FORMATS[name]
    quantised, plain = write_both(TINY_MODELS[family].write(tmp_path / "model"), published)
    torch.manual_seed(5)
    lora = {f"base_model.model.{UP}.lora_A.weight": torch.randn(4, 256),
            f"base_model.model.{UP}.lora_B.weight": torch.randn(512, 4) / 10}  # fmt: skip
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "someone/model"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    files = [
        convert_plainly(path, tmp_path / f"{path.parent.name}.gguf", "F32", SourceOptions(adapter=adapter))
        for path in (quantised, plain)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != convert_plainly(plain, tmp_path / "base.gguf", "F32").read_bytes()


@pytest.mark.parametrize("of", ["weight_scale_inv", "config.json"])
def test_fingerprint_depends_on_scales_and_settings(of: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("fp8"), tmp_path / "model"))
    if of == "config.json":
        edit_json("config.json", quantization_config=FP8 | {"weight_block_size": [64, 64]})(path)
    else:
        edit_weights(changed(of, lambda scales: 2 * scales))(path)
    assert ModelDirectory(path).fingerprint != ModelDirectory(made("fp8")).fingerprint


# What is refused, by headers alone


NOT_READ = (
    "bitsandbytes", "hqq", "quanto", "torchao", "eetq", "vptq", "aqlm", "nvfp4", "modelopt", "fbgemm_fp8",
    "auto-round", "bitnet", "quark", "higgs", "spqr",
)  # fmt: skip
REFUSED_SETTINGS: dict[str, tuple[Any, str]] = {
    **{
        name: ({"quant_method": name}, f"is quantised with {name}, which cannot be read; expected BF16, F16 or F32, or")
        for name in NOT_READ
    },
    "bitsandbytes without a name": ({"load_in_4bit": True}, "is quantised with bitsandbytes"),
    "no name": ({"bits": 4}, "is quantised with an unnamed method"),
    "a name that is none": ({"quant_method": ["gptq"]}, "is quantised with ['gptq']"),
    "a text": ("awq", "is 'awq'; expected an object"),
    "block a number": (FP8 | {"weight_block_size": 128}, "(fp8) has weight_block_size 128; expected two numbers"),
    "block of zero": (FP8 | {"weight_block_size": [0, 128]}, "has weight_block_size [0, 128]; expected positive"),
    "3 bits": (GPTQ | {"bits": 3}, "(gptq) has bits 3; expected 2, 4, 8; give the model that it was made from"),
    "no bits": ({"quant_method": "gptq"}, "has bits None; expected 2, 4, 8"),
    "bits a text": (GPTQ | {"bits": "4"}, "has bits '4'; expected 2, 4, 8"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'; expected gptq, gptq_v2"),
    "group of zero": (GPTQ | {"group_size": 0}, "has group_size 0; expected positive integers"),
    "gemv": (AWQ | {"version": "GEMV"}, "(awq) has version 'gemv'; expected gemm"),
    "llm-awq": (AWQ | {"backend": "llm-awq"}, "has backend llm-awq"),
    "awq of 8 bits": (AWQ | {"bits": 8}, "has bits 8; expected 4"),
    "nvfp4": (int4() | {"format": "nvfp4-pack-quantized"}, "has format 'nvfp4-pack-quantized'; expected float-quantiz"),
    "packed 3 bits": (int4(num_bits=3), "has num_bits 3; expected 2, 4, 8"),
    "packed floats": (int4(type="float"), "has pack-quantized weights of type float"),
    "not compressed": (int4() | {"quantization_status": "frozen"}, "has quantization_status 'frozen'; expected compre"),
    "sparse": (int4() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "has sparse weights (sparse-24-bitmask)"),
    "rotated": (int4() | {"transform_config": {"config_groups": {"R1": {}}}}, "has a transform_config, which rotates"),
    "no groups": (int4() | {"config_groups": {}}, "has no config_groups with weights"),
    "groups a list": (int4() | {"config_groups": ["W4A16"]}, "has config_groups ['W4A16']; expected an object"),
    "a preset": (int4() | {"config_groups": {"W4A16": ["Linear"]}}, "has config_groups W4A16 ['Linear']; expected an"),
    "strategy": (int4(strategy="token"), "has strategy 'token'; expected tensor, channel, group, block"),
    "group without size": (int4(strategy="group"), "has group_size None; expected positive integers"),
    "block without size": (float8(strategy="block"), "has block_structure None; expected two numbers"),
    "targets": (
        int4() | {"config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": 4}}}},
        "has targets with '(', which is not a regular expression",
    ),
    "plain after all": (GPTQ, "has no tensor that ends in .qweight, although its config.json says gptq; if the weigh"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_refused_settings(name: str, tiny_model: Path, tmp_path: Path) -> None:
    settings, words = REFUSED_SETTINGS[name]
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    edit_json("config.json", quantization_config=settings)(path)
    with pytest.raises(SourceError) as caught:
        ModelDirectory(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_quantisation_at_all(tiny_model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": None}
    (path / "config.json").write_text(json.dumps(config))
    assert ModelDirectory(path).notes == ()


def without(end: str, module: str = UP) -> Callable[[Tensors], None]:
    def edit(weights: Tensors) -> None:
        del weights[f"{module}.{end}"]

    return edit


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor], module: str = UP) -> Callable[[Tensors], None]:
    def edit(weights: Tensors) -> None:
        weights[f"{module}.{end}"] = change(weights[f"{module}.{end}"]).contiguous()

    return edit


def cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1]


def twice_the_experts(weights: Tensors) -> None:
    for end in ("blocks", "scales"):
        weights[f"{EXPERTS}.down_proj_{end}"] = torch.cat(2 * [weights[f"{EXPERTS}.down_proj_{end}"]])


DAMAGED: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "mxfp4 without scales": (
        "mxfp4", without("gate_up_proj_scales", EXPERTS), f"has {EXPERTS}.gate_up_proj_blocks, but no scales for all",
    ),
    "mxfp4 without blocks": (
        "mxfp4", without("down_proj_blocks", EXPERTS), f"has {EXPERTS}.down_proj_scales, but no blocks for all",
    ),
    "mxfp4, more experts": ("mxfp4", twice_the_experts, "has 16 experts; by config.json expected 8"),
    "mxfp4, cut": (
        "mxfp4", changed("down_proj_blocks", lambda t: t[:, :, 1:], EXPERTS),
        "has shape (256, 7, 16); by config.json expected (256, 8, 16)",
    ),
    "mxfp4, scales of integers": ("mxfp4", changed("down_proj_scales", torch.Tensor.int, EXPERTS), "I32; expected U8"),
    "fp8 without scale": (
        "fp8", without("weight_scale_inv"),
        "is F8_E4M3, but no tensor beside it ends in .weight_scale_inv or .weight_scale",
    ),
    "fp8 without weight": ("fp8", without("weight"), f"but there is no {UP}.weight; download the model again"),
    "fp8, not fp8": ("fp8", changed("weight", torch.Tensor.bfloat16), "is BF16; expected F8_E4M3"),
    "fp8, other shape": ("fp8", changed("weight", cut), "has shape (511, 256); by config.json expected (512, 256)"),
    "fp8, other scales": ("fp8", changed("weight_scale_inv", cut), "has shape (3, 2), which fits no blocks"),
    "fp8, scales in a row": ("fp8", changed("weight_scale_inv", torch.flatten), "has shape (8,), which fits no blocks"),
    "fp8, scales of integers": ("fp8", changed("weight_scale_inv", torch.Tensor.int), "is I32; expected BF16, F16, "),
    "float8 without scale": ("float8, channel", without("weight_scale"), "ends in .weight_scale or .weight_packed"),
    "float8, other scales": ("float8, channel", changed("weight_scale", cut), "by config.json expected (512, 1)"),
    "float8, one scale": ("float8, tensor", changed("weight_scale", lambda t: t.expand(2)), "expected (1, 1) or () or"),
    "int8 without zeros": ("int8, zeros", without("weight_zero_point"), f"but there is no {UP}.weight_zero_point"),
    "int4 without scale": ("int4", without("weight_scale"), f"but there is no {UP}.weight_scale"),
    "int4, cut": ("int4", changed("weight_packed", lambda t: t[:, :-1]), "has shape (512, 31); by config.json"),
    "int4 without zeros": ("int4, zeros", without("weight_zero_point"), f"there is no {UP}.weight_zero_point"),
    "int4, zeros cut": ("int4, zeros", changed("weight_zero_point", cut), "has shape (63, 8); by config.json expected"),
    "int4, order cut": ("int4, act order", changed("weight_g_idx", cut), "has shape (255,); by config.json expected"),
    "gptq without zeros": ("gptq", without("qzeros"), f"but there is no {UP}.qzeros"),
    "gptq without scales": ("gptq", without("scales"), f"but there is no {UP}.scales"),
    "gptq, cut": ("gptq", changed("qweight", cut), "has shape (31, 512); by config.json expected (32, 512)"),
    "gptq, order cut": ("gptq", changed("g_idx", cut), "has shape (255,); by config.json expected (256,)"),
    "gptq, scales of integers": ("gptq", changed("scales", torch.Tensor.int), "is I32; expected BF16, F16, F32"),
    "awq, cut": ("awq", changed("qweight", lambda t: t[:, :-1]), "has shape (256, 63); by config.json expected"),
    "awq without zeros": ("awq", without("qzeros"), f"but there is no {UP}.qzeros"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_parts(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    kind, damage, words = DAMAGED[name]
    path = Path(shutil.copytree(made(kind), tmp_path / "model"))
    edit_weights(damage)(path)
    with pytest.raises(SourceError) as caught:
        ModelDirectory(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_of_an_activation(made: Callable[[str], Path], tmp_path: Path) -> None:
    """AutoAWQ adds them to some families; without them the model is another one."""
    path = Path(shutil.copytree(made("awq"), tmp_path / "model"))
    edit_weights(lambda weights: weights | {"model.layers.0.mlp.act.scales": torch.ones(512)})(path)
    with pytest.raises(SourceError, match=r"has model\.layers\.0\.mlp\.act\.scales, but no tensor beside it ends in"):
        ModelDirectory(path)


def test_bits_that_the_files_do_not_have(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("gptq"), tmp_path / "model"))
    edit_json("config.json", quantization_config=GPTQ | {"bits": 8})(path)
    with pytest.raises(SourceError, match=r"qweight in .* has shape \(32, 256\); by config.json expected \(64, 256\)"):
        ModelDirectory(path)


def test_a_module_that_no_group_names(made: Callable[[str], Path], tmp_path: Path) -> None:
    groups = {name: int4(group_size=size)["config_groups"]["group_0"] | {"targets": [f"re:.*{name}_proj"]}
              for name, size in (("down", 64), ("gate", 128))}  # fmt: skip
    path = Path(shutil.copytree(made("int4"), tmp_path / "model"))
    edit_json("config.json", quantization_config=int4() | {"config_groups": groups})(path)
    with pytest.raises(
        SourceError, match=r"q_proj is quantised, but no target of config_groups in config.json names it"
    ):
        ModelDirectory(path)


@pytest.mark.parametrize(("kind", "end"), [("gptq, act order", "g_idx"), ("int4, act order", "weight_g_idx")])
def test_a_group_that_is_not_there(
    kind: str, end: str, made: Callable[[str], Path], tmp_path: Path, run_cli: RunCli
) -> None:
    path = Path(shutil.copytree(made(kind), tmp_path / "model"))
    edit_weights(changed(end, lambda groups: groups + 1))(path)
    done = run_cli("convert", path, "--types", "Q4_K", "--bits", 4.5, "--no-imatrix", "-q", "-o", tmp_path / "out.gguf")
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    assert "has columns in groups 1 to " in line
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_neither_a_plan_nor_a_refusal_loads_torch(
    is_damaged: bool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made("int4, zeros"), tmp_path / "model"))
    if is_damaged:
        edit_weights(without("weight_scale"))(path)
    done, loaded = run_apart(["plan", str(path), "--types", "Q4_K", "--bits", "4.5", "--no-imatrix", "--threads", "1"])
    assert (done.exit_code, loaded) == (int(is_damaged), [])
    assert "Traceback" not in done.stderr

"""Parity: llama.cpp's own quantiser, called on an F16 or F32 GGUF with our plan, writes the very bytes we write.

The types whose tables ggml takes seconds to make are in the slow test.
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import RunCli
from support.families import TINY_MODELS
from support.models import write_model

from lieq_gguf.native.llama_cpp import llama_cpp
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers.check_texts import CHECK_TEXTS

QUICK = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
         "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "TQ1_0", "TQ2_0", "MXFP4",
         "F16", "BF16", "F32")  # fmt: skip
SLOW = ("IQ2_S", "IQ2_XS", "IQ1_M", "IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ3_S")
Importance = dict[str, npt.NDArray[np.float32]]


def llama_quantize(source: Path, target: Path, tensor_types: str, importance: Importance) -> None:
    """What the llama-quantize program does with --tensor-type-file and --imatrix."""
    api = llama_cpp()
    parameters = api.llama_model_quantize_default_params()
    parameters.nthread = 2
    parameters.ftype = int(gguf.LlamaFileType.MOSTLY_Q8_0)  # overrides count only where the default is quantised
    rules = [line.split("=") for line in tensor_types.split()]
    overrides = (api.llama_model_tensor_override * (len(rules) + 1))()  # the last one stays NULL and ends the list
    for override, (pattern, quant_type) in zip(overrides, rules, strict=False):
        override.pattern, override.type = pattern.encode(), QUANT_TYPES[quant_type].ggml_id
    parameters.tt_overrides = overrides
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = entries
    assert api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0


def mean_squared_inputs(imatrix: Path) -> Importance:
    """As llama-quantize reads the file: float32 sums divided by float32 counts, of each expert where there are some."""
    arrays = {t.name: np.array(t.data, dtype=np.float32) for t in gguf.GGUFReader(imatrix).tensors}
    return {
        name.removesuffix(".in_sum2"): (sums / arrays[name.replace(".in_sum2", ".counts")]).reshape(-1)
        for name, sums in arrays.items()
        if name.endswith(".in_sum2")
    }


def stored(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape), t.data.tobytes())
        for t in gguf.GGUFReader(file).tensors
    }


def plan_with(run_cli: RunCli, model: Path, plan: Path, layer_types: Sequence[str], **outer: str) -> dict[str, str]:
    """A plan file that deals ``layer_types`` to the matrices in turn; its types."""
    made = run_cli("plan", model, "--types", "F16", "--bits", 16, "--no-imatrix", "-q", "-o", plan)
    assert made.exit_code == 0, made.stderr
    document = json.loads(plan.read_text())
    matrices = [tensor.name for layer in ModelDirectory(model).spec.layer_matrices for tensor in layer]
    for i, name in enumerate(matrices):
        document["types"][name] = layer_types[i % len(layer_types)]
    document["types"] |= {f"{role}.weight": quant_type for role, quant_type in outer.items()}
    plan.write_text(json.dumps(document))
    types: dict[str, str] = document["types"]
    return types


def compare(
    run_cli: RunCli,
    folder: Path,
    model: Path,
    calibration_text: Path,
    layer_types: Sequence[str],
    unquantised: str = "F16",
    read_importance: Callable[[Path], Importance] = mean_squared_inputs,
    **outer: str,
) -> None:
    imatrix, plan, plain = folder / "imatrix.gguf", folder / "plan.json", folder / "plain.gguf"
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    bits = QUANT_TYPES[unquantised].bits_per_weight
    types = plan_with(run_cli, model, plan, layer_types, **outer)
    for command in (
        ("imatrix", model, "--calibration", calibration_text, "--n-tokens", 512, "-q", "-o", imatrix),
        ("convert", model, "--types", unquantised, "--bits", bits, "--no-imatrix", "-q", "-o", plain),
        (
            "convert",
            model,
            "--plan",
            plan,
            "--imatrix",
            imatrix,
            "--no-error-feedback",
            "--threads",
            2,
            "-q",
            "-o",
            ours,
        ),
    ):
        done = run_cli(*command)
        assert done.exit_code == 0, done.stderr
    recipe = QuantPlan.load(plan).tensor_type_lines(ModelDirectory(model).spec)
    llama_quantize(plain, theirs, recipe, read_importance(imatrix))
    we_wrote, they_wrote = stored(ours), stored(theirs)
    assert {name: kind for name, (kind, _, _) in they_wrote.items()} == types
    assert we_wrote.keys() == they_wrote.keys()
    assert [name for name in we_wrote if we_wrote[name] != they_wrote[name]] == []


@pytest.fixture(scope="module")
def tied_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("parity") / "tied", dtype=torch.float16)


@pytest.fixture(scope="module")
def untied_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in F32 that are numbers of F16 and an output matrix; key and value have as many heads as the query."""
    model = write_model(
        tmp_path_factory.mktemp("parity") / "untied",
        dtype=torch.float16,
        seed=1,
        tie_word_embeddings=False,
        num_key_value_heads=4,
    )
    weights = load_file(model / "model.safetensors")
    save_file({n: w.float() for n, w in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_same_bytes_of_every_quick_type(
    run_cli: RunCli, tmp_path: Path, tied_f16: Path, calibration_text: Path
) -> None:
    compare(run_cli, tmp_path, tied_f16, calibration_text, QUICK, token_embd="Q6_K")


def test_same_bytes_of_an_untied_model_from_f32(
    run_cli: RunCli, tmp_path: Path, untied_f32: Path, calibration_text: Path
) -> None:
    # Five types in turn, so that query and key have each of them in some layer.
    quick = ("Q4_K", "Q2_K", "IQ4_XS", "Q5_0", "Q3_K")
    compare(run_cli, tmp_path, untied_f32, calibration_text, quick, token_embd="Q4_K", output="Q6_K", unquantised="F32")


def test_same_bytes_of_an_untied_model_from_f16(
    run_cli: RunCli, tmp_path: Path, untied_f32: Path, calibration_text: Path
) -> None:
    compare(run_cli, tmp_path, untied_f32, calibration_text, ("Q6_K", "IQ4_NL"), token_embd="Q2_K", output="Q8_0")


def test_same_bytes_of_a_mixture_of_experts(run_cli: RunCli, tmp_path: Path) -> None:
    model = TINY_MODELS["qwen3moe"].write(tmp_path / "qwen3moe", dtype=torch.float16)
    calibration_text = tmp_path / "text.txt"  # varied enough to reach every expert; for others llama-quantize has ones
    calibration_text.write_text("\n".join(text for _, text in CHECK_TEXTS), encoding="utf-8")
    types = ("Q2_K", "Q4_K", "IQ4_XS", "IQ2_XXS", "Q3_K")
    compare(run_cli, tmp_path, model, calibration_text, types, token_embd="Q6_K", output="Q6_K")


@pytest.mark.slow
def test_same_bytes_of_every_slow_type(run_cli: RunCli, tmp_path: Path, tied_f16: Path, calibration_text: Path) -> None:
    turned = SLOW + SLOW[1:] + SLOW[:1] + SLOW[2:] + SLOW[:2]  # so that query and key have three of them each
    compare(run_cli, tmp_path, tied_f16, calibration_text, turned, token_embd="Q8_0")


def test_the_comparison_notices_wrong_importance(
    run_cli: RunCli, tmp_path: Path, tied_f16: Path, calibration_text: Path
) -> None:
    def shifted(imatrix: Path) -> Importance:
        return {name: np.roll(values, 1) for name, values in mean_squared_inputs(imatrix).items()}

    with pytest.raises(AssertionError, match=r"token_embd\.weight"):
        compare(run_cli, tmp_path, tied_f16, calibration_text, ("Q2_K",), read_importance=shifted, token_embd="Q6_K")

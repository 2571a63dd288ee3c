"""Heads for multi-token prediction: left out with a note, or kept as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import llama_cpp as api
from safetensors.torch import load_file, save_file
from support import converter
from support.command import RunCli
from support.families import TINY_MODELS, edit_config
from support.reports import PLAIN
from support.wrappers import WRAPPERS

from lieq_gguf.errors import SourceError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.native import ggml
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory

Tensors = dict[str, torch.Tensor]
NORMS_OF_QWEN = ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
NORMS_OF_NEMOTRON = ("mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.1.final_layernorm")


def head_of_qwen(tensors: Tensors) -> Tensors:
    """A layer with attention, which the last layer of the tiny model is, and what joins its inputs."""
    return copied(tensors, 3, 0) | joining(tensors, NORMS_OF_QWEN, "mtp.fc")


def head_of_nemotron(tensors: Tensors) -> Tensors:
    """Attention as in the third layer, experts as in the last, and what joins the inputs."""
    layers = copied(tensors, 2, 0) | copied(tensors, 3, 1)
    return layers | joining(tensors, NORMS_OF_NEMOTRON, "mtp.layers.0.eh_proj")


def copied(tensors: Tensors, layer: int, layer_of_head: int) -> Tensors:
    """A layer of the model as one of the head."""
    middle = f".layers.{layer}."
    return {
        f"mtp.layers.{layer_of_head}.{name.partition(middle)[2]}": tensor.clone()
        for name, tensor in tensors.items()
        if middle in name
    }


def joining(tensors: Tensors, norms: tuple[str, ...], matrix: str) -> Tensors:
    """Norms, and the matrix behind two of them."""
    width = next(t for name, t in tensors.items() if name.endswith(("embed_tokens.weight", "embeddings.weight"))).shape[
        1
    ]
    result = {f"{name}.weight": torch.rand(width).bfloat16() for name in norms}
    return result | {f"{matrix}.weight": torch.randn(width, 2 * width).bfloat16()}


def with_head(path: Path) -> Path:
    """Give a model of Qwen or Nemotron a head."""
    config = json.loads((path / "config.json").read_text())
    is_nemotron = config["model_type"] == "nemotron_h"
    make: Callable[[Tensors], Tensors] = head_of_nemotron if is_nemotron else head_of_qwen
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | make(tensors), file, {"format": "pt"})
    number = {"num_nextn_predict_layers" if is_nemotron else "mtp_num_hidden_layers": 1}
    edit_config(path, **({"text_config": config["text_config"] | number} if "text_config" in config else number))
    return path


QWEN = "Qwen3_5ForConditionalGeneration"
WITH_HEAD: dict[str, Callable[[Path], Path]] = {
    name: TINY_MODELS[name].write for name in ("qwen35", "qwen35moe", "nemotron-3", "nemotron-3-super")
} | {name: WRAPPERS[name].write for name in (QWEN, "Qwen3_5MoeForConditionalGeneration")}


def test_a_head_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = with_head(WRAPPERS[QWEN].write(tmp_path / "model"))
    [note] = [note for note in ModelDirectory(path).notes if "multi-token" in note]
    assert note.startswith("the heads for multi-token prediction (0.00 GB) are left out; ")
    assert note.endswith("--mtp keep writes them")


@pytest.mark.parametrize("name", WITH_HEAD)
def test_a_head_is_kept_in_eight_bits(name: str, llama_cpp: Path, tmp_path: Path, run_cli: RunCli) -> None:
    path, file = with_head(WITH_HEAD[name](tmp_path / "model")), tmp_path / "kept.gguf"
    n_layers = ModelDirectory(path).spec.n_layers
    made = run_cli("convert", path, "--bits", 16, "--types", "F16", "--mtp", "keep", "-o", file, "-q", "--no-imatrix")
    assert made.exit_code == 0, made.stderr
    job = converter.Job(path, file, tmp_path / "theirs.gguf")
    converter.run_converter([job], llama_cpp)
    result = converter.compare_files(file, job.theirs)
    ours = {t.spec.name: t for t in GgufFile(file).tensors}
    of_head = {name for name in ours if name.startswith(f"blk.{n_layers}.")}
    assert result.keys.keys() <= {"general.file_type", "general.quantization_version"}
    routers = {name for name in of_head if "ffn_gate_inp" in name}  # of Nemotron's, the converter's is F16
    matrices = {name for name in of_head if len(ours[name].spec.shape) > 1} - routers
    assert matrices <= result.tensors.keys() <= matrices | routers
    for tensor in result.tensors:
        theirs = next(t for t in GgufFile(job.theirs).tensors if t.spec.name == tensor)
        a, b = (ggml.dequantize(t.data, t.quant_type) for t in (ours[tensor], theirs))
        assert ours[tensor].quant_type.name == ("F32" if tensor in routers else "Q8_0")
        assert np.abs(a - b).max() < 0.005 * np.abs(b).max(), tensor
    assert GgufFile(file).n_layers == n_layers
    assert run_cli("verify", file, "--source", path, "-q").exit_code == 0
    assert builds_graph_of_head(file)
    source = GgufSource(file, SourceOptions(allow_requantize=True))
    assert source.why_not_supported == ""
    assert source.spec.tensors == ModelDirectory(path, keeps_mtp=True).spec.tensors


def builds_graph_of_head(file: Path) -> bool:
    """Whether llama.cpp loads the head, which it does not by default, and plans its graph."""
    settings = api.llama_model_default_params()
    settings.load_mtp = True
    model = api.llama_model_load_from_file(str(file).encode(), settings)
    assert model is not None
    of_context = api.llama_context_default_params()
    of_context.n_ctx, of_context.ctx_type = 64, api.LLAMA_CONTEXT_TYPE_MTP
    context = api.llama_init_from_model(model, of_context)
    n_heads = api.llama_model_n_layer_nextn(model)
    if context is not None:
        api.llama_free(context)
    api.llama_model_free(model)
    return context is not None and n_heads == 1


def test_a_kept_head_is_copied_when_its_file_is_converted(tmp_path: Path, run_cli: RunCli) -> None:
    """A file that has nothing quantised but the head needs no --allow-requantize, since no error is added."""
    path, first, second = (
        with_head(WITH_HEAD["qwen35moe"](tmp_path / "model")),
        tmp_path / "a.gguf",
        tmp_path / "b.gguf",
    )
    made = run_cli("convert", path, *PLAIN, "--mtp", "keep", "-o", first)
    assert made.exit_code == 0, made.stderr
    done = run_cli("convert", first, "--bits", 8.5, "--types", "Q8_0", "--no-imatrix", "-o", second)
    assert done.exit_code == 0, done.stderr
    assert "already quantised" not in done.stderr
    of_head = [
        {t.spec.name: t for t in GgufFile(file).tensors if t.spec.name.startswith("blk.4.")} for file in (first, second)
    ]
    assert any(t.quant_type.name == "Q8_0" for t in of_head[0].values())
    assert all(np.array_equal(of_head[1][name].data, t.data) for name, t in of_head[0].items())


def test_a_head_that_is_not_there_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no head for multi-token prediction; leave out --mtp keep"):
        ModelDirectory(TINY_MODELS["qwen35"].write(tmp_path / "model"), keeps_mtp=True)


def test_a_head_that_llama_cpp_does_not_run_is_not_kept(tmp_path: Path) -> None:
    path = TINY_MODELS["qwen3"].write(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.zeros(2, 2)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="only of qwen35, nemotron_h_moe, qwen35moe, not of qwen3; leave out"):
        ModelDirectory(path, keeps_mtp=True)
    assert not any("--mtp keep" in note for note in ModelDirectory(path).notes)


def test_a_file_with_a_head_is_compared_only_with_a_model_that_has_one(tmp_path: Path, run_cli: RunCli) -> None:
    path, file = with_head(TINY_MODELS["qwen35"].write(tmp_path / "model")), tmp_path / "kept.gguf"
    made = run_cli("convert", path, "--bits", 16, "--types", "F16", "--mtp", "keep", "-o", file, "-q", "--no-imatrix")
    assert made.exit_code == 0, made.stderr
    without = TINY_MODELS["qwen35"].write(tmp_path / "without")
    done = run_cli("verify", file, "--source", without, "-q")
    assert done.exit_code == 1
    assert "none that it can be compared with; compare a file without it" in done.stderr
    dropped = ("--mtp", "drop", "--bits", 16, "--types", "F16", "--no-imatrix", "-q")
    assert run_cli("convert", without, *dropped, "-o", tmp_path / "dropped.gguf").exit_code == 0
    assert run_cli("verify", tmp_path / "dropped.gguf", "--source", without, "-q").exit_code == 0

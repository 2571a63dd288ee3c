"""Models of images and text: their language model is converted, whatever its tensors are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import converter
from support.command import RunCli
from support.families import ON_PURPOSE, TINY_MODELS, edit_config
from support.requests import convert_plainly
from support.wrappers import WRAPPERS

from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory

NOT_IN_CONVERTER = {"Lfm2VlForConditionalGeneration"}  # only its part for images
EVERY_WRAPPER = pytest.mark.parametrize("name", WRAPPERS)


def text_alone(wrapper: Path, name: str, path: Path) -> Path:
    """The language model of a wrapper as a model of its own."""
    config = json.loads((wrapper / "config.json").read_text())
    path.mkdir()
    WRAPPERS[name].tiny.write_tokenizer(path)
    source = ModelDirectory(wrapper)
    tensors = {
        name: matrix.clone()
        for t in source.spec.tensors
        if t.source_name is not None
        for name, matrix in zip(t.source_names, source.read(t) if t.of_experts else [source.read(t)], strict=True)
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    own = {key: source.spec.config[key] for key in ("architectures", "n_deepstack_layers") if key in source.spec.config}
    text = config["text_config"] | own
    (path / "config.json").write_text(json.dumps(text | {"tie_word_embeddings": config["tie_word_embeddings"]}))
    return path


def with_prefixes_of_version_4(path: Path) -> None:
    """Rename tensors as version 4 of transformers saved them."""
    file = path / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        if name.startswith("model.language_model."):
            name = name.replace("model.language_model.", "language_model.model.", 1)
        elif name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        renamed[name.removeprefix("model.")] = tensor
    save_file(renamed, file, {"format": "pt"})


@EVERY_WRAPPER
def test_the_language_model_inside_is_converted(name: str, tmp_path: Path) -> None:
    path = WRAPPERS[name].write(tmp_path / "model")
    expected = convert_plainly(text_alone(path, name, tmp_path / "text"), tmp_path / "expected.gguf")
    found = convert_plainly(path, tmp_path / "found.gguf")
    result = converter.compare_files(found, expected)
    assert result.tensors == {}
    assert {key for key in result.keys if not key.startswith("general.")} == set()
    assert "parts for images and sound" in " ".join(ModelDirectory(path).notes)
    agreement, difference = converter.compare_logits(path, found)
    assert agreement > 0.98
    assert difference < 0.03 or WRAPPERS[name].tiny.has_experts  # close decisions of a router are rounded to others
    with_prefixes_of_version_4(path)
    assert converter.compare_files(convert_plainly(path, tmp_path / "older.gguf"), expected).tensors == {}


@pytest.mark.slow
def test_the_converter_makes_the_same_of_wrappers(llama_cpp: Path, tmp_path: Path) -> None:
    wrappers = {name: wrapper for name, wrapper in WRAPPERS.items() if name not in NOT_IN_CONVERTER}
    paths = {name: wrapper.write(tmp_path / name) for name, wrapper in wrappers.items()}
    files = {name: convert_plainly(path, tmp_path / f"{name}.gguf") for name, path in paths.items()}
    jobs = [
        converter.Job(paths[name], files[name], tmp_path / f"{name}-theirs.gguf", wrapper.tiny.converter_options)
        for name, wrapper in wrappers.items()
    ]
    converter.run_converter(jobs, llama_cpp)
    for job in jobs:
        result = converter.compare_files(job.ours, job.theirs)
        tiny = WRAPPERS[job.model.name].text
        keys = {key: words for key, words in result.keys.items() if key not in ON_PURPOSE.get(tiny, {})}
        assert (job.model.name, result.tensors, keys) == (job.model.name, {}, {})


def test_a_wrapper_of_another_text_model_is_refused_by_its_name(tmp_path: Path) -> None:
    path = WRAPPERS["Gemma3ForConditionalGeneration"].write(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    edit_config(path, text_config=config["text_config"] | {"model_type": "gemma9_text"})
    with pytest.raises(ArchitectureError, match=r"text_config .* 'gemma9_text'.* supported with gemma3_text"):
        ModelDirectory(path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_the_whole_model_is_merged_into_its_language_model(prefix: str, tmp_path: Path) -> None:
    path = WRAPPERS["Qwen3_5ForConditionalGeneration"].write(tmp_path / "model")
    module = "layers.3.self_attn.o_proj"
    n_out, n_in = ModelDirectory(path).read(matrix_of(path, f"model.{module}.weight")).shape
    a, b = torch.randn(4, n_in), torch.randn(n_out, 4)
    folder = tmp_path / "adapter"
    folder.mkdir()
    names = {f"base_model.model.{prefix}{module}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    save_file(names, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensor = matrix_of(path, f"model.{module}.weight")
    change = ModelDirectory(path, folder).read(tensor) - ModelDirectory(path).read(tensor).float()
    assert torch.allclose(change, 2 * b @ a, atol=1e-4)


def matrix_of(path: Path, name: str) -> TensorSpec:
    return next(t for t in ModelDirectory(path).spec.tensors if t.source_name == name)


def test_keys_that_gemma_4_never_reads_are_left_out(llama_cpp: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """Published weights have them for the layers that use those of earlier ones, and the converter writes them."""
    path = TINY_MODELS["gemma4"].write(tmp_path / "model")
    file = path / "model.safetensors"
    tensors = load_file(file)
    own = {name: t.clone() for name, t in tensors.items() if name.startswith("model.layers.0.self_attn.")}
    unread = {name.replace("layers.0.", "layers.4."): t for name, t in own.items() if ".k_" in name or ".v_" in name}
    assert unread and not unread.keys() & tensors.keys()
    save_file(tensors | unread, file, {"format": "pt"})
    assert any(f"{len(unread)} tensors that the model does not use" in note for note in ModelDirectory(path).notes)
    ours = convert_plainly(path, tmp_path / "ours.gguf")
    job = converter.Job(path, ours, tmp_path / "theirs.gguf")
    converter.run_converter([job], llama_cpp)
    result = converter.compare_files(ours, job.theirs)
    assert result.tensors.keys() == {f"blk.4.attn_{role}.weight" for role in ("k", "v", "k_norm")}
    assert set(GgufSource(job.theirs).spec.tensors) == set(GgufSource(ours).spec.tensors)
    assert run_cli("verify", job.theirs, "--source", path, "-q").exit_code == 0

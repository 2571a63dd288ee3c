"""Models of images and text: their language model is converted, whatever its tensors are called."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import converter
from support.command import RunCli
from support.families import ON_PURPOSE, SIZES, TEXT_PARTS, TINY_MODELS, TinyModel, edit_config
from support.requests import convert_plainly
from transformers import AutoConfig, AutoModelForImageTextToText

from lieq_gguf.errors import ArchitectureError, SourceError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.native import ggml
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory

PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 16, "image_size": 32, "patch_size": 16,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
}  # fmt: skip
SIGLIP_2 = SIGLIP | {"model_type": "siglip2_vision_model", "num_patches": 4}
QWEN = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256,
    "num_position_embeddings": 16, "patch_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """A model of images and text.

    Attributes:
        model_type: transformers' name of it.
        text: The tiny model that its language model is.
        vision: Configuration of what sees.
        settings: The rest of the configuration.
    """

    model_type: str
    text: str
    vision: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tiny(self) -> TinyModel:
        return {**TINY_MODELS, **TEXT_PARTS}[self.text]

    def write(self, path: Path) -> Path:
        tiny = self.tiny
        path.mkdir(parents=True)
        n_vocab = tiny.write_tokenizer(path)
        sizes = {"vocab_size": n_vocab, "vocab_size_per_layer_input": n_vocab}
        text = {"model_type": tiny.model_type} | sizes | SIZES | dict(tiny.settings)
        if "intermediate_size" not in AutoConfig.for_model(tiny.model_type).to_dict():
            del text["intermediate_size"]
        tied = {"tie_word_embeddings": text.get("tie_word_embeddings", True)}
        config = AutoConfig.for_model(
            self.model_type, text_config=text, vision_config=dict(self.vision), **tied, **self.settings
        )
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.data.mul_(tiny.head_norms)
        model.save_pretrained(path)
        return path


GEMMA_4 = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "patch_size": 16, "position_embedding_size": 64,
}  # fmt: skip
WRAPPERS = {
    "Gemma3ForConditionalGeneration": Wrapper("gemma3", "gemma3", SIGLIP, {"mm_tokens_per_image": 4}),
    "Gemma4ForConditionalGeneration": Wrapper("gemma4", "gemma4", GEMMA_4, {"audio_config": None}),
    "Gemma4ForConditionalGeneration, experts": Wrapper("gemma4", "gemma4-moe", GEMMA_4, {"audio_config": None}),
    "Mistral3ForConditionalGeneration": Wrapper("mistral3", "ministral3", PIXTRAL, {"image_token_index": 10}),
    "Qwen3VLForConditionalGeneration": Wrapper("qwen3_vl", "qwen3vl", QWEN | {"deepstack_visual_indexes": [0]}),
    "Qwen3_5MoeForConditionalGeneration": Wrapper("qwen3_5_moe", "qwen35moe", QWEN),
    "Qwen3_5ForConditionalGeneration": Wrapper("qwen3_5", "qwen35", QWEN),
    "Lfm2VlForConditionalGeneration": Wrapper("lfm2_vl", "lfm2", SIGLIP_2, {"image_token_id": 10}),
}
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


def with_mtp(path: Path) -> Path:
    """Add a head for multi-token prediction, as Qwen3.5 has one: an attention layer, and what joins its inputs."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    # the last layer of the tiny model has attention
    start = next(name for name in tensors if ".layers.3." in name).partition("layers.3.")[0] + "layers.3."
    head = {name.replace(start, "mtp.layers.0."): t.clone() for name, t in tensors.items() if name.startswith(start)}
    width = head["mtp.layers.0.input_layernorm.weight"].shape[0]
    head |= {f"mtp.{name}.weight": torch.rand(width).bfloat16() for name in NORMS_OF_MTP}
    head["mtp.fc.weight"] = torch.randn(width, 2 * width).bfloat16()
    save_file(tensors | head, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    text = {"mtp_num_hidden_layers": 1}
    edit_config(path, **({"text_config": config["text_config"] | text} if "text_config" in config else text))
    return path


NORMS_OF_MTP = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")


def test_a_head_for_several_tokens_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = with_mtp(WRAPPERS["Qwen3_5ForConditionalGeneration"].write(tmp_path / "model"))
    [note] = [note for note in ModelDirectory(path).notes if "multi-token" in note]
    assert note.startswith("the heads for multi-token prediction (0.00 GB) are left out; ")
    assert note.endswith("--mtp keep writes them")


@pytest.mark.parametrize("in_wrapper", [False, True])
def test_a_head_for_several_tokens_is_kept_in_eight_bits(
    in_wrapper: bool, llama_cpp: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    tiny = TINY_MODELS["qwen35"]
    write = WRAPPERS["Qwen3_5ForConditionalGeneration"].write if in_wrapper else tiny.write
    path, file = with_mtp(write(tmp_path / "model")), tmp_path / "kept.gguf"
    made = run_cli("convert", path, "--bits", 16, "--types", "F16", "--mtp", "keep", "-o", file, "-q", "--no-imatrix")
    assert made.exit_code == 0, made.stderr
    job = converter.Job(path, file, tmp_path / "theirs.gguf")
    converter.run_converter([job], llama_cpp)
    result = converter.compare_files(file, job.theirs)
    ours = {t.spec.name: t for t in GgufFile(file).tensors}
    of_head = {name for name in ours if name.startswith("blk.4.")}
    assert result.keys.keys() <= {"general.file_type", "general.quantization_version"}
    assert result.tensors.keys() == {name for name in of_head if len(ours[name].spec.shape) > 1}
    for name in result.tensors:
        theirs = next(t for t in GgufFile(job.theirs).tensors if t.spec.name == name)
        a, b = (ggml.dequantize(t.data, t.quant_type) for t in (ours[name], theirs))
        assert ours[name].quant_type.name == "Q8_0"
        assert np.abs(a - b).max() < 0.005 * np.abs(b).max(), name
    assert GgufFile(file).n_layers == 4
    assert run_cli("verify", file, "--source", path, "-q").exit_code == 0
    assert GgufSource(file, SourceOptions(allow_requantize=True)).has_transformers_model


def test_a_head_that_is_not_there_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no head for multi-token prediction; leave out --mtp keep"):
        ModelDirectory(TINY_MODELS["qwen35"].write(tmp_path / "model"), keeps_mtp=True)


def test_a_file_with_a_head_is_compared_only_with_a_model_that_has_one(tmp_path: Path, run_cli: RunCli) -> None:
    path, file = with_mtp(TINY_MODELS["qwen35"].write(tmp_path / "model")), tmp_path / "kept.gguf"
    made = run_cli("convert", path, "--bits", 16, "--types", "F16", "--mtp", "keep", "-o", file, "-q", "--no-imatrix")
    assert made.exit_code == 0, made.stderr
    without = TINY_MODELS["qwen35"].write(tmp_path / "without")
    done = run_cli("verify", file, "--source", without, "-q")
    assert done.exit_code == 1
    assert "none that it can be compared with; compare a file without it" in done.stderr
    dropped = ("--mtp", "drop", "--bits", 16, "--types", "F16", "--no-imatrix", "-q")
    assert run_cli("convert", without, *dropped, "-o", tmp_path / "dropped.gguf").exit_code == 0
    assert run_cli("verify", tmp_path / "dropped.gguf", "--source", without, "-q").exit_code == 0


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

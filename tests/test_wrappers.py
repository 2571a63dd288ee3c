"""Models of images and text: their language model is converted, whatever its tensors are called."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import converter
from support.families import ON_PURPOSE, SIZES, TEXT_PARTS, TINY_MODELS, TinyModel, edit_config
from support.requests import convert_plainly
from transformers import AutoConfig, AutoModelForImageTextToText

from lieq_gguf.errors import ArchitectureError
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
    assert difference < 0.03 or "Moe" in name  # close decisions of a router are rounded to others
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


def test_heads_that_predict_several_tokens_are_left_out_with_a_note(tmp_path: Path) -> None:
    path = WRAPPERS["Qwen3_5ForConditionalGeneration"].write(tmp_path / "model")
    file = path / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.zeros(256, 512)}, file, {"format": "pt"})
    assert any("multi-token prediction (0.00 GB) are left out" in note for note in ModelDirectory(path).notes)

"""Models of images and text, each around a tiny model of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from support.families import SIZES, TEXT_PARTS, TINY_MODELS, TinyModel

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

"""Models of images, sound and text: which language model is inside, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lieq_gguf.architectures.checks import Config
from lieq_gguf.errors import ArchitectureError

_TEXT_PARTS: Mapping[str, Mapping[str, str]] = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Gemma4ForConditionalGeneration": {"gemma4_text": "Gemma4ForCausalLM"},
    "Lfm2VlForConditionalGeneration": {"lfm2": "Lfm2ForCausalLM"},
    "Mistral3ForConditionalGeneration": {"ministral3": "Ministral3ForCausalLM", "mistral": "Mistral3ForCausalLM"},
    "Qwen3VLForConditionalGeneration": {"qwen3_vl_text": "Qwen3VLTextModel"},
    "Qwen3_5MoeForConditionalGeneration": {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"},
    "Qwen3_5ForConditionalGeneration": {"qwen3_5_text": "Qwen3_5ForCausalLM"},
}
"""Class of the whole model to transformers' name of the text part to the class of that part alone."""


def is_wrapper(config: Config) -> bool:
    """Whether a ``config.json`` is that of a model with a language model inside."""
    return isinstance(config.get("text_config"), Mapping) and _class_of(config) in _TEXT_PARTS


def language_model_config(config: Config) -> Config:
    """The configuration of the language model, as if it were a model of its own.

    Raises:
        ArchitectureError: if it is one that its wrapper is not known to have.
    """
    if not is_wrapper(config):
        return config
    text = config["text_config"]
    known = _TEXT_PARTS[_class_of(config)]
    part = known.get(text.get("model_type") or next(iter(known)))
    if part is None:
        raise ArchitectureError(
            f"text_config in config.json is of model_type {text.get('model_type')!r}; "
            f"{_class_of(config)} is supported with {', '.join(known)}"
        )
    tied = [settings["tie_word_embeddings"] for settings in (config, text) if "tie_word_embeddings" in settings]
    shared: dict[str, Any] = {"architectures": [part]}
    seen = config.get("vision_config")
    if isinstance(seen, Mapping) and seen.get("deepstack_visual_indexes"):
        shared["n_deepstack_layers"] = len(seen["deepstack_visual_indexes"])
    if tied:  # the two often contradict each other; an output matrix in the files is used in any case
        shared["tie_word_embeddings"] = any(tied)
    return {**text, **shared}


def _class_of(config: Config) -> str:
    given = config.get("architectures") or [""]
    return str(given[0] if isinstance(given, list) else given)

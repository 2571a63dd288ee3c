"""Metadata of a file made from a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from lieq_gguf.architectures import Decoder
from lieq_gguf.formats.gguf_header import HeaderWriter
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.sources.source import SourceMetadata
from lieq_gguf.tokenizers import Vocabulary

INITIALIZER_RANGE = "lieq.initializer_range"
"""Key for the only number that scores need from ``config.json`` and that llama.cpp has no key for."""
_LISTS = ("base_models", "tags", "languages", "datasets")


def directory_metadata(
    path: Path, repository: str | None, spec: ModelSpec, family: Decoder, vocabulary: Vocabulary, adapter: str | None
) -> SourceMetadata:
    """Names from the model card, hyper-parameters from ``config.json``, and the tokenizer.

    Args:
        path: The directory.
        repository: Its name on the hub, ``owner/name``, or None.
        spec: The model.
        family: The functions of its architecture.
        vocabulary: Its tokenizer.
        adapter: Name of the adapter that is merged into it, or None.

    Raises:
        FormatError: if a value cannot be stored.
    """
    writer = HeaderWriter(spec.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    names, note = _names(path, repository, spec)
    names.set_gguf_meta_model(writer)
    family.add_hyper_parameters(spec.config, writer)
    vocabulary.add_to(writer)
    if adapter is not None:
        writer.add_string("lieq.adapter", adapter)
    initializer_range = spec.config.get("initializer_range")
    if isinstance(initializer_range, (int, float)):
        writer.add_float64(INITIALIZER_RANGE, initializer_range)
    return SourceMetadata(writer.values, vocabulary, vocabulary.warnings, (note,) if note else ())


def _names(path: Path, repository: str | None, spec: ModelSpec) -> tuple[gguf.Metadata, str]:
    """Name, author, licence and the like, and a note if the model card cannot be read."""
    note = ""
    try:
        metadata = gguf.Metadata.load(None, path, None, spec.n_weights)
        if repository is not None:
            _name_after_repository(metadata, path, repository, spec)
        metadata = _as_stored(metadata)
    except Exception as error:  # the card is for people, and people write anything into it
        metadata = gguf.Metadata()
        note = f"the model card cannot be read ({' '.join(str(error).split()):.100}); names and licence are left out"
    if repository is not None and metadata.source_repo_url is None:
        metadata.source_repo_url = f"https://huggingface.co/{repository}"
    if metadata.name is None:
        metadata.name = spec.name
    if metadata.size_label is None:
        metadata.size_label = _size_label(spec)
    return metadata, note


def _as_stored(metadata: gguf.Metadata) -> gguf.Metadata:
    """The same with text where the format has text, whatever YAML has made of it; settings that are no numbers go."""
    result = gguf.Metadata()
    for key, value in vars(metadata).items():
        if key == "sampling_sequence" or not key.startswith("sampling_"):
            is_list = key in _LISTS or (key == "license" and isinstance(value, list))
            setattr(result, key, _as_text(value, in_list=is_list))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(result, key, value)
    return result


def _as_text(value: Any, in_list: bool = False) -> Any:
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, Mapping):
        return {str(key): text for key, item in value.items() if (text := _as_text(item)) is not None}
    if in_list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [text for item in items if (text := _as_text(item)) is not None] or None
    if isinstance(value, (list, tuple)):
        return ", ".join(text for item in value if isinstance(text := _as_text(item), str)) or None
    if isinstance(value, bool):
        return "yes" if value else "no"  # YAML's word for Norwegian, among others
    return str(value)


def _name_after_repository(metadata: gguf.Metadata, path: Path, repository: str, spec: ModelSpec) -> None:
    """Use the hub's name where gguf would use the directory's: a snapshot's directory is named by its commit."""
    card = gguf.Metadata.load_model_card(path)
    named = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, {"_name_or_path": repository}, None, spec.n_weights
    )
    for key in ("name", "organization", "basename", "finetune", "version", "size_label"):
        setattr(metadata, key, getattr(named, key))


def _size_label(spec: ModelSpec) -> str:
    """Number of weights for people, such as ``135M``, or ``8x1.6M`` with experts."""
    experts = [t for t in spec.tensors if t.of_experts]
    n_experts = experts[0].shape[0] if experts else 0
    of_experts = sum(t.n_weights for t in experts)
    n_shared = spec.n_weights - of_experts
    return gguf.size_label(spec.n_weights, n_shared, of_experts // n_experts if experts else 0, n_experts)

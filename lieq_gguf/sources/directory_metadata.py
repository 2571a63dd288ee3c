"""Metadata of a file made from a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import yaml

from lieq_gguf.architectures import Decoder
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.tokenizers import Vocabulary

INITIALIZER_RANGE = "lieq.initializer_range"
"""Key for the only number that scores need from ``config.json`` and that llama.cpp has no key for."""


@dataclass(frozen=True)
class DirectoryMetadata:
    """Names from the model card, hyper-parameters from ``config.json``, and the tokenizer.

    Attributes:
        path: The directory.
        repository: Its name on the hub, ``owner/name``, or None.
        spec: The model.
        family: The functions of its architecture.
        vocabulary: Its tokenizer.
        adapter: Name of the adapter that is merged into it, or None.
    """

    path: Path
    repository: str | None
    spec: ModelSpec
    family: Decoder
    vocabulary: Vocabulary
    adapter: str | None = None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write all metadata."""
        writer.add_type(gguf.GGUFType.MODEL)
        self._add_general(writer)
        self.family.add_hyper_parameters(self.spec.config, writer)
        self.vocabulary.add_to(writer)
        if self.adapter is not None:
            writer.add_string("lieq.adapter", self.adapter)
        initializer_range = self.spec.config.get("initializer_range")
        if isinstance(initializer_range, (int, float)):
            writer.add_float64(INITIALIZER_RANGE, initializer_range)

    def _add_general(self, writer: gguf.GGUFWriter) -> None:
        try:
            metadata = gguf.Metadata.load(None, self.path, None, self.spec.n_weights)
            if self.repository is not None:
                self._name_after_repository(metadata, self.repository)
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            metadata = gguf.Metadata()  # the model card is only for people, so errors in it do not matter
        if self.repository is not None and metadata.source_repo_url is None:
            metadata.source_repo_url = f"https://huggingface.co/{self.repository}"
        if metadata.name is None:
            metadata.name = self.spec.name
        if metadata.size_label is None:
            metadata.size_label = self._size_label()
        metadata.set_gguf_meta_model(writer)

    def _name_after_repository(self, metadata: gguf.Metadata, repository: str) -> None:
        """Use the hub's name where gguf would use the directory's: a snapshot's directory is named by its commit."""
        card = gguf.Metadata.load_model_card(self.path)
        named = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(), card, {"_name_or_path": repository}, None, self.spec.n_weights
        )
        for key in ("name", "organization", "basename", "finetune", "version", "size_label"):
            setattr(metadata, key, getattr(named, key))

    def _size_label(self) -> str:
        """Number of weights for people, such as ``135M``, or ``8x1.6M`` with experts."""
        experts = [t for t in self.spec.tensors if t.of_experts]
        n_experts = experts[0].shape[0] if experts else 0
        of_experts = sum(t.n_weights for t in experts)
        n_shared = self.spec.n_weights - of_experts
        return gguf.size_label(self.spec.n_weights, n_shared, of_experts // n_experts if experts else 0, n_experts)

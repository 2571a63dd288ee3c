"""What a file made from a model directory says of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import yaml

from lieq_gguf.architectures import Decoder
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.tokenizers import Vocabulary


@dataclass(frozen=True)
class DirectoryMetadata:
    """Names from the model card, hyper-parameters from ``config.json``, and the tokenizer.

    Attributes:
        path: The directory.
        spec: The model.
        family: The functions of its architecture.
        vocabulary: Its tokenizer.
        adapter: Name of the adapter that is merged into it, or None.
    """

    path: Path
    spec: ModelSpec
    family: Decoder
    vocabulary: Vocabulary
    adapter: str | None = None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write all of it."""
        writer.add_type(gguf.GGUFType.MODEL)
        self._add_general(writer)
        self.family.add_hyper_parameters(self.spec.config, writer)
        self.vocabulary.add_to(writer)
        if self.adapter is not None:
            writer.add_string("lieq.adapter", self.adapter)

    def _add_general(self, writer: gguf.GGUFWriter) -> None:
        try:
            metadata = gguf.Metadata.load(None, self.path, None, self.spec.n_weights)
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            metadata = gguf.Metadata()  # the model card is for people; one that cannot be parsed stops nothing
        if metadata.name is None:
            metadata.name = self.spec.name
        if metadata.size_label is None:
            metadata.size_label = gguf.size_label(self.spec.n_weights, 0, 0, 0)
        metadata.set_gguf_meta_model(writer)

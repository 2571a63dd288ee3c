"""What a model to convert has to offer, whatever it is kept in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import gguf

from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.row_order import FloatArray
from lieq_gguf.tokenizers import SourceTokenizer, Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class SourceMetadata(Protocol):
    """What a file says of the model besides its tensors."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer in llama.cpp's terms; None if it is taken over as it is."""

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write names, hyper-parameters and tokenizer."""


class Source(Protocol):
    """A model to convert: its spec from headers alone, its tensors on demand.

    There are two ways to a tensor, since transformers and llama.cpp do not keep all rows in the same order.
    """

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def spec(self) -> ModelSpec:
        """What it is made of."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may want to know of it."""

    @property
    def fingerprint(self) -> str:
        """A digest of its weights and configuration, of a few kilobytes a tensor."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """A digest of its tokenizer."""

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor as transformers has it: rows in its order, nothing added to a norm."""

    def rows(self, tensor: TensorSpec) -> Iterator[FloatArray]:
        """The weights in file order, some rows ``[n_rows, n_in]`` at a time; a vector is one row."""

    def release(self) -> None:
        """Let go of memory that reading took; tensors that were read stay valid."""

    def transformers_config(self) -> PretrainedConfig:
        """The configuration of transformers' model, for float32.

        Raises:
            SourceError: if transformers has none.
        """

    def load_tokenizer(self) -> SourceTokenizer:
        """The model's own tokenizer."""

    def read_metadata(self, pre_tokenizer: str | None = None) -> SourceMetadata:
        """What the file is to say of the model.

        Args:
            pre_tokenizer: llama.cpp's name of it, if it cannot be recognised.

        Raises:
            TokenizerError: if llama.cpp cannot tokenise as the model does.
        """

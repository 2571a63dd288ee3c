"""The interface of a model to convert, whatever its form of storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.file_order import ByteArray, FloatArray
from lieq_gguf.tokenizers import SourceTokenizer, Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class SourceMetadata:
    """Names, hyper-parameters and tokenizer of the model, as the file to write will store them.

    Attributes:
        values: Key to stored bytes, its type first; in file order.
        vocabulary: The tokenizer in llama.cpp's terms; None if it is copied unchanged.
        warnings: What the user should know about them.
        notes: What the user may want to know.
    """

    values: Mapping[str, bytes]
    vocabulary: Vocabulary | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """A model to convert: its spec from headers alone, its tensors on demand.

    There are two ways to read a tensor, since transformers and llama.cpp do not store all rows in the same order.
    """

    @property
    def path(self) -> Path:
        """Its path."""

    @property
    def spec(self) -> ModelSpec:
        """Its tensors and structure."""

    @property
    def fingerprint(self) -> str:
        """A digest of its configuration and a few kilobytes of every tensor."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """A digest of its tokenizer."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before the conversion."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may want to know, less important than a warning."""

    @property
    def notes_on_scores(self) -> tuple[str, ...]:
        """What the user should know before layers are scored."""

    @property
    def has_transformers_model(self) -> bool:
        """Whether transformers has the model, so that its layers can be run one by one; if not, llama.cpp runs it."""

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor as transformers has it: rows in its order, nothing added to a norm."""

    def read_rows(self, tensor: TensorSpec, rows: Sequence[int]) -> torch.Tensor:
        """Some rows ``[n_rows, n_in]`` of a table of tokens; others are not decoded."""

    def read_head(self) -> torch.Tensor:
        """The output matrix that transformers uses ``[n_vocab, d_model]``, whatever the spec says."""

    def rows(self, tensor: TensorSpec) -> Iterator[FloatArray]:
        """The weights in file order, some rows ``[n_rows, n_in]`` at a time; a vector is one row."""

    def encoded_rows(self, tensor: TensorSpec, quant_type: QuantType) -> Iterator[ByteArray] | None:
        """Stored rows ``[n_rows, row_bytes]``, if they are already stored in this type and it is quantised."""

    def release(self) -> None:
        """Free memory used for reading; tensors that were read stay valid."""

    def check_output(self, output: Path) -> None:
        """Require that writing a file does not destroy the model.

        Raises:
            OutputError: if it would.
        """

    def transformers_config(self) -> PretrainedConfig:
        """The configuration of transformers' model, for float32.

        Raises:
            SourceError: if transformers cannot make one.
        """

    def load_tokenizer(self) -> SourceTokenizer:
        """The model's own tokenizer."""

    def transformers_ids(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Token ids that transformers makes of a text; None if it cannot load the tokenizer."""

    def read_metadata(self, pre_tokenizer: str | None = None) -> SourceMetadata:
        """Metadata for the file.

        Args:
            pre_tokenizer: llama.cpp's name of the pre-tokenizer, if it cannot be recognised.

        Raises:
            TokenizerError: if llama.cpp does not support the model's tokenizer.
            FormatError: if the format cannot store a value.
        """

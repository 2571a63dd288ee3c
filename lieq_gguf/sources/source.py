"""What a model to convert has to offer, whatever it is kept in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lieq_gguf.formats.gguf_header import HeaderWriter
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.row_order import ByteArray, FloatArray
from lieq_gguf.tokenizers import SourceTokenizer, Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class SourceMetadata(Protocol):
    """What a file says of the model besides its tensors."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer in llama.cpp's terms; None if it is taken over as it is."""

    def add_to(self, writer: HeaderWriter) -> None:
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
    def fingerprint(self) -> str:
        """A digest of its weights and configuration, of a few kilobytes a tensor."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """A digest of its tokenizer."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before it is converted."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What may interest the user, of less weight."""

    @property
    def notes_on_scores(self) -> tuple[str, ...]:
        """What the user should know before layers are scored."""

    @property
    def has_transformers_model(self) -> bool:
        """Whether transformers has the model, so that its layers can be run one by one; if not, llama.cpp runs it."""

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor as transformers has it: rows in its order, nothing added to a norm."""

    def rows(self, tensor: TensorSpec) -> Iterator[FloatArray]:
        """The weights in file order, some rows ``[n_rows, n_in]`` at a time; a vector is one row."""

    def encoded_rows(self, tensor: TensorSpec, quant_type: QuantType) -> Iterator[ByteArray] | None:
        """Rows ``[n_rows, row_bytes]`` as they are stored, if that is in a quantised type and in this one."""

    def release(self) -> None:
        """Let go of memory that reading took; tensors that were read stay valid."""

    def check_output(self, output: Path) -> None:
        """Require that writing a file does not destroy the model.

        Raises:
            OutputError: if it would.
        """

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

"""The reference for comparisons: a GGUF file in llama.cpp, or a model directory in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import EvaluationError
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import SourceTokenizer


class LanguageModel(Protocol):
    """What a comparison needs from a model."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""

    @property
    def n_vocab(self) -> int:
        """Number of logits per position."""

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def logits(self, ids: Sequence[int], first: int = 0) -> npt.NDArray[np.float32]:
        """Logits of the positions from ``first``, ``[n_tokens - first, n_vocab]``."""


class TransformersModel:
    """A model directory, run by transformers in float32 on the CPU."""

    def __init__(self, model: Any, tokenizer: SourceTokenizer, architecture: str) -> None:
        self.architecture = architecture
        self._model = model
        self._tokenizer = tokenizer
        self.n_vocab: int = model.config.get_text_config().vocab_size

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids by the model's own tokenizer."""
        return self._tokenizer.encode(text, add_special_tokens)

    def logits(self, ids: Sequence[int], first: int = 0) -> npt.NDArray[np.float32]:
        """Logits of the positions from ``first``, ``[n_tokens - first, n_vocab]``."""
        import torch

        with torch.inference_mode():
            output = self._model(torch.tensor([list(ids)]), logits_to_keep=len(ids) - first, use_cache=False)
        return np.asarray(output.logits[0].numpy(), dtype=np.float32)


def check_reference(path: Path) -> None:
    """Refuse what is no model, before any is loaded.

    Raises:
        EvaluationError: saying what can be compared with instead.
    """
    if not path.exists():
        raise EvaluationError(
            f"{path} does not exist; expected a GGUF file, a model directory, or a model on the Hugging Face hub as "
            "owner/name"
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise EvaluationError(
            f"{path} is an adapter; compare with a file that it is merged into, which is made by "
            f"convert MODEL --adapter {path} --types F16 --bits 16"
        )


@contextmanager
def open_reference(path: Path, n_ctx: int, n_threads: int) -> Iterator[LanguageModel]:
    """Load a reference for the length of a ``with``.

    Args:
        path: GGUF file or model directory.
        n_ctx: Tokens of a sequence.
        n_threads: Threads to run with.

    Raises:
        LieqError: if it cannot be loaded.
    """
    if not path.is_dir():
        with open_model(path, n_ctx=n_ctx, n_threads=n_threads) as model:
            yield model
        return
    source = ModelDirectory(path)  # raises a LieqError for an incomplete model

    import torch
    from transformers.utils.logging import disable_progress_bar

    from lieq_gguf.measure.base_model import without_time_limits

    disable_progress_bar()  # type: ignore[no-untyped-call]  # stderr has our own progress bar
    torch.set_num_threads(n_threads)
    loaded = source.load_model()
    loaded.train(False)
    without_time_limits(loaded)
    yield TransformersModel(loaded, source.load_tokenizer(), source.spec.architecture)

"""The calibration text and the token sequences made from it. Does not load torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import CalibrationError
from lieq_gguf.tokenizers import Conversation, SourceTokenizer, render

SHIPPED_TEXT = "shipped"
CHUNK_SIZE = 512
"""Tokens in a calibration sequence, as in llama-imatrix."""

_MIN_CHUNK_SIZE = 16


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate on.

    Attributes:
        content: The text.
        dataset: Its name.
        chats: Conversations that follow it, one JSON object a line; the model's own template renders them.
    """

    content: str
    dataset: str
    chats: str = ""

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """The conversations."""
        return tuple(json.loads(line) for line in self.chats.splitlines())

    def digest(self) -> str:
        """A digest of text and conversations."""
        return hashlib.sha256(f"{self.content}\0{self.chats}".encode()).hexdigest()

    def as_read_by(self, tokenizer: SourceTokenizer) -> str:
        """The whole text for a model."""
        return "\n\n".join([self.content, *(render(chat, tokenizer.chat_template) for chat in self.conversations)])


@dataclass(frozen=True)
class CalibrationTokens:
    """Token sequences to calibrate on.

    Attributes:
        ids: ``[n_chunks, chunk_size]``.
        dataset: Name of the text.
    """

    ids: npt.NDArray[np.int64]
    dataset: str


def read_calibration_texts(files: Sequence[Path] = ()) -> tuple[CalibrationText, ...]:
    """The texts of some files; the text that this package ships for its name, or if there are no files.

    Raises:
        CalibrationError: if a file cannot be read, is not UTF-8, or is empty.
    """
    return tuple(_read(file) for file in files or (Path(SHIPPED_TEXT),))


def joined_name(files: Sequence[Path]) -> str:
    """Name of the texts together."""
    return "+".join(file.name for file in files) or SHIPPED_TEXT


def _read(file: Path) -> CalibrationText:
    if file == Path(SHIPPED_TEXT):
        folder = resources.files("lieq_gguf").joinpath("data")
        names = ("calibration.txt", "calibration_chats.jsonl")
        text, chats = (folder.joinpath(name).read_text("utf-8") for name in names)
        return CalibrationText(text, SHIPPED_TEXT, chats)
    try:
        text = file.read_bytes().decode("utf-8")  # bytes, since text mode would change line endings
    except FileNotFoundError:
        raise CalibrationError(f"the calibration file {file} does not exist") from None
    except OSError as error:
        raise CalibrationError(f"the calibration file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the calibration file {file} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise CalibrationError(f"the calibration file {file} is empty; expected text, at least a few pages")
    return CalibrationText(text, file.name)


def tokenize(texts: Sequence[CalibrationText], tokenizer: SourceTokenizer, n_tokens: int) -> CalibrationTokens:
    """Cut texts into sequences, as many of each text as it has and others leave room for, spread evenly over it.

    As in llama-imatrix, the beginning-of-text token replaces the first token of every sequence if the tokenizer adds
    one.

    Raises:
        CalibrationError: if a text is too short to fill one sequence, or ``n_tokens`` is less than one of each text.
    """
    plain = [tokenizer.encode(text.as_read_by(tokenizer), add_special_tokens=False) for text in texts]
    bos = _first_token(texts[0].content[:64], tokenizer)
    chunk_size = min(CHUNK_SIZE, n_tokens, *map(len, plain))
    for text, tokens in zip(texts, plain, strict=True):
        # one short text would shorten the sequences of all
        least = _MIN_CHUNK_SIZE if len(texts) == 1 else min(CHUNK_SIZE, n_tokens)
        if len(tokens) < least:
            raise CalibrationError(
                f"the calibration text '{text.dataset}' gives {len(tokens)} tokens; expected at least {least}, "
                "better a few thousand"
            )
    n_chunks = max(1, n_tokens // chunk_size)
    if n_chunks < len(texts):
        raise CalibrationError(
            f"{len(texts)} calibration texts need at least {len(texts) * chunk_size} tokens; got --n-tokens {n_tokens}"
        )
    shares = _shares([len(tokens) // chunk_size for tokens in plain], n_chunks)
    ids = np.concatenate([_spread(tokens, chunk_size, n) for tokens, n in zip(plain, shares, strict=True)])
    if bos is not None:
        ids[:, 0] = bos
    return CalibrationTokens(ids, "+".join(text.dataset for text in texts))


def _first_token(text: str, tokenizer: SourceTokenizer) -> int | None:
    """The token that the tokenizer puts before a text, if it is one."""
    marked, unmarked = (tokenizer.encode(text, add_special_tokens=special) for special in (True, False))
    is_added = len(marked) > len(unmarked) and marked[1 : 1 + len(unmarked)] == unmarked
    return marked[0] if is_added else None


def _shares(available: Sequence[int], n_chunks: int) -> list[int]:
    """As many of ``n_chunks`` for each as are available, the same for all where there are enough."""
    shares, left = [0] * len(available), n_chunks
    shortest_first = sorted(range(len(available)), key=lambda i: available[i])
    for n_after, i in zip(reversed(range(len(available))), shortest_first, strict=True):
        shares[i] = min(available[i], left // (n_after + 1))
        left -= shares[i]
    return shares


def _spread(tokens: Sequence[int], chunk_size: int, n_chunks: int) -> npt.NDArray[np.int64]:
    """Sequences ``[n_chunks, chunk_size]`` spread evenly over a text."""
    n_available = len(tokens) // chunk_size
    ids = np.array(tokens[: n_available * chunk_size], dtype=np.int64).reshape(n_available, chunk_size)
    spread: npt.NDArray[np.int64] = ids[np.linspace(0, n_available - 1, n_chunks).round().astype(int)]
    return spread

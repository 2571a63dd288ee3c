"""The calibration text and the token sequences made from it. Does not load torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import CalibrationError
from lieq_gguf.tokenizers import SourceTokenizer

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
    """

    content: str
    dataset: str


@dataclass(frozen=True)
class CalibrationTokens:
    """Token sequences to calibrate on.

    Attributes:
        ids: ``[n_chunks, chunk_size]``.
        dataset: Name of the text.
    """

    ids: npt.NDArray[np.int64]
    dataset: str


def read_calibration_text(file: Path | None) -> CalibrationText:
    """The text of a file, or the text that this package ships.

    Raises:
        CalibrationError: if the file cannot be read, is not UTF-8, or is empty.
    """
    if file is None:
        text = resources.files("lieq_gguf").joinpath("data", "calibration.txt").read_text(encoding="utf-8")
        return CalibrationText(text, SHIPPED_TEXT)
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


def tokenize(text: CalibrationText, tokenizer: SourceTokenizer, n_tokens: int) -> CalibrationTokens:
    """Cut a text into sequences, spread evenly over it if it is longer than ``n_tokens``.

    As in llama-imatrix, the beginning-of-text token replaces the first token of every sequence if the tokenizer adds
    one.

    Raises:
        CalibrationError: if the text is too short to fill one sequence.
    """
    plain = tokenizer.encode(text.content, add_special_tokens=False)
    marked = tokenizer.encode(text.content[:64], add_special_tokens=True)
    unmarked = tokenizer.encode(text.content[:64], add_special_tokens=False)
    starts_with_bos = len(marked) > len(unmarked) and marked[1 : 1 + len(unmarked)] == unmarked
    chunk_size = min(CHUNK_SIZE, len(plain), n_tokens)
    if chunk_size < _MIN_CHUNK_SIZE:
        raise CalibrationError(
            f"the calibration text '{text.dataset}' gives {chunk_size} tokens; expected at least {_MIN_CHUNK_SIZE}, "
            "better a few thousand"
        )
    n_available = len(plain) // chunk_size
    n_chunks = min(n_available, max(1, n_tokens // chunk_size))
    ids = np.array(plain[: n_available * chunk_size], dtype=np.int64).reshape(n_available, chunk_size)
    ids = ids[np.linspace(0, n_available - 1, n_chunks).round().astype(int)]
    if starts_with_bos:
        ids[:, 0] = marked[0]
    return CalibrationTokens(ids, text.dataset)

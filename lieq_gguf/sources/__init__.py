"""What models to convert are kept in."""

from __future__ import annotations

from pathlib import Path

from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source


def is_gguf(path: Path) -> bool:
    """Whether there is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_source(path: Path, *, allow_requantize: bool = False) -> Source:
    """Open a model to convert, a model directory or a GGUF file.

    Args:
        path: Where it is.
        allow_requantize: Whether a GGUF file may be quantised already.

    Raises:
        LieqError: if it is no readable model.
    """
    return GgufSource(path, allow_requantize=allow_requantize) if is_gguf(path) else ModelDirectory(path)

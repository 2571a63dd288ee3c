"""What models to convert are kept in."""

from __future__ import annotations

from pathlib import Path

from lieq_gguf.errors import SourceError
from lieq_gguf.sources import gguf_source, model_directory
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source


def is_gguf(path: Path) -> bool:
    """Whether there is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_source(path: Path, adapter: Path | None = None, *, allow_requantize: bool = False) -> Source:
    """Open a model to convert, a model directory or a GGUF file.

    Args:
        path: Where it is.
        adapter: Directory of a LoRA adapter to merge into it.
        allow_requantize: Whether a GGUF file may be quantised already.

    Raises:
        LieqError: if it is no readable model.
    """
    if not is_gguf(path):
        return ModelDirectory(path, adapter)
    if adapter is not None:
        raise SourceError(
            f"{path} is a GGUF file, but adapters are merged into model directories only; give the directory of the "
            "model that the adapter was trained on"
        )
    return GgufSource(path, allow_requantize=allow_requantize)


def model_name(path: Path) -> str:
    """Name of a model for people, by where it is."""
    return gguf_source.model_name(path) if is_gguf(path) else model_directory.model_name(path)

"""What models to convert are kept in."""

from __future__ import annotations

from pathlib import Path

from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source


def open_source(path: Path) -> Source:
    """Open a model to convert.

    Raises:
        LieqError: if it is no readable model.
    """
    return ModelDirectory(path)

"""What models to convert are kept in."""

from __future__ import annotations

from pathlib import Path

from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source


def open_source(path: Path, adapter: Path | None = None) -> Source:
    """Open a model to convert.

    Args:
        path: Where it is.
        adapter: Directory of a LoRA adapter to merge into it.

    Raises:
        LieqError: if it is no readable model.
    """
    return ModelDirectory(path, adapter)

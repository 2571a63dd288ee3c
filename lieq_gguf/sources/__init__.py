"""What models to convert are kept in."""

from __future__ import annotations

from pathlib import Path

from lieq_gguf.errors import SourceError
from lieq_gguf.progress import Progress
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.sources import gguf_source, model_directory
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.hub import fetch, is_hub_name
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source


def is_gguf(path: Path) -> bool:
    """Whether there is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_source(path: Path, options: SourceOptions = SourceOptions()) -> Source:
    """Open a model to convert, a model directory or a GGUF file.

    Args:
        path: Where it is.
        options: How to take it.

    Raises:
        LieqError: if it is no readable model.
    """
    if not is_gguf(path):
        if options.initializer_range is not None:
            raise SourceError(
                f"{path} is not a GGUF file, and a model directory tells its initializer_range in config.json; "
                "leave out --initializer-range"
            )
        return ModelDirectory(path, options.adapter)
    if options.adapter is not None:
        raise SourceError(
            f"{path} is a GGUF file, but adapters are merged into model directories only; give the directory of the "
            "model that the adapter was trained on"
        )
    return GgufSource(path, options)


def find_model(model: str, revision: str | None, progress: Progress) -> Path:
    """Where a model is, downloaded if ``model`` is the name of one on the hub.

    Raises:
        SourceError: if it cannot be had, or a revision is given of what is not on the hub.
    """
    if is_hub_name(model):
        return fetch(model, revision, progress)
    if revision is not None:
        raise SourceError(f"'{model}' is no model of the hub; leave out --revision {revision}")
    return Path(model)


def model_name(path: Path) -> str:
    """Name of a model for people, by where it is."""
    return gguf_source.model_name(path) if is_gguf(path) else model_directory.model_name(path)

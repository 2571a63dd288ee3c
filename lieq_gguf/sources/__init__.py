"""The forms in which models to convert are stored."""

from __future__ import annotations

from pathlib import Path

from lieq_gguf.errors import SourceError
from lieq_gguf.progress import Progress
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.sources import gguf_parts, model_directory
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.hub import fetch, is_hub_name
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source


def is_gguf(path: Path) -> bool:
    """Whether the path is a file that begins like a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_source(path: Path, options: SourceOptions = SourceOptions()) -> Source:
    """Open a model to convert: a model directory or a GGUF file.

    Args:
        path: Its path.
        options: How to read it.

    Raises:
        LieqError: if the model cannot be read.
    """
    if not is_gguf(path):
        if options.initializer_range is not None:
            raise SourceError(
                f"{path} is not a GGUF file, and a model directory has its initializer_range in config.json; "
                "leave out --initializer-range"
            )
        return ModelDirectory(path, options.adapter, keeps_mtp=options.mtp == "keep")
    if options.mtp != SourceOptions.mtp:
        raise SourceError(f"{path} is a GGUF file, which is copied with all that it has; leave out --mtp")
    if options.adapter is not None:
        raise SourceError(
            f"{path} is a GGUF file, but adapters can only be merged into model directories; give the directory of the "
            "model that the adapter was trained on"
        )
    return GgufSource(path, options)


def find_model(model: str, revision: str | None, progress: Progress) -> Path:
    """The path of a model, which is downloaded if ``model`` is a name on the hub.

    Raises:
        SourceError: if it cannot be downloaded, or a revision is given for a model that is not on the hub.
    """
    if is_hub_name(model):
        return fetch(model, revision, progress)
    if revision is not None:
        raise SourceError(f"'{model}' is not a model on the hub; leave out --revision {revision}")
    return Path(model)


def model_name(path: Path) -> str:
    """Name of a model for people, made from its path."""
    return gguf_parts.model_name(path) if is_gguf(path) else model_directory.model_name(path)

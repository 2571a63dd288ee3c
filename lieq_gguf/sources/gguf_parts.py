"""A model in GGUF form, in one file or in several parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lieq_gguf.errors import SourceError
from lieq_gguf.formats.gguf_file import GgufFile

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def model_name(path: Path) -> str:
    """Name of a file for people: without suffix and part number."""
    part = _PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def open_parts(path: Path) -> list[GgufFile]:
    """The file, and the other parts if it is the first of several.

    Raises:
        SourceError: if it is another part, or the parts do not belong together.
    """
    first = GgufFile(path)
    count = int(first.value("split.count", 1))
    if count <= 1:
        return [first]
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise SourceError(
            f"{path} is one of {count} parts, but its name is not; expected NAME-00001-of-{count:05d}.gguf"
        )
    paths = [path.with_name(f"{named['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    if path != paths[0]:
        raise SourceError(f"{path} is part {named['number']} of {count}; give the first, {paths[0].name}")
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise SourceError(
            f"{missing[0]} is missing, one of the {count} parts of {path.name}; put it in the same folder"
        )
    files = [first, *(GgufFile(p) for p in paths[1:])]
    for i, file in enumerate(files):
        if (file.value("split.no"), file.value("split.count")) != (i, count):
            raise SourceError(
                f"{file.path} says it is part {file.value('split.no')} of {file.value('split.count')}; "
                f"expected {i} of {count}: download it again"
            )
    n_found = sum(len(file.tensors) for file in files)
    if n_found != first.value("split.tensors.count", n_found):
        raise SourceError(
            f"the {count} parts of {path.name} hold {n_found} tensors, but the first one says "
            f"{first.value('split.tensors.count')}: download them again"
        )
    return files


def require_language_model(files: Sequence[GgufFile]) -> None:
    """Refuse a file of something else.

    Raises:
        SourceError: saying what it is.
    """
    first = files[0]
    kind = first.value("general.type", "model")
    tensors = [t.spec for file in files for t in file.tensors]
    if kind != "model":
        found = f"of type '{kind}'"
    elif first.architecture == "clip":
        found = "the vision or audio part of a model"
    elif not tensors:
        found = "a vocabulary without weights"
    elif not any(t.layer is not None and len(t.shape) > 1 for t in tensors):
        found = "without decoder layers"
    elif not any(t.name == "token_embd.weight" for t in tensors):
        found = "without a token embedding"
    else:
        return
    raise SourceError(f"{first.path} is a GGUF file {found} ({first.architecture}); expected a language model")

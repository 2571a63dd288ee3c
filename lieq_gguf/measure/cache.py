"""Knowledge of models kept from one run to the next, under the key of all it depends on.

Each pass has a folder of its own in ``passes`` below ``records.folders.cache_root``: ``passes/<32 hex digits>/`` with
``scores.json`` and ``imatrix.gguf``. The root may be any folder of the user's, so nothing is ever removed but what is
certainly such an entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lieq_gguf.errors import LieqError
from lieq_gguf.formats.imatrix_file import load_importance, save_importance
from lieq_gguf.records.folders import cache_root
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.scores import LayerScores

_MAX_ENTRIES = 40
_ENTRY_NAME = re.compile(r"[0-9a-f]{32}")
_SIGNATURES = {"scores.json": b'"kind": "scores"', "imatrix.gguf": b"imatrix"}  # found in the first bytes
_UNFINISHED = re.compile(r"\.(scores\.json|imatrix\.gguf)\.\w+\.partial")  # what a killed process leaves
_N_SIGNATURE_BYTES = 256


def passes_folder() -> Path:
    """Where entries are kept."""
    return cache_root() / "passes"


@dataclass(frozen=True)
class CacheEntry:
    """A place for what one pass learns.

    Attributes:
        folder: Its folder, there or not.
    """

    folder: Path

    @classmethod
    def of(cls, **depends_on: Any) -> CacheEntry:
        """The entry of a pass, by everything that its result depends on, as JSON takes it."""
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
        return cls(passes_folder() / key)

    def load(self) -> tuple[LayerScores | None, ImportanceMatrix] | None:
        """What was kept, or None. A damaged entry is as good as none."""
        try:
            importance = load_importance(self._imatrix)
            scores = LayerScores.load(self._scores) if self._scores.is_file() else None
        except LieqError:
            return None
        with suppress(OSError):  # a cache that cannot be written still can be read
            os.utime(self.folder)  # entries used last are kept longest
        return scores, importance

    def save(self, scores: LayerScores | None, importance: ImportanceMatrix) -> None:
        """Keep it, and drop the entries that were used longest ago. A folder that cannot be written keeps nothing."""
        try:
            if self.folder.is_symlink():  # what it points to is somebody else's
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            if scores is not None:
                scores.save(self._scores, next(iter(scores.by_scorer)))
            save_importance(importance, self._imatrix)
        except (OSError, LieqError):
            _remove(self.folder)
        else:
            _prune(self.folder.parent)

    @property
    def _scores(self) -> Path:
        return self.folder / "scores.json"

    @property
    def _imatrix(self) -> Path:
        return self.folder / "imatrix.gguf"


def _prune(passes: Path) -> None:
    """Remove all entries but those used last."""
    with suppress(OSError):
        entries = [folder for folder in passes.iterdir() if _entry_files(folder)]
        for folder in sorted(entries, key=_last_use, reverse=True)[_MAX_ENTRIES:]:
            _remove(folder)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0


def _remove(folder: Path) -> None:
    """Remove a folder if it is an entry and nothing else: its files one by one, so that no other can go with them."""
    with suppress(OSError):
        for file in _entry_files(folder):
            file.unlink()
        if _is_entry_folder(folder):
            folder.rmdir()  # refused if anything is in it


def _entry_files(folder: Path) -> list[Path]:
    """The files of an entry; none if the folder may be anything else."""
    try:
        files = list(folder.iterdir()) if _is_entry_folder(folder) else []
        return files if all(_is_own_file(file) for file in files) else []
    except OSError:
        return []


def _is_entry_folder(folder: Path) -> bool:
    """Whether it is a real folder, in a real folder, with the name of an entry."""
    is_linked = folder.is_symlink() or folder.parent.is_symlink()
    return not is_linked and folder.is_dir() and _ENTRY_NAME.fullmatch(folder.name) is not None


def _is_own_file(file: Path) -> bool:
    """Whether an entry's file was written here, by its name and its beginning."""
    if file.is_symlink() or not file.is_file():
        return False
    if _UNFINISHED.fullmatch(file.name):
        return True
    if file.name not in _SIGNATURES:
        return False
    with file.open("rb") as stream:
        return _SIGNATURES[file.name] in stream.read(_N_SIGNATURE_BYTES)

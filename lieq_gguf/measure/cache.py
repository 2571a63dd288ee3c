"""Keeps what a pass measured for later runs, under a digest of everything the result depends on.

Each pass has its own folder in ``passes`` below ``records.folders.cache_root``: ``passes/<32 hex digits>/`` with
``scores.json`` and ``imatrix.gguf``. The root may be any folder of the user, so only what is certainly such an entry is
ever removed.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lieq_gguf.errors import LieqError
from lieq_gguf.formats.imatrix_file import load_importance, save_importance
from lieq_gguf.records.folders import cache_root, digest_name, is_digest_name
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.scores import LayerScores

_MAX_ENTRIES = 40
_SIGNATURES = {"scores.json": b'"kind": "scores"', "imatrix.gguf": b"imatrix"}  # these are among the first bytes
_UNFINISHED = re.compile(r"\.(scores\.json|imatrix\.gguf)\.\w+\.partial")  # left by a killed process
_N_SIGNATURE_BYTES = 256


def passes_folder() -> Path:
    """The folder of all entries."""
    return cache_root() / "passes"


@dataclass(frozen=True)
class CacheEntry:
    """The place for what one pass measures.

    Attributes:
        folder: Its folder, which may not exist yet.
    """

    folder: Path

    @classmethod
    def of(cls, **depends_on: Any) -> CacheEntry:
        """The entry of a pass; ``depends_on`` are JSON values of everything its result depends on."""
        return cls(passes_folder() / digest_name(**depends_on))

    def load(self) -> tuple[LayerScores | None, ImportanceMatrix] | None:
        """What was saved, or None if there is no entry or it is damaged."""
        try:
            importance = load_importance(self._imatrix)
            scores = LayerScores.load(self._scores) if self._scores.is_file() else None
        except LieqError:
            return None
        with suppress(OSError):  # a read-only cache is still usable
            os.utime(self.folder)  # the entries used last are kept
        return scores, importance

    def save(self, scores: LayerScores | None, importance: ImportanceMatrix) -> None:
        """Save the results and drop the entries used longest ago. If the folder is not writable, save nothing."""
        try:
            if self.folder.is_symlink():  # its target is not ours
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
    """Remove all entries except those used last."""
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
    """Remove a folder if it is an entry and nothing else; file by file, so that no other file is lost."""
    with suppress(OSError):
        for file in _entry_files(folder):
            file.unlink()
        if _is_entry_folder(folder):
            folder.rmdir()  # refused if anything is in it


def _entry_files(folder: Path) -> list[Path]:
    """The files of an entry; an empty list if the folder may be something else."""
    try:
        files = list(folder.iterdir()) if _is_entry_folder(folder) else []
        return files if all(_is_own_file(file) for file in files) else []
    except OSError:
        return []


def _is_entry_folder(folder: Path) -> bool:
    """Whether it is a real folder, in a real folder, with the name of an entry."""
    is_linked = folder.is_symlink() or folder.parent.is_symlink()
    return not is_linked and folder.is_dir() and is_digest_name(folder.name)


def _is_own_file(file: Path) -> bool:
    """Whether name and first bytes show that this package wrote a file."""
    if file.is_symlink() or not file.is_file():
        return False
    if _UNFINISHED.fullmatch(file.name):
        return True
    if file.name not in _SIGNATURES:
        return False
    with file.open("rb") as stream:
        return _SIGNATURES[file.name] in stream.read(_N_SIGNATURE_BYTES)

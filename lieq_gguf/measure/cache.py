"""Knowledge of models kept from one run to the next, in the platform's usual place, under the key of all it depends on.

``LIEQ_GGUF_CACHE`` names another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from lieq_gguf.errors import LieqError
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.scores import LayerScores

_MAX_ENTRIES = 40


def cache_folder() -> Path:
    """Where entries are kept."""
    named = os.environ.get("LIEQ_GGUF_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("lieq-gguf", appauthor=False)


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
        return cls(cache_folder() / key)

    def load(self) -> tuple[LayerScores | None, ImportanceMatrix] | None:
        """What was kept, or None. A damaged entry is as good as none."""
        try:
            importance = ImportanceMatrix.load(self._imatrix)
            scores = LayerScores.load(self._scores) if self._scores.is_file() else None
        except LieqError:
            return None
        with suppress(OSError):  # a cache that cannot be written still can be read
            os.utime(self.folder)  # entries used last are kept longest
        return scores, importance

    def save(self, scores: LayerScores | None, importance: ImportanceMatrix) -> None:
        """Keep it, and drop the entries that were used longest ago. A folder that cannot be written keeps nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if scores is not None:
                scores.save(self._scores, next(iter(scores.by_scorer)))
            importance.save(self._imatrix)
            entries = sorted(self.folder.parent.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
            for entry in entries[_MAX_ENTRIES:]:
                shutil.rmtree(entry, ignore_errors=True)
        except (OSError, LieqError):
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _scores(self) -> Path:
        return self.folder / "scores.json"

    @property
    def _imatrix(self) -> Path:
        return self.folder / "imatrix.gguf"

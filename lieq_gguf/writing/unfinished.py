"""What an interrupted conversion had done, so that the same command goes on there.

Each conversion has a folder in ``unfinished`` below ``records.folders.cache_root``, named by a digest of everything
that its bytes depend on: the encoded rows of all groups of tensors, and the states behind the last finished layer.
``state.json`` is written last and has a checksum of each file, so whatever stops the program leaves the last complete
state. The folder is removed when the file is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import psutil

from lieq_gguf.errors import LieqError, OutputError
from lieq_gguf.records.files import replaced_when_complete
from lieq_gguf.records.folders import cache_root, digest_name, is_digest_name
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.writing.writer import EncodedRows

FloatArray = npt.NDArray[np.float32]

SECONDS_BETWEEN = 10.0
"""Layers are finished this often at most: a state takes as long to write as some layers of a small model."""

_KEPT_DAYS = 14
_READ_BYTES = 1 << 26


@dataclass(frozen=True)
class Finished:
    """A state that can be gone on from.

    Attributes:
        n_groups: Groups of tensors that are encoded, from the beginning of the file.
        numbers: The numbers that ``finish`` was given.
        states: The arrays that ``finish`` was given.
    """

    n_groups: int
    numbers: tuple[float, ...]
    states: tuple[FloatArray, ...]


class Unfinished:
    """The folder of one conversion. If it cannot be used, for instance on a full disk, nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        """Without a folder, nothing is ever kept."""
        self._folder = folder or Path()
        self._is_wanted = folder is not None
        self._is_ours = False  # locked by this process
        self._is_open = False  # ours, and nothing failed so far
        self._checksums: dict[str, int] = {}
        self._last = time.monotonic()

    @classmethod
    def of(cls, **depends_on: Any) -> Unfinished:
        """The folder for a conversion; ``depends_on`` are JSON values of everything that its bytes depend on."""
        return cls(cache_root() / "unfinished" / digest_name(**depends_on))

    def open(self) -> Finished | None:
        """Take the folder, and return what is finished; None if nothing is, or another process works on the same."""
        if not self._is_wanted:
            return None
        with suppress(OSError):
            _remove_old(self._folder.parent)
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._folder.is_symlink() and self._locks():
                self._is_ours = self._is_open = True
                return self._read()
        return None

    def rows(self, group: int, tensors: Sequence[TensorSpec], row_bytes: Sequence[int]) -> Iterator[EncodedRows]:
        """The encoded rows of a finished group."""
        with self._rows_file(group).open("rb") as file:
            for tensor, n_bytes in zip(tensors, row_bytes, strict=True):
                n_left = tensor.n_rows
                while n_left:
                    n = min(n_left, max(1, _READ_BYTES // n_bytes))
                    n_left -= n
                    data = np.fromfile(file, dtype=np.uint8, count=n * n_bytes).reshape(n, n_bytes)
                    yield EncodedRows(tensor, data, is_last=n_left == 0)

    def keep(self, group: int, rows: Iterable[EncodedRows]) -> Iterator[EncodedRows]:
        """The same rows, which are written to the folder as they pass."""
        name = self._rows_file(group).name
        self._checksums[name] = 0
        if self._is_open:
            self._trying(lambda: self._rows_file(group).write_bytes(b""))
        for some in rows:
            if self._is_open:
                self._trying(partial(self._append, group, some.data))
            yield some

    def finish(self, n_groups: int, numbers: Sequence[float], states: Sequence[FloatArray]) -> None:
        """All groups so far are finished; ``states`` is what the next one needs."""
        if self._is_open and time.monotonic() - self._last >= SECONDS_BETWEEN:
            self._trying(partial(self._save, n_groups, numbers, states))
            self._last = time.monotonic()

    def _trying(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, OutputError):  # the conversion is worth more than going on with it
            self._is_open = False

    def _append(self, group: int, data: npt.NDArray[np.uint8]) -> None:
        file = self._rows_file(group)
        with file.open("ab") as stream:
            stream.write(data.data)
        self._checksums[file.name] = crc32(data.data, self._checksums[file.name])

    def _save(self, n_groups: int, numbers: Sequence[float], states: Sequence[FloatArray]) -> None:
        names = [f"states-{n_groups}-{i}.npy" for i in range(len(states))]
        before = [file for file in self._folder.glob("states-*.npy") if file.name not in names]
        for name, state in zip(names, states, strict=True):
            np.save(self._folder / name, state)
            self._checksums[name] = crc32(np.ascontiguousarray(state).data)
        for file in before:
            self._checksums.pop(file.name, None)
        for name in self._checksums:
            with (self._folder / name).open("rb") as stream:
                os.fsync(stream.fileno())
        content = {"n_groups": n_groups, "numbers": list(numbers), "states": names, "checksums": self._checksums}
        with replaced_when_complete(self._folder / "state.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        for file in before:
            file.unlink()

    @contextmanager
    def until_done(self, when_kept: Callable[[], None] = lambda: None) -> Iterator[None]:
        """For the length of a ``with`` in which the file is completed: keep the folder only if it is interrupted.

        Args:
            when_kept: Called if there is something to go on with then.
        """
        try:
            yield
        except LieqError:  # would come again
            self._remove()
            raise
        except BaseException:
            if self._leave():
                when_kept()
            raise
        self._remove()

    def _remove(self) -> None:
        if self._is_ours:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._is_ours = self._is_open = False

    def _leave(self) -> bool:
        """Let another process have the folder; whether there is something to go on with."""
        is_kept = self._is_ours and (self._folder / "state.json").is_file()
        if self._is_ours:
            self._lock.unlink(missing_ok=True)
        self._is_ours = self._is_open = False
        return is_kept

    @property
    def _lock(self) -> Path:
        return self._folder / "lock"

    def _rows_file(self, group: int) -> Path:
        return self._folder / f"rows-{group}.bin"

    def _locks(self) -> bool:
        """Whether no living process has the folder."""
        with suppress(OSError, ValueError):
            owner = int(self._lock.read_text())
            if owner != os.getpid() and psutil.pid_exists(owner):
                return False
            self._lock.unlink()
        try:
            with self._lock.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def _read(self) -> Finished | None:
        """The complete state, if its files have their checksums."""
        try:
            content = json.loads((self._folder / "state.json").read_text("utf-8"))
            states = tuple(np.load(self._folder / name) for name in content["states"])
            found = {name: crc32(state.data) for name, state in zip(content["states"], states, strict=True)}
            found |= {file.name: _checksum(file) for file in map(self._rows_file, range(content["n_groups"]))}
            if content["checksums"] != found:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._checksums = found
        return Finished(content["n_groups"], tuple(content["numbers"]), states)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while read := stream.read(_READ_BYTES):
            checksum = crc32(read, checksum)
    return checksum


def _remove_old(parent: Path) -> None:
    """Remove what nobody went on with for weeks."""
    for folder in parent.glob("*"):
        is_ours = is_digest_name(folder.name) and not folder.is_symlink() and (folder / "state.json").is_file()
        if is_ours and time.time() - folder.stat().st_mtime > _KEPT_DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)

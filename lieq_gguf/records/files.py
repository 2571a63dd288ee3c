"""Reads and writes JSON records: nothing half-written stays, and a wrong file is recognised."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lieq_gguf.errors import FormatError, OutputError

SCHEMA_VERSION = 1


@contextmanager
def replaced_when_complete(target: Path) -> Iterator[Path]:
    """A temporary file that replaces ``target`` when the block succeeds, and is removed when it fails.

    Raises:
        OutputError: if the folder is missing, cannot be written, or is full.
    """
    try:
        # only 40 characters of the name, which with a second suffix could become too long
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise OutputError(f"cannot write into {target.parent}: {error.strerror}; choose another folder") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; the result gets the usual permissions of a new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; check space and permissions") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(target: Path, force: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work starts.

    Raises:
        OutputError: if ``target`` exists and ``force`` is off, is a folder, device or pipe, or its folder is not
            writable.
    """
    try:
        if target.exists() and not target.is_file():  # a device or pipe would be replaced, not written to
            kind = "a folder" if target.is_dir() else "a device or pipe"
            raise OutputError(f"{target} is {kind}; expected the name of a file to write")
        if target.exists() and not force:
            raise OutputError(f"{target} exists already; choose another name with -o, or replace it with --force")
        if not target.parent.is_dir():
            raise OutputError(f"the folder {target.parent} does not exist; create it first")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; choose another name") from None
    try:  # permission bits lie for root and on network drives, so try it
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {target.parent}: {error.strerror}; choose another folder") from None


def write_json(target: Path, document: dict[str, Any]) -> None:
    """Write a record, completely or not at all."""
    with replaced_when_complete(target) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_json(file: Path, kind: str) -> dict[str, Any]:
    """Read a record of a kind (``scores``, ``plan``).

    Raises:
        FormatError: if the file is missing, not a JSON object, or of another kind or schema version.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file} does not exist; expected a {kind} file made by lieq-gguf") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read as JSON ({error}); expected a {kind} file") from None
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise FormatError(f"{file} is not a {kind} file made by lieq-gguf")
    if document.get("schema_version") != SCHEMA_VERSION:
        version = document.get("schema_version")
        raise FormatError(f"{file} has schema version {version}, expected {SCHEMA_VERSION}; make it again")
    return document

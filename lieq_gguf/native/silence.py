"""Keeps what C libraries print out of stdout, which belongs to the result."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced_native_stdout() -> Iterator[None]:
    """Drop what C code prints to stdout for the length of a ``with``.

    ``contextlib.redirect_stdout`` only covers Python. C's own buffer is flushed before the file descriptor is restored,
    or the text would appear at exit.
    """
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)

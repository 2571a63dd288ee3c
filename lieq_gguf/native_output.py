"""Keeps what C libraries print out of stdout, which belongs to the result."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_stdout_to_stderr() -> Iterator[None]:
    """Send what C code prints to stdout to stderr instead, for the length of a ``with``.

    ``contextlib.redirect_stdout`` only sees Python. C's own buffer is emptied before the file descriptor is put back,
    or the text would come out at exit.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)

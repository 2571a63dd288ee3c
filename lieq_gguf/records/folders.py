"""The folders that belong to this program, in the platform's usual places.

What is in the cache folder can be made again at any time; what is in the data folder was measured on this machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_root() -> Path:
    """The folder for caches, or ``LIEQ_GGUF_CACHE``, which may be a folder with other things in it."""
    named = os.environ.get("LIEQ_GGUF_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("lieq-gguf", appauthor=False)


def data_root() -> Path:
    """The folder for the user's own data, or ``LIEQ_GGUF_DATA``."""
    named = os.environ.get("LIEQ_GGUF_DATA")
    return Path(named) if named else platformdirs.user_data_path("lieq-gguf", appauthor=False)

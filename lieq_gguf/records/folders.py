"""The folders that belong to this program, in the platform's usual places.

What is in the cache folder can be made again at any time; what is in the data folder was measured on this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import platformdirs

_DIGEST = re.compile(r"[0-9a-f]{32}")


def cache_root() -> Path:
    """The folder for caches, or ``LIEQ_GGUF_CACHE``, which may be a folder with other things in it."""
    named = os.environ.get("LIEQ_GGUF_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("lieq-gguf", appauthor=False)


def data_root() -> Path:
    """The folder for the user's own data, or ``LIEQ_GGUF_DATA``."""
    named = os.environ.get("LIEQ_GGUF_DATA")
    return Path(named) if named else platformdirs.user_data_path("lieq-gguf", appauthor=False)


def digest_name(**depends_on: Any) -> str:
    """Name of a folder for a result, by JSON values of everything that it depends on: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def is_digest_name(name: str) -> bool:
    """Whether a name may be one of ``digest_name``."""
    return _DIGEST.fullmatch(name) is not None

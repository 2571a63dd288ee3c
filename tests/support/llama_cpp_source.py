"""The source of the llama.cpp that the installed llama-cpp-python was built from: its converter, to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from support.shared import made_once

_WANTED = ("conversion/", "gguf-py/", "src/", "convert_hf_to_gguf.py")


def llama_cpp_source(folder: Path) -> Path:
    """``LLAMA_CPP_SOURCE``, or else what the package index has for this version, unpacked once into ``folder``.

    Raises:
        LookupError: if there is neither.
    """
    given = os.environ.get("LLAMA_CPP_SOURCE")
    if given:
        return Path(given)
    package = f"llama-cpp-python=={version('llama-cpp-python')}"
    return made_once(folder / package, lambda unpacked: _unpack(package, unpacked))


def _unpack(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", scratch, package], capture_output=True, text=True)
        archive = next(Path(scratch).glob("*.tar.gz"), None)
        if archive is None:
            raise LookupError(f"no source distribution of {package}: {done.stderr.strip()[-200:]}")
        with tarfile.open(archive) as tar:
            for member in tar:
                path = member.name.partition("/vendor/llama.cpp/")[2]
                if not member.isfile() or not path.startswith(_WANTED) or ".." in path:
                    continue
                content = tar.extractfile(member)  # extract() is not safe without its filter, which early 3.10 lacks
                if content is not None:
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())

"""Compiles the C++ part when the package is installed, for the processor of this machine, as llama-cpp-python does."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("lieq_gguf", "native")
_SOURCE, _LIBRARY = _FOLDER / "block_encoder.cpp", _FOLDER / "_block_encoder.so"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden")
_FOR_THIS_PROCESSOR = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Tried in turn, since compilers differ."""


class CompiledPart(BuildHookInterface):
    """Puts the compiled library into the wheel, and into the source tree for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile."""
        if self.target_name != "wheel":
            return
        library = Path(self.root, _LIBRARY)
        _compile(Path(self.root, _SOURCE), library)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"][str(library)] = _LIBRARY.as_posix()


def _compile(source: Path, library: Path) -> None:
    failure = "no C++ compiler was found; install g++ or clang, or name one in CXX"
    for compiler in [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS:
        for flags in _FOR_THIS_PROCESSOR:
            command = [*shlex.split(compiler), *_FLAGS, *flags, str(source), "-o", str(library)]
            try:
                result = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                break
            if result.returncode == 0:
                return
            failure = f"{source.name} cannot be compiled with {compiler}:\n{result.stderr}"
    raise RuntimeError(failure)

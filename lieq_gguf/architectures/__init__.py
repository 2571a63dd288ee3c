"""What llama.cpp calls the parts of each model family. One family, one file.

A family is a module with four functions: the tensors it has, the hyper-parameters it needs, the tensors that are
computed instead of read, and a check that refuses the variants llama.cpp would run wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import gguf
import numpy as np
import numpy.typing as npt

from lieq_gguf.architectures import llama
from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import TensorSpec


class Family(Protocol):
    """The functions of a family module."""

    GGUF_NAME: str
    """llama.cpp's name of the architecture."""

    SOURCE_CLASSES: tuple[str, ...]
    """The names in ``architectures`` of ``config.json`` that belong to the family."""

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse with ArchitectureError what the family's graph in llama.cpp cannot express."""

    def tensors(self, config: Mapping[str, Any], source_names: frozenset[str]) -> tuple[TensorSpec, ...]:
        """All tensors in file order; ``source_names`` tells which optional ones exist."""

    def add_hyper_parameters(self, config: Mapping[str, Any], writer: gguf.GGUFWriter) -> None:
        """Write the keys that llama.cpp needs to build the graph."""

    def computed_tensor(self, config: Mapping[str, Any], name: str) -> npt.NDArray[np.float32]:
        """Value of a tensor whose ``source_name`` is None."""


_FAMILIES = (cast(Family, llama),)
_BY_SOURCE_CLASS = {name: family for family in _FAMILIES for name in family.SOURCE_CLASSES}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``.

    Raises:
        ArchitectureError: if there is none, naming those there are.
    """
    names = config.get("architectures") or []
    if isinstance(names, str):
        names = [names]
    for name in names:
        if name in _BY_SOURCE_CLASS:
            return _BY_SOURCE_CLASS[name]
    found = ", ".join(names) or f"model_type {config.get('model_type', 'missing')}"
    raise ArchitectureError(f"unsupported architecture {found}; supported are {', '.join(_BY_SOURCE_CLASS)}")

"""What a GGUF file says of a model's structure, for the way back to transformers' configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import ArchitectureError

_REQUIRED = object()


class StoredParameters:
    """Hyper-parameters of a file. It remembers which were asked for: one that nobody reads may change the graph.

    Attributes:
        shapes: Tensor name to shape, rows first.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        vector: Callable[[str], npt.NDArray[np.float32]],
    ) -> None:
        """Take ``values`` by their keys without the architecture, and a way to read a tensor of one dimension."""
        self.shapes = shapes
        self._values = values
        self._vector = vector
        self._unread = set(values)

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys that were never asked for."""
        return tuple(sorted(self._unread))

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """One number or text for all layers.

        Raises:
            ArchitectureError: if it is missing and has no default, or differs from layer to layer.
        """
        found = self.per_layer(key, default)
        if isinstance(found, list):
            if any(value != found[0] for value in found[1:]) or not found:
                raise ArchitectureError(f"{key} differs from layer to layer")
            return found[0]
        return found

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number, the same for all layers.

        Raises:
            ArchitectureError: as :meth:`value`, or if it is none.
        """
        found = self.value(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ArchitectureError(f"{key} is {found!r}; expected a positive integer")
        return found

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number, the same for all layers.

        Raises:
            ArchitectureError: as :meth:`value`, or if it is none.
        """
        found = self.value(key, default)
        if not isinstance(found, float | int) or isinstance(found, bool) or not math.isfinite(found):
            raise ArchitectureError(f"{key} is {found!r}; expected a number")
        return found

    def per_layer(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as the file has it, a list where there is one a layer.

        Raises:
            ArchitectureError: if it is missing and has no default.
        """
        self._unread.discard(key)
        found = self._values.get(key, default)
        if found is _REQUIRED:
            raise ArchitectureError(f"{key} is missing")
        return found

    def vector(self, name: str) -> list[float]:
        """The weights of a tensor of one dimension."""
        return [float(weight) for weight in self._vector(name)]

"""A model's structure as a GGUF file stores it, to make transformers' configuration from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lieq_gguf.architectures.checks import windowed_layers
from lieq_gguf.errors import ArchitectureError

_REQUIRED = object()


class StoredParameters:
    """Hyper-parameters of a file. It remembers which were read: one that nobody reads may change the graph.

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
        """Keys that were never read."""
        return tuple(sorted(self._unread))

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """One number or text for all layers.

        Raises:
            ArchitectureError: if it is missing and has no default, or differs from layer to layer.
        """
        value = self.per_layer(key, default)
        if isinstance(value, list):
            if any(other != value[0] for other in value[1:]) or not value:
                raise ArchitectureError(f"{key} differs from layer to layer")
            return value[0]
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number, the same for all layers.

        Raises:
            ArchitectureError: as :meth:`value`, or if it is not a positive integer.
        """
        count = self.value(key, default)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ArchitectureError(f"{key} is {count!r}; expected a positive integer")
        return count

    def most(self, key: str, default: Any = _REQUIRED) -> int:
        """The largest of the counts of all layers, some of which can be 0.

        Raises:
            ArchitectureError: as :meth:`count`.
        """
        counts = self.per_layer(key, default)
        if isinstance(counts, list) and counts and all(isinstance(n, int) for n in counts):
            return int(max(counts))
        return self.count(key, default)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number, the same for all layers.

        Raises:
            ArchitectureError: as :meth:`value`, or if it is not a finite number.
        """
        number = self.value(key, default)
        if not _is_number(number):
            raise ArchitectureError(f"{key} is {number!r}; expected a number")
        return float(number)

    def per_layer(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as stored, a list if there is one per layer.

        Raises:
            ArchitectureError: if it is missing and has no default.
        """
        self._unread.discard(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise ArchitectureError(f"{key} is missing")
        return value

    def numbers(self, key: str, n_layers: int) -> list[float]:
        """One finite number for each layer; the file can have one for all.

        Raises:
            ArchitectureError: if they are missing, or no such numbers.
        """
        stored = self.per_layer(key)
        numbers = stored if isinstance(stored, list) else [stored] * n_layers
        if len(numbers) != n_layers or not all(_is_number(number) for number in numbers):
            raise ArchitectureError(f"{key} holds no number for each of {n_layers} layers")
        return [float(number) for number in numbers]

    def layer_types(self, n_layers: int) -> list[str]:
        """Attention types of the layers, as transformers names them: windows by layer, or but for every n-th layer.

        Raises:
            ArchitectureError: if the file does not say.
        """
        key = "attention.sliding_window_pattern"
        pattern = self.per_layer(key)
        if not isinstance(pattern, list):
            return list(windowed_layers(n_layers, self.count(key)))
        return ["sliding_attention" if has_window else "full_attention" for has_window in pattern]

    def vector(self, name: str) -> list[float]:
        """The weights of a tensor of one dimension."""
        return [float(weight) for weight in self._vector(name)]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)

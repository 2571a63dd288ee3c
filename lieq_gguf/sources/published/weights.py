"""The weights of a model directory whose matrices are published quantised; each is decoded when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lieq_gguf.errors import SourceError
from lieq_gguf.sources.published.stored import WeightFormat
from lieq_gguf.sources.weight_files import PLAIN_DTYPES, WeightFiles

if TYPE_CHECKING:
    import torch


class PublishedWeights:
    """As :class:`WeightFiles`, with a matrix where the files have the parts of one.

    Attributes:
        prefix: What the names in the files have in place of ``model.``.
        names: All names, without parts, and without the biases of zeros that some programs write for every module.
        notes: What the user may want to know about the files.

    Raises:
        SourceError: if no matrix is stored in the format, or there are parts that belong to none.
    """

    def __init__(self, files: WeightFiles, stored_as: WeightFormat) -> None:
        self._files = files
        self.prefix = files.prefix
        self._format = stored_as
        split = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in files.names]
        modules = {module for module, end in split if end in stored_as.marks}
        if not modules:
            raise SourceError(
                f"{files.path} has no tensor that ends in .{stored_as.marks[0]}, although its config.json says "
                f"{stored_as.name}; if the weights are plain, remove quantization_config there"
            )
        ends = {*stored_as.parts} - {"weight"}
        alone = sorted(f"{module}.{end}" for module, end in split if end in ends and module not in modules)
        if alone:
            raise SourceError(
                f"{files.path} has {alone[0]}, but no tensor beside it ends in {self._marks}; the model is damaged, or "
                f"it has more than {stored_as.name} says: give the model that it was made from"
            )
        self._parts = {
            f"{module}.weight": {end: name for end in stored_as.parts if (name := f"{module}.{end}") in files.names}
            for module in modules
        }
        parts = {name for named in self._parts.values() for name in named.values()}
        biases = {n for module in modules if (n := f"{module}.bias") in files.names and not files.is_part(n)}
        self.names = (files.names - parts - {name for name in biases if files.is_zero(name)}) | self._parts.keys()
        self.notes = (
            *files.notes,
            f"the weights are published in {stored_as.name}: the errors of new types add to the errors they have, and "
            "a divergence is from these weights, not from those that they were made of",
        )

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Require tensors of these names and shapes.

        Raises:
            SourceError: naming what is missing or wrong.
        """
        plain = {}
        for name, shape in shapes.items():
            if name in self._parts:
                parts = {end: self._files.stored(part) for end, part in self._parts[name].items()}
                if len(shape) != 2:
                    raise SourceError(f"{next(iter(parts.values())).name} belongs to a vector; expected a matrix")
                self._format.check(self._module(name), parts, (shape[0], shape[1]))
                continue
            if name in self._files.names and (stored := self._files.stored(name)).dtype not in PLAIN_DTYPES:
                several = self._files.is_part(name)
                raise SourceError(
                    f"{stored.name} in {stored.file} is {stored.dtype}, "
                    + (
                        "and holds several matrices, which cannot be decoded; give the model that it was made from"
                        if several
                        else f"but no tensor beside it ends in {self._marks}; download the model again"
                    )
                )
            plain[name] = shape
        self._files.require_all_experts(
            {p for name in shapes if name in self._parts for p in self._parts[name].values()}
        )
        self._files.require(plain)

    @property
    def are_stacked(self) -> bool:
        """Whether a part is that of several matrices, which are one tensor in transformers' model."""
        return any(self._files.is_part(part) for parts in self._parts.values() for part in parts.values())

    def left_out(self, used: Collection[str]) -> tuple[str, ...]:
        """Notes about what the files hold besides the tensors in use and their parts."""
        modules = {name.rpartition(".")[0] for name in used}
        return self._files.left_out([name for name in self._files.names if name.rpartition(".")[0] in modules])

    def numbers(self, names: Sequence[str]) -> list[float]:
        """Numbers that are tensors of their own.

        Raises:
            SourceError: naming the tensor that is missing or holds more than one number.
        """
        return self._files.numbers(names)

    def read(self, name: str) -> torch.Tensor:
        """A tensor: decoded in the type that transformers gives it, or in its own type."""
        if name not in self._parts:
            return self._files.read(name)
        return self._format.decode(
            self._module(name), {end: self._files.read(part) for end, part in self._parts[name].items()}
        )

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are stored with the same bytes; they are read until they differ."""
        plain = {"": name}, {"": other}
        a, b = self._parts.get(name, plain[0]), self._parts.get(other, plain[1])
        return a.keys() == b.keys() and all(self._files.are_equal(a[end], b[end]) for end in a)

    def is_renamed(self, name: str) -> bool:
        """Whether the files have another name for a tensor or its parts."""
        return any(self._files.is_renamed(part) for part in self._parts.get(name, {"": name}).values())

    def release(self) -> None:
        """Unmap the files; tensors that were read stay valid."""
        self._files.release()

    def add_to(self, digest: hashlib._Hash) -> None:
        """Digest the headers and some bytes of every tensor."""
        digest.update(repr(self._format).encode())
        self._files.add_to(digest)

    @property
    def _marks(self) -> str:
        return " or ".join(f".{mark}" for mark in self._format.marks)

    def _module(self, name: str) -> str:
        """Name in the files of the module whose matrix this is."""
        return self._files.stored_name(next(iter(self._parts[name].values()))).rpartition(".")[0]

"""The bit meter: three figures that say how large a file is, always from exact bytes and always together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from lieq_gguf.errors import BudgetError
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.spec import ModelSpec, TensorSpec

GGUF_ALIGNMENT = 32


BudgetKind = Literal["bits", "nominal", "file-bits", "size"]

_UNITS = {"": 1, "b": 1} | {
    prefix.lower() + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("b", 1000), ("", 1000), ("ib", 1024))
}


@dataclass(frozen=True)
class BitBudget:
    """The bits the user allows; never exceeded.

    Attributes:
        kind: ``bits``: stored bits per decoder weight; ``nominal``: average digit of the type names; ``file-bits``:
            bits of the whole file per weight of the model; ``size``: bytes of the whole file.
        value: The target.
    """

    kind: BudgetKind
    value: float

    @property
    def covers_file(self) -> bool:
        """Whether the whole file counts, not only the decoder's matrices."""
        return self.kind in ("file-bits", "size")

    @property
    def bits_per_weight(self) -> float | None:
        """The target as an average; None if it is a size."""
        return None if self.kind == "size" else self.value

    def cost(self, quant_type: QuantType, tensor: TensorSpec) -> int:
        """Bits of the budget that a tensor takes in this type."""
        if self.covers_file:
            return 8 * padded(quant_type.tensor_bytes(tensor.shape))
        if tensor.layer is None or not tensor.is_matrix:
            return 0
        if self.kind == "nominal":
            return quant_type.nominal_bits * tensor.n_weights
        return 8 * quant_type.tensor_bytes(tensor.shape)

    def limit(self, spec: ModelSpec, header_bytes: int = 0) -> int:
        """Bits that all tensors together may take.

        Args:
            spec: The model.
            header_bytes: Bytes before the first tensor; they count if the budget covers the file.
        """
        # Fraction of the decimal, since 2.625 bits of a uniform Q2_K must fit to the last bit.
        target = Fraction(str(self.value))
        if self.kind == "size":
            return 8 * (int(target) - header_bytes)
        if self.kind == "file-bits":
            return int(target * spec.n_weights) - 8 * header_bytes
        return int(target * spec.n_layer_weights)

    def amount(self, bits: int, spec: ModelSpec, header_bytes: int = 0) -> float:
        """The bits of all tensors in the unit of ``value``."""
        if self.covers_file:
            total = bits + 8 * header_bytes
            return total / 8 if self.kind == "size" else total / spec.n_weights
        return bits / spec.n_layer_weights

    def __str__(self) -> str:
        if self.kind == "size":
            return f"--size {self.value:.0f}"
        option = "--file-bits" if self.kind == "file-bits" else "--bits"
        return f"{option} {self.value:g}" + (" --nominal" if self.kind == "nominal" else "")


def parse_size(text: str) -> int:
    """Bytes of ``400MB``, ``0.4GiB`` or a plain number; powers of 1000, except ``KiB``, ``MiB``, ``GiB``.

    Raises:
        BudgetError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or not (size := int(Fraction(match[1]) * _UNITS[match[2]])):
        raise BudgetError(f"'{text}' is not a size; expected bytes or for example 400MB, 0.4GB, 380MiB")
    return size


@dataclass(frozen=True)
class BitMeter:
    """How large a file is.

    Attributes:
        layer_bpw: Stored bits of the decoder layers' matrices, per weight of these matrices.
        file_bpw: Bits of the whole file per weight of the source model.
        nominal_bits: Average digit in the names of the decoder's types, which is how papers count bits.
        file_bytes: Size of the file.
        n_weights: Weights of the source model.
        layers_bytes: Size of the decoder layers' matrices.
        embedding_bytes: Size of embedding and output matrix.
    """

    layer_bpw: float
    file_bpw: float
    nominal_bits: float
    file_bytes: int
    n_weights: int
    layers_bytes: int
    embedding_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def measure_bits(tensors: Iterable[TensorSpec], types: Mapping[str, str], file_bytes: int) -> BitMeter:
    """The figures of tensors stored in ``types`` (tensor name to type name) in a file of ``file_bytes``."""
    tensors = list(tensors)
    matrices = [(t, QUANT_TYPES[types[t.name]]) for t in tensors if t.is_matrix]
    in_layers = [(t, q) for t, q in matrices if t.layer is not None]
    n_layer_weights = sum(t.n_weights for t, _ in in_layers)
    n_weights = sum(t.n_weights for t in tensors if t.source_name is not None)
    layers_bytes = sum(q.tensor_bytes(t.shape) for t, q in in_layers)
    return BitMeter(
        layer_bpw=8 * layers_bytes / n_layer_weights,
        file_bpw=8 * file_bytes / n_weights,
        nominal_bits=sum(q.nominal_bits * t.n_weights for t, q in in_layers) / n_layer_weights,
        file_bytes=file_bytes,
        n_weights=n_weights,
        layers_bytes=layers_bytes,
        embedding_bytes=sum(q.tensor_bytes(t.shape) for t, q in matrices if t.layer is None),
    )


def layer_bpw(tensors: Sequence[TensorSpec], types: Mapping[str, str]) -> dict[int, float]:
    """Stored bits per weight of every layer's matrices."""
    stored: dict[int, int] = {}
    weights: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layer is not None and tensor.is_matrix:
            n_bytes = QUANT_TYPES[types[tensor.name]].tensor_bytes(tensor.shape)
            stored[tensor.layer] = stored.get(tensor.layer, 0) + n_bytes
            weights[tensor.layer] = weights.get(tensor.layer, 0) + tensor.n_weights
    return {layer: 8 * stored[layer] / weights[layer] for layer in stored}


def padded(n_bytes: int) -> int:
    """Size in the file of a tensor of ``n_bytes``."""
    return -(-n_bytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT

"""The bit meter: three figures that say how large a file is, always from exact bytes and always together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.spec import ModelSpec, TensorSpec

GGUF_ALIGNMENT = 32


@dataclass(frozen=True)
class BitBudget:
    """What the user asks for.

    Attributes:
        kind: ``bits``: stored bits per decoder weight; ``nominal``: average digit of the type names.
        value: The target; never exceeded.
    """

    kind: Literal["bits", "nominal"]
    value: float

    def cost(self, quant_type: QuantType, tensor: TensorSpec) -> int:
        """Bits that a tensor takes of the budget in this type."""
        if self.kind == "nominal":
            return quant_type.nominal_bits * tensor.n_weights
        return 8 * quant_type.tensor_bytes(tensor.shape)

    def limit(self, spec: ModelSpec) -> int:
        """Bits that all decoder matrices may take together."""
        # Fraction of the decimal, since 2.625 bits of a uniform Q2_K must fit to the last bit.
        return int(Fraction(str(self.value)) * spec.n_layer_weights)

    def __str__(self) -> str:
        return f"--bits {self.value:g}" + (" --nominal" if self.kind == "nominal" else "")


@dataclass(frozen=True)
class BitMeter:
    """How large a file is.

    Attributes:
        layer_bpw: Stored bits of the decoder layers' matrices per weight of theirs in the source.
        file_bpw: Bits of the whole file per weight of the source model.
        nominal_bits: Average digit of the decoder types' names, the papers' accounting.
        file_bytes: The file.
        n_weights: Weights of the source model.
        layers_bytes: The decoder layers' matrices.
        embedding_bytes: Embedding and output matrix.
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
    """Read the meter for tensors stored in ``types`` (tensor name to type name) in a file of ``file_bytes``."""
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


def padded(n_bytes: int) -> int:
    """Size in the file of a tensor of ``n_bytes``."""
    return -(-n_bytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT

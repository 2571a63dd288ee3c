"""A GGUF file read back: its metadata, its tensors, its figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import FormatError
from lieq_gguf.quant_types import BY_GGML_ID, QuantType
from lieq_gguf.records.bits import BitMeter, measure_bits
from lieq_gguf.records.spec import TensorSpec

_LAYER = re.compile(r"blk\.(\d+)\.")
_COMPUTED = ("rope_freqs.weight",)  # made by the converter, no weight of the source


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        spec: Name and shape.
        quant_type: How it is stored.
        data: ``[n_rows, row_bytes]``, mapped from the file.
    """

    spec: TensorSpec
    quant_type: QuantType
    data: npt.NDArray[np.uint8]


class GgufFile:
    """A readable GGUF file; tensors are mapped, not loaded.

    Attributes:
        path: The file.
        tensors: Its tensors in file order.

    Raises:
        FormatError: if the file is missing, damaged, cut short, or has a tensor type unknown here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FormatError(f"{path} does not exist or is no file; expected a GGUF file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            size = path.stat().st_size
            raise FormatError(f"{path} is no complete GGUF file ({size:,} bytes: {error}); make it again") from None
        self.tensors = tuple(self._stored(t) for t in self._reader.tensors)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.value("general.architecture", "unknown"))

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max((t.spec.layer for t in self.tensors if t.spec.layer is not None), default=-1)

    @property
    def types(self) -> dict[str, str]:
        """Tensor name to type name."""
        return {t.spec.name: t.quant_type.name for t in self.tensors}

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def bit_meter(self) -> BitMeter:
        """The three figures of the file.

        Raises:
            FormatError: if the file has no decoder layers.
        """
        kind = self.value("general.type", "model")
        if kind != "model" or not any(t.spec.layer is not None and t.spec.is_matrix for t in self.tensors):
            raise FormatError(
                f"{self.path} has no decoder layers ({kind}, {self.architecture}); expected a language model"
            )
        return measure_bits((t.spec for t in self.tensors), self.types, self.file_bytes)

    @staticmethod
    def _stored(tensor: gguf.ReaderTensor) -> StoredTensor:
        quant_type = BY_GGML_ID.get(int(tensor.tensor_type))
        if quant_type is None:
            raise FormatError(f"{tensor.name} has the type {tensor.tensor_type.name}, which is not supported")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if not shape or 0 in shape:
            raise FormatError(f"{tensor.name} has the shape {shape}; expected at least one weight")
        layer = _LAYER.match(tensor.name)
        spec = TensorSpec(
            name=tensor.name,
            source_name=None if tensor.name in _COMPUTED else tensor.name,
            shape=shape,
            layer=int(layer.group(1)) if layer else None,
        )
        data = tensor.data.reshape(-1).view(np.uint8).reshape(-1, quant_type.row_bytes(shape[-1]))
        return StoredTensor(spec, quant_type, data)

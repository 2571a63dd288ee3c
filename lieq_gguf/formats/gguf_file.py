"""A GGUF file read back: its metadata, its tensors, its figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import FormatError
from lieq_gguf.formats.gguf_header import TensorInfo, read_header, type_name
from lieq_gguf.quant_types import BY_GGML_ID, QuantType
from lieq_gguf.records.bits import BitMeter, measure_bits
from lieq_gguf.records.spec import TensorSpec

_LAYER = re.compile(r"blk\.(\d+)\.")
_FILE_COUNTS = ("split.count", "split.no", "split.tensors.count")
_COUNTS_OF_LAYERS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
_COUNTS = (
    *_COUNTS_OF_LAYERS, "attention.key_length", "attention.value_length", "block_count", "context_length",
    "embedding_length", "expert_count", "expert_feed_forward_length", "expert_used_count", "nextn_predict_layers",
    "vocab_size",
)  # fmt: skip
COMPUTED_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Computed by the converter; not weights of the source."""

# llama-quantize does not quantise these matrices; build 0.3.36 of llama-cpp-python, tensor_allows_quantization
_UNQUANTIZED_SUBSTRINGS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_UNQUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        spec: Name and shape.
        quant_type: How it is stored.
        data: ``[n_rows, row_bytes]``, mapped from the file.
        offset: First byte in the file.
    """

    spec: TensorSpec
    quant_type: QuantType
    data: npt.NDArray[np.uint8]
    offset: int


def require_gguf_file(path: Path) -> None:
    """Refuse a path where there is no file.

    Raises:
        FormatError: naming it.
    """
    if path.is_dir():
        raise FormatError(f"{path} is a folder; expected a GGUF file, which convert makes of a model directory")
    if not path.is_file():
        raise FormatError(f"{path} does not exist or is not a file; expected a GGUF file")


class GgufFile:
    """A GGUF file; tensors are mapped, not loaded.

    Attributes:
        path: The file.
        tensors: Its tensors in file order.

    Raises:
        FormatError: if the file is missing, damaged or cut short, or has an unsupported tensor type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_gguf_file(path)
        try:
            # an empty file cannot be mapped
            self._content = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
            header = read_header(self._content.data)
            self._values, self._spans = header.values, header.spans
            _require_counts(header.values)
            self.tensors = tuple(self._stored(t) for t in header.tensors)
        except (ValueError, OSError) as error:
            size = path.stat().st_size
            raise FormatError(f"{path} is not a complete GGUF file ({size:,} bytes: {error}); make it again") from None

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

    @cached_property
    def _n_decoder_blocks(self) -> int:
        """Blocks that are decoder layers; heads for multi-token prediction follow them."""
        arch, unlimited = self.architecture, 1 << 32
        n_heads = int(self.value(f"{arch}.nextn_predict_layers", 0))
        return int(self.value(f"{arch}.block_count", unlimited)) - n_heads if n_heads else unlimited

    @cached_property
    def _active_share(self) -> float:
        """Share of the experts that a token uses."""
        arch = self.architecture
        return int(self.value(f"{arch}.expert_used_count", 1)) / max(1, int(self.value(f"{arch}.expert_count", 1)))

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        return self._values.get(key, default)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the metadata in file order."""
        return tuple(self._values)

    def value_bytes(self, key: str) -> bytes:
        """A value of the metadata as stored, its type first."""
        start, stop = self._spans[key]
        return self._content[start:stop].tobytes()

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

    def _stored(self, tensor: TensorInfo) -> StoredTensor:
        quant_type = BY_GGML_ID.get(tensor.ggml_id)
        if quant_type is None:
            raise FormatError(f"{tensor.name} has the type {type_name(tensor.ggml_id)}, which is not supported")
        if not tensor.shape or 0 in tensor.shape:
            raise FormatError(f"{tensor.name} has the shape {tensor.shape}; expected at least one weight")
        if not quant_type.fits(tensor.shape[-1]):
            raise FormatError(
                f"{tensor.name} has rows of {tensor.shape[-1]}, which do not fit the blocks of {quant_type.name}"
            )
        block = _LAYER.match(tensor.name)
        layer = None if block is None or int(block.group(1)) >= self._n_decoder_blocks else int(block.group(1))
        is_extra = layer is None and block is not None  # a head for multi-token prediction, whose type is not chosen
        spec = TensorSpec(
            name=tensor.name,
            source_name=None if tensor.name in COMPUTED_TENSORS else tensor.name,
            shape=tensor.shape,
            layer=layer,
            is_fixed=len(tensor.shape) > 1
            and (is_extra or is_never_quantised(tensor.name) or prod(tensor.shape[:-1]) == 1),
            active_share=self._active_share if len(tensor.shape) == 3 or "_exps." in tensor.name else 1.0,
        )
        stop = tensor.offset + quant_type.tensor_bytes(tensor.shape)
        if stop > len(self._content):
            raise ValueError(f"{tensor.name} ends at byte {stop:,}")
        data = self._content[tensor.offset : stop].reshape(-1, quant_type.row_bytes(tensor.shape[-1]))
        return StoredTensor(spec, quant_type, data, tensor.offset)


def _require_counts(values: Mapping[str, Any]) -> None:
    """Refuse counts that are not whole numbers; some keys may hold one count per layer."""
    arch = values.get("general.architecture")
    for key in (*_FILE_COUNTS, *(f"{arch}.{name}" for name in _COUNTS)):
        value = values.get(key, 0)
        is_per_layer = isinstance(value, list) and key.removeprefix(f"{arch}.") in _COUNTS_OF_LAYERS
        counts = value if is_per_layer else [value]
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 32 for n in counts):
            raise ValueError(f"{key} is {str(value)[:40]!r}, expected a whole number")


def is_never_quantised(name: str) -> bool:
    """Whether llama-quantize never quantises a tensor, whatever its shape."""
    return (
        not name.endswith("weight")
        or name in _UNQUANTIZED_NAMES
        or any(substring in name for substring in _UNQUANTIZED_SUBSTRINGS)
    )

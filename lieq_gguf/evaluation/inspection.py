"""What is in a GGUF file, and how much memory it will need. Reads only the header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.records.bits import BitMeter, layer_bpw
from lieq_gguf.records.files import SCHEMA_VERSION
from lieq_gguf.records.spec import TensorSpec

_CONTEXT = 4096


@dataclass(frozen=True)
class Inspection:
    """A file at a glance.

    Attributes:
        file: The file.
        architecture: llama.cpp's name of it.
        n_layers: Decoder layers.
        tensors: All tensors.
        types: Tensor name to type name.
        meter: The three figures.
        layer_scores: Layer scores used to make it; empty for a file of another tool.
        provenance: ``lieq.*`` metadata, by the key without ``lieq.``.
        kv_cache_bytes: Key-value cache at ``n_ctx`` tokens in F16.
        n_ctx: Number of tokens for the cache.
        bytes_per_token: Bytes of weights read to generate a token.
    """

    file: Path
    architecture: str
    n_layers: int
    tensors: tuple[TensorSpec, ...]
    types: dict[str, str]
    meter: BitMeter
    layer_scores: tuple[float, ...]
    provenance: dict[str, str]
    kv_cache_bytes: int
    n_ctx: int
    bytes_per_token: int

    def to_json(self) -> dict[str, Any]:
        """The document that ``inspect --json`` prints."""
        bpw = layer_bpw(self.tensors, self.types)
        return {
            "schema_version": SCHEMA_VERSION,
            "file": str(self.file),
            "architecture": self.architecture,
            "n_layers": self.n_layers,
            **self.meter.to_json(),
            "types": self.types,
            "layers": [
                {
                    "layer": layer,
                    "bpw": bpw[layer],
                    "types": {t.role: self.types[t.name] for t in self.tensors if t.layer == layer and t.is_matrix},
                }
                for layer in range(self.n_layers)
            ],
            "provenance": self.provenance,
            "n_ctx": self.n_ctx,
            "kv_cache_bytes": self.kv_cache_bytes,
            "bytes_per_token": self.bytes_per_token,
        }


def inspect(file: Path) -> Inspection:
    """Read a file's header.

    Raises:
        FormatError: if the file is not a complete GGUF file of a language model.
    """
    content = GgufFile(file)
    meter = content.bit_meter()
    arch = content.architecture
    n_ctx = min(int(content.value(f"{arch}.context_length", _CONTEXT)), _CONTEXT)
    return Inspection(
        file=file,
        architecture=arch,
        n_layers=content.n_layers,
        tensors=tuple(t.spec for t in content.tensors),
        types=content.types,
        meter=meter,
        layer_scores=tuple(_list(content.value("lieq.layer_scores"))),
        provenance={
            key: str(content.value(f"lieq.{key}"))
            for key in ("version", "method", "scorer", "target.kind", "target.value", "command_line")
            if content.value(f"lieq.{key}") is not None
        },
        kv_cache_bytes=2 * _cache_width(content) * n_ctx,
        n_ctx=n_ctx,
        # each token reads all matrices, except tables of tokens and experts that are not chosen
        bytes_per_token=round(
            sum(
                t.data.nbytes * t.spec.active_share
                for t in content.tensors
                if not t.spec.is_looked_up("output.weight" not in content.types)
            )
        ),
    )


def _list(value: object) -> list[Any]:
    """An array of the metadata; empty if the value is not an array."""
    return value if isinstance(value, list) else []


def _cache_width(content: GgufFile) -> int:
    """Numbers that a token adds to the key-value cache of all layers, assuming no layer has a window."""

    def attention(key: str, default: int) -> Any:
        return content.value(f"{content.architecture}.attention.{key}", default)

    heads = attention("head_count", 0)
    kv_heads = attention("head_count_kv", heads)
    n_layers = content.n_layers
    counts = kv_heads if isinstance(kv_heads, list) else [kv_heads] * n_layers
    is_recurrent = _list(attention("recurrent_layers", 0)) or [False] * n_layers
    has_window = _list(attention("sliding_window_pattern", 0)) or [False] * n_layers
    n_heads = max(heads) if isinstance(heads, list) else heads
    usual = content.value(f"{content.architecture}.embedding_length", 0) // max(1, n_heads)
    width = attention("key_length", usual) + attention("value_length", usual)
    in_window = attention("key_length_swa", 0) + attention("value_length_swa", 0) or width
    n_with_cache = n_layers - attention("shared_kv_layers", 0)  # the others use that of earlier layers
    return int(
        sum(
            counts[layer] * (in_window if has_window[layer] else width)
            for layer in range(min(n_with_cache, len(counts), len(is_recurrent), len(has_window)))
            if not is_recurrent[layer]
        )
    )

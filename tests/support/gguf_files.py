"""Other GGUF files made from one: with other values, in parts, as another architecture."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.gguf_header import HeaderWriter, TensorLayout, write_gguf
from lieq_gguf.native import ggml


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, Any]], None] = lambda _values: None,
    keep: Callable[[str], bool] = lambda _name: True,
    convert: Callable[[str, np.ndarray[Any, Any]], tuple[np.ndarray[Any, Any], int]] | None = None,
    order: Callable[[str], Any] = lambda _name: 0,
) -> Path:
    """The same file with other values (None removes one), some of the tensors, other types, or another order."""
    file = GgufFile(source)
    values: dict[str, Any] = {key: file.value_bytes(key) for key in file.keys}
    change(values)
    writer = HeaderWriter("")
    for key, value in values.items():
        if isinstance(value, bytes):
            writer.values[key] = value
        elif value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    tensors = []
    for t in sorted((t for t in file.tensors if keep(t.spec.name)), key=lambda t: order(t.spec.name)):
        data, kind = t.data, t.quant_type.ggml_id
        if convert is not None:
            data, kind = convert(t.spec.name, ggml.dequantize(t.data, t.quant_type))
        tensors.append((TensorLayout(t.spec.name, t.spec.shape, kind, data.nbytes), data))
    write_gguf(target, writer.values, tensors)
    return target


def with_unheard_of_value(values: dict[str, Any]) -> None:
    """A number that nobody knows, which leaves the model to llama.cpp."""
    architecture = values["general.architecture"][12:].decode()  # type and length come first
    values[f"{architecture}.unheard_of"] = 1


def split(file: Path, folder: Path, count: int) -> list[Path]:
    """Parts as llama-gguf-split makes them: metadata in the first, tensors in all."""
    names = [t.spec.name for t in GgufFile(file).tensors]
    paths = []
    for i in range(count):

        def change(values: dict[str, Any], i: int = i) -> None:
            if i:
                values.clear()
            values["split.no"] = struct.pack("<IH", gguf.GGUFValueType.UINT16, i)
            values["split.count"] = struct.pack("<IH", gguf.GGUFValueType.UINT16, count)
            values["split.tensors.count"] = struct.pack("<Ii", gguf.GGUFValueType.INT32, len(names))

        path = folder / f"whole-{i + 1:05d}-of-{count:05d}.gguf"
        paths.append(rewrite(file, path, change, lambda name, i=i: names.index(name) % count == i))  # type: ignore[misc]
    return paths


def as_architecture(name: str) -> Callable[[dict[str, Any]], None]:
    """The values of a Llama for another architecture of llama.cpp whose tensors are the same."""

    def change(values: dict[str, Any]) -> None:
        for key in [key for key in values if key.startswith("llama.")]:
            values[name + key.removeprefix("llama")] = values.pop(key)
        values["general.architecture"] = name
        for key in ("key_length", "value_length"):
            values[f"{name}.attention.{key}"] = struct.pack("<II", gguf.GGUFValueType.UINT32, 64)

    return change

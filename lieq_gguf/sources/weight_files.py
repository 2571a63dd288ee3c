"""The safetensors of a model directory, under the names that transformers' models use for a family's tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from lieq_gguf.architectures.modules import GatesAndUps
from lieq_gguf.errors import SourceError
from lieq_gguf.sources.tensor_names import EMBEDDING, Place, own_name, with_single_matrices, with_usual_names

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PLAIN_DTYPES = ("BF16", "F16", "F32")
_BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "I64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "U8": 8, "I8": 8}
_SAMPLE_BYTES = 1024
_COMPARED_BYTES = 1 << 24  # of two tensors at a time
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

FOR_IMAGES_AND_SOUND = re.compile(r"visual|vision|audio|projector|image|video|speech")
"""In names of tensors that are no part of a language model."""
_COMPUTED = re.compile(r".*\.(inv_freq|masked_bias|position_ids)|(.*\.)?lm_head\.weight")
# parts of a model that are no part of its language model, by what is said of them
_PARTS = {
    "the heads for multi-token prediction ({}) are left out; llama.cpp runs the model without them": re.compile(
        r"(^|\.)mtp\."
    ),
    "the parts for images and sound ({}) are left out; llama.cpp reads them from a file of their own, published as "
    "mmproj beside GGUF files of the model": FOR_IMAGES_AND_SOUND,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by the header of its file.

    Attributes:
        name: Its name in the file.
        file: The file.
        shape: Its shape.
        dtype: Its type, as safetensors names it.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """Reads tensors, memory-mapped and not copied where a whole stored tensor is asked for.

    Names are those of a model with a head on top, ``model.layers.…`` and ``lm_head.weight``, whatever prefix the files
    have, with one matrix per expert, and gates by themselves; those of experts also together with up.

    Attributes:
        path: The directory.
        names: All names.
        prefix: What the names in the files have in place of ``model.``.
        notes: What the user may want to know about the files.

    Raises:
        SourceError: if there are no weights, or a file is missing or damaged.
    """

    def __init__(self, path: Path, gates_and_ups: GatesAndUps = "halves") -> None:
        """Read the headers; a family says where stacked experts have the rows of gates and ups."""
        self.path = path
        self._open: dict[Path, Any] = {}  # to read tensors
        self._headers: dict[Path, Any] = {}
        shard_of, self.notes = _find_shards(path)
        self._shards = sorted(set(shard_of.values()))
        places, prefix = with_usual_names({own_name(name): Place(shard, name) for name, shard in shard_of.items()})
        self.prefix = prefix
        self._stored = shard_of
        self._places = dict(with_single_matrices(places, lambda place: self._shape_and_dtype(place)[0], gates_and_ups))
        self.names = frozenset(self._places)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Require tensors of these names and shapes.

        Raises:
            SourceError: naming what is missing or wrong.
        """
        for name, expected in shapes.items():
            if name not in self._places:
                raise SourceError(
                    f"{self.path} has no tensor {name}; expected all tensors that config.json describes"
                    + _names_found(self.names)
                )
            shape, dtype = self._shape_and_dtype(self._places[name])
            shard = self._places[name].shard
            if shape != expected:
                raise SourceError(f"{name} in {shard} has shape {shape}; by config.json expected {expected}")
            if dtype not in PLAIN_DTYPES:
                raise SourceError(f"{name} in {shard} is {dtype}; expected {', '.join(PLAIN_DTYPES)}")
        self.require_all_experts(shapes)
        self.release()

    def require_all_experts(self, names: Collection[str]) -> None:
        """Require that no stacked tensor has more experts than the names.

        Raises:
            SourceError: naming the tensor that has.
        """
        experts: dict[tuple[Path, str], set[int]] = {}
        for place in (self._places[name] for name in names):
            if place.expert is not None:
                experts.setdefault((place.shard, place.stored_name), set()).add(place.expert)
        for (shard, stored_name), used in experts.items():
            n_stored = self._shape_and_dtype(Place(shard, stored_name))[0][0]
            if n_stored != len(used):
                raise SourceError(
                    f"{stored_name} in {shard} has {n_stored} experts; by config.json expected {len(used)}"
                )

    def left_out(self, used: Collection[str]) -> tuple[str, ...]:
        """Notes about what the files hold besides the tensors in use."""
        in_use = {self._places[name].stored_name for name in used}
        n_bytes: dict[str, list[int]] = {}
        for name, shard in sorted(self._stored.items()):
            if name in in_use or _COMPUTED.fullmatch(name):
                continue
            shape, dtype = self._shape_and_dtype(Place(shard, name))
            part = next((part for part, pattern in _PARTS.items() if pattern.search(name)), name)
            n_bytes.setdefault(part, []).append(prod(shape) * _BITS.get(dtype, 32) // 8)
        self.release()
        notes = [
            f"{part.format(f'{sum(sizes) / 1e9:.2f} GB')}" for part in _PARTS if (sizes := n_bytes.pop(part, None))
        ]
        if n_bytes:
            first = next(iter(n_bytes))
            notes.append(
                f"{first}, which the model does not use, is left out"
                if len(n_bytes) == 1
                else f"{len(n_bytes)} tensors that the model does not use are left out; the first is {first}"
            )
        return tuple(notes)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own type."""
        place = self._places[name]
        if place.shard not in self._open:
            self._open[place.shard] = safe_open(place.shard, framework="pt")
        file = self._open[place.shard]
        result: torch.Tensor
        if place.expert is None:
            result = file.get_tensor(place.stored_name)
        else:
            result = file.get_slice(place.stored_name)[place.expert]
        if place.is_transposed:
            result = result.T
        return (result if place.rows is None else result[place.rows]).contiguous()

    def stored(self, name: str) -> StoredTensor:
        """A tensor by its header."""
        place = self._places[name]
        return StoredTensor(place.stored_name, place.shard, *self._shape_and_dtype(place))

    def is_part(self, name: str) -> bool:
        """Whether the files have it as a part of a larger tensor."""
        return self._places[name].is_part

    def stored_name(self, name: str) -> str:
        """The name that the files have for a tensor."""
        return self._places[name].stored_name

    def is_renamed(self, name: str) -> bool:
        """Whether the files have another name for a tensor, apart from what all begin with, or several in one."""
        return own_name(self.stored_name(name)) != self.stored_name(name)

    def is_zero(self, name: str) -> bool:
        """Whether all bytes of a stored tensor are zero; it is read until one is not."""
        content = self._bytes(self._places[name])
        return not any(
            content[start : start + _COMPARED_BYTES].any() for start in range(0, len(content), _COMPARED_BYTES)
        )

    def numbers(self, names: Sequence[str]) -> list[float]:
        """Numbers that are tensors of their own, without loading torch.

        Raises:
            SourceError: naming the tensor that is missing or holds more than one number.
        """
        for name in names:
            shape = self._shape_and_dtype(self._places[name])[0] if name in self._places else ()
            self.require({name: shape if shape in ((), (1,)) else (1,)})
        return [self._number(name) for name in names]

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are stored with the same bytes; they are read until they differ."""
        a, b = self._bytes(self._places[name]), self._bytes(self._places[other])
        parts = (slice(start, start + _COMPARED_BYTES) for start in range(0, len(a), _COMPARED_BYTES))
        return len(a) == len(b) and all(np.array_equal(a[part], b[part]) for part in parts)

    def release(self) -> None:
        """Unmap the files, whose pages count as this process's memory while they are mapped.

        Tensors that were read stay valid; the next ``read`` maps the file again.
        """
        self._open.clear()
        self._headers.clear()

    def add_to(self, digest: hashlib._Hash) -> None:
        """Digest the headers and some bytes of every tensor: a few kilobytes per tensor, not the model."""
        for shard in self._shards:
            with shard.open("rb") as file:
                header = _read_header(file)
                first = file.tell()
                digest.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        start, stop = entry["data_offsets"]
                        for offset in (start, (start + stop) // 2, max(start, stop - _SAMPLE_BYTES)):
                            file.seek(first + offset)
                            digest.update(file.read(_SAMPLE_BYTES))

    def _bytes(self, place: Place) -> npt.NDArray[np.uint8]:
        self._header(place)  # refuses a file that is cut off
        with place.shard.open("rb") as file:
            start, stop = json.loads(_read_header(file))[place.stored_name]["data_offsets"]
            return np.memmap(place.shard, np.uint8, "r", file.tell() + start, (stop - start,))

    def _number(self, name: str) -> float:
        place = self._places[name]
        content, dtype = self._bytes(place).tobytes(), self._shape_and_dtype(place)[1]
        if dtype == "BF16":  # the upper half of a float32
            content, dtype = bytes(2) + content, "F32"
        return float(np.frombuffer(content, dtype={"F16": "<f2", "F32": "<f4"}[dtype])[0])

    def _shape_and_dtype(self, place: Place) -> tuple[tuple[int, ...], str]:
        header = self._header(place)
        return place.shape_in(tuple(header.get_shape())), header.get_dtype()

    def _header(self, place: Place) -> Any:
        if place.shard not in self._headers:
            self._headers[place.shard] = _open_shard(place.shard)
        try:
            return self._headers[place.shard].get_slice(place.stored_name)
        except SafetensorError:
            raise SourceError(
                f"{place.shard} has no tensor {place.stored_name}, although {INDEX_FILE} says so: download it again"
            ) from None


def read_index(file: Path) -> dict[str, str]:
    """Tensor name to file name, from the index of a model in several files.

    Raises:
        SourceError: if it is damaged.
    """
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, AttributeError, TypeError):
        raise SourceError(f"{file} is damaged; expected a JSON object with a 'weight_map'") from None


def _find_shards(path: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Tensor name to the file that holds it, and notes; of two sets of weights, those that transformers loads."""
    single, index = path / WEIGHTS_FILE, path / INDEX_FILE
    if single.is_file():
        note = f"{WEIGHTS_FILE} is converted, as transformers loads it, not the files of {INDEX_FILE}"
        with _open_shard(single) as file:
            return dict.fromkeys(file.keys(), single), (note,) if index.is_file() else ()
    if index.is_file():
        shards = {name: path / file for name, file in read_index(index).items()}
        for shard in sorted(set(shards.values())):
            if not shard.is_file():
                raise SourceError(f"{shard.name} is missing, but {index} names it; download it into {path}")
        return shards, ()
    pickles = sorted(f.name for pattern in _PICKLES for f in path.glob(pattern))
    if pickles:
        raise SourceError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
            f"expected {WEIGHTS_FILE}: re-save the model with transformers' save_pretrained"
        )
    raise SourceError(f"{path} holds no weights; expected {WEIGHTS_FILE} or {INDEX_FILE} with its shards")


def _read_header(file: BinaryIO) -> bytes:
    """The header of a safetensors file, as JSON; the data begins where the file then stands."""
    return file.read(int.from_bytes(file.read(8), "little"))


def _open_shard(shard: Path) -> Any:
    # With numpy as framework, headers are read without loading torch.
    try:
        return safe_open(shard, framework="numpy")
    except (SafetensorError, OSError) as error:
        size = shard.stat().st_size if shard.exists() else 0
        raise SourceError(
            f"{shard} is damaged or incomplete ({size:,} bytes: {error}); expected a safetensors file: "
            "download it again"
        ) from None


def _names_found(names: Iterable[str]) -> str:
    """An example of the names, for the message that none of the expected names is there."""
    examples = sorted(names)
    return "" if EMBEDDING in examples or not examples else f"; the first of its {len(examples)} names is {examples[0]}"

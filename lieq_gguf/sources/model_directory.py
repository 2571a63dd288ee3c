"""A model directory as Hugging Face publishes it: ``config.json`` and safetensors, memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lieq_gguf.architectures import find_family
from lieq_gguf.errors import SourceError
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.directory_metadata import DirectoryMetadata
from lieq_gguf.sources.row_order import FloatArray, file_rows
from lieq_gguf.tokenizers import SourceTokenizer, load_source_tokenizer, read_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("BF16", "F16", "F32")
_SAMPLE_BYTES = 1024
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelDirectory:
    """A readable model: its spec from headers alone, its tensors on demand.

    Attributes:
        path: The directory.
        spec: What the model is made of.
        family: The functions of its architecture.

    Raises:
        SourceError: if something is missing, damaged, or stored in a form that is no plain weight.
        ArchitectureError: if the architecture is not supported.
    """

    has_transformers_model = True
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        config = _read_config(path)
        if "quantization_config" in config:
            details = config["quantization_config"]
            method = details.get("quant_method", "unnamed") if isinstance(details, dict) else "unnamed"
            raise SourceError(f"{path} is already quantised ({method}); expected the original BF16, F16 or F32 weights")
        self.family = find_family(config)
        self._shard_of = _find_shards(path)
        try:
            self.family.check(config)
            tensors = self.family.tensors(config, frozenset(self._shard_of))
        except KeyError as error:
            raise SourceError(f"{path / 'config.json'} has no {error}; expected the configuration of a model") from None
        self._check_headers(tensors)
        self._open: dict[Path, Any] = {}
        self.spec = ModelSpec(
            name=path.resolve().name,
            architecture=self.family.gguf_name,
            config=config,
            n_layers=config["num_hidden_layers"],
            tensors=tensors,
            has_tied_embeddings=not any(t.name == "output.weight" for t in tensors),
        )

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor in the source's own type and row order, mapped and not copied."""
        import torch

        if tensor.source_name is None:
            return torch.from_numpy(self.family.computed_tensors(self.spec.config)[tensor.name])
        shard = self._shard_of[tensor.source_name]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        loaded: torch.Tensor = self._open[shard].get_tensor(tensor.source_name)
        return loaded

    def rows(self, tensor: TensorSpec) -> Iterator[FloatArray]:
        """The weights in file order, some rows ``[n_rows, n_in]`` at a time; a vector is one row."""
        yield from file_rows(tensor, self.read(tensor))

    def encoded_rows(self, tensor: TensorSpec, quant_type: QuantType) -> None:
        """None: no weights of a directory are quantised."""

    def check_output(self, output: Path) -> None:
        """Nothing: no file of the directory is a GGUF."""

    def transformers_config(self) -> PretrainedConfig:
        """The configuration that transformers reads, for float32.

        Raises:
            SourceError: if transformers does not read it.
        """
        import torch
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise SourceError(
                f"transformers does not read {self.path / 'config.json'}: {str(error).splitlines()[0]}"
            ) from None
        config.dtype = torch.float32
        return config

    def load_tokenizer(self) -> SourceTokenizer:
        """The tokenizer that the directory's files define."""
        return load_source_tokenizer(self.path)

    def read_metadata(self, pre_tokenizer: str | None = None) -> DirectoryMetadata:
        """What the file is to say of the model; with a name for the pre-tokenizer if it cannot be recognised.

        Raises:
            TokenizerError: if llama.cpp cannot tokenise as the model's files say.
        """
        vocabulary = read_vocabulary(self.path, self.spec.config["vocab_size"], pre_tokenizer)
        return DirectoryMetadata(self.path, self.spec, self.family, vocabulary)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of configuration, tensor headers and some bytes of every tensor: another model has another.

        Reads a few kilobytes a tensor, not the model.
        """
        digest = hashlib.sha256(json.dumps(dict(self.spec.config), sort_keys=True).encode())
        for shard in sorted(set(self._shard_of.values())):
            with shard.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = file.read(header_bytes)
                digest.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        start, stop = entry["data_offsets"]
                        for offset in (start, (start + stop) // 2, max(start, stop - _SAMPLE_BYTES)):
                            file.seek(8 + header_bytes + offset)
                            digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:32]

    @property
    def tokenizer_fingerprint(self) -> str:
        """A digest of the tokenizer's files."""
        digest = hashlib.sha256()
        for name in _TOKENIZER_FILES:
            file = self.path / name
            digest.update(file.read_bytes() if file.is_file() else b"none")
        return digest.hexdigest()[:32]

    def release(self) -> None:
        """Unmap the shards, whose pages count as this process's memory as long as they are mapped.

        Tensors that were read stay valid; the next ``read`` maps again.
        """
        self._open.clear()

    def _check_headers(self, tensors: tuple[TensorSpec, ...]) -> None:
        wanted: dict[Path, list[TensorSpec]] = {}
        for tensor in tensors:
            if tensor.source_name is None:
                continue
            if tensor.source_name not in self._shard_of:
                raise SourceError(
                    f"{self.path} has no tensor {tensor.source_name}; expected all tensors that config.json describes"
                )
            wanted.setdefault(self._shard_of[tensor.source_name], []).append(tensor)
        for shard, shard_tensors in wanted.items():
            with _open_shard(shard) as file:
                names = set(file.keys())
                for tensor in shard_tensors:
                    if tensor.source_name not in names:
                        raise SourceError(
                            f"{shard} has no tensor {tensor.source_name}, which {_INDEX} says it holds: "
                            "download it again"
                        )
                    header = file.get_slice(tensor.source_name)
                    shape = tuple(header.get_shape())
                    if shape != tensor.shape:
                        raise SourceError(
                            f"{tensor.source_name} in {shard} has shape {shape}; config.json makes it {tensor.shape}"
                        )
                    if header.get_dtype() not in _DTYPES:
                        raise SourceError(
                            f"{tensor.source_name} in {shard} is {header.get_dtype()}; expected {', '.join(_DTYPES)}"
                        )


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise SourceError(f"{path} {found}; expected a model directory with config.json and model.safetensors")
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{path} has no config.json; expected a model directory as Hugging Face lays it out"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    return config


def _find_shards(path: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = path / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {str(name): path / str(file) for name, file in weight_map.items()}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, AttributeError, TypeError):
            raise SourceError(f"{index} is damaged; expected a JSON object with a 'weight_map'") from None
        for shard in sorted(set(shards.values())):
            if not shard.is_file():
                raise SourceError(f"{shard.name} is missing, which {index} names; download it into {path}")
        return shards
    single = path / _SINGLE
    if single.is_file():
        with _open_shard(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(f.name for pattern in _PICKLES for f in path.glob(pattern))
    if pickles:
        raise SourceError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
            f"expected {_SINGLE}: re-save the model with transformers' save_pretrained"
        )
    raise SourceError(f"{path} holds no weights; expected {_SINGLE} or {_INDEX} with its shards")


def _open_shard(shard: Path) -> Any:
    # numpy as framework reads headers without loading torch.
    try:
        return safe_open(shard, framework="numpy")
    except (SafetensorError, OSError) as error:
        size = shard.stat().st_size if shard.exists() else 0
        raise SourceError(
            f"{shard} is damaged or incomplete ({size:,} bytes: {error}); expected a safetensors file: "
            "download it again"
        ) from None

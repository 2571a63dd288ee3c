"""A model directory as Hugging Face publishes it: ``config.json`` and safetensors, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lieq_gguf.architectures import FAMILIES, MTP_KEPT, Decoder, find_family, is_wrapper, language_model_config
from lieq_gguf.errors import SourceError
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.adapter import LoraAdapter, load_adapter
from lieq_gguf.sources.directory_metadata import directory_metadata
from lieq_gguf.sources.file_order import FloatArray, file_rows, multiplied
from lieq_gguf.sources.published import find_format
from lieq_gguf.sources.published.stored import WeightFormat
from lieq_gguf.sources.published.weights import PublishedWeights
from lieq_gguf.sources.source import SourceMetadata
from lieq_gguf.sources.tensor_names import EMBEDDING, HEAD, MTP_PREFIX
from lieq_gguf.sources.weight_files import WEIGHTS_FILE, WeightFiles
from lieq_gguf.tokenizers import (
    SourceTokenizer,
    adds_bos_unlike_transformers,
    load_source_tokenizer,
    read_vocabulary,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_KEEPING = ", ".join(family.gguf_name for family in FAMILIES if family.keeps_mtp)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tekken.json", "chat_template.jinja", "chat_template.json", "processor_config.json",
)  # fmt: skip
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[0-9a-f]{40}")


class ModelDirectory:
    """A model in a directory: its spec from headers alone, its tensors on demand.

    Attributes:
        path: The directory.
        repository: Its name on the hub, ``owner/name``, if it is a snapshot in the hub's cache.
        spec: Tensors and structure of the model.
        family: The functions of its architecture.
        is_wrapper: Whether it is the language model inside a model of images or sound.
        adapter: The adapter merged into its tensors when they are read, or None.

    Raises:
        SourceError: if something is missing, damaged, or stored in a format that cannot be read, or if the adapter
            cannot be merged.
        ArchitectureError: if the architecture is not supported.
    """

    has_transformers_model = True

    def __init__(self, path: Path, adapter: Path | None = None, *, keeps_mtp: bool = False) -> None:
        """Open a model, optionally with the directory of a LoRA adapter, and with its head for several tokens."""
        self.path = path
        self.repository = repository_of(path)
        supported = read_supported_config(path)
        self.family, self.is_wrapper = supported.family, supported.is_wrapper
        files = WeightFiles(path, self.family.gates_and_ups)
        self._weights = files if supported.stored_as is None else PublishedWeights(files, supported.stored_as)
        config = {**supported.config, **self._header_parameters(supported.config["num_hidden_layers"])}
        if keeps_mtp:
            self._require_mtp()
            config[MTP_KEPT] = 1
        with _complete_config(path):
            tensors = self.family.tensors(config, self._names_in_use(config))
        self._weights.require({name: t.source_shape for t in tensors for name in t.source_names})
        self.spec = ModelSpec(
            name=model_name(path),
            architecture=self.family.gguf_name,
            config=config,
            n_layers=config["num_hidden_layers"],
            tensors=tensors,
            has_tied_embeddings=not any(t.name == "output.weight" for t in tensors),
        )
        self.adapter: LoraAdapter | None = None if adapter is None else load_adapter(adapter, path, self.spec)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before the conversion."""
        return self.family.caveats(self.spec.config)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may want to know, less important than a warning."""
        notes, weights = [*self._weights.notes], self._weights
        if weights.prefix not in ("model.", "backbone.", "") and not self.is_wrapper:
            notes.append(
                f"the names of the tensors begin with {weights.prefix}: only those of the language model are used"
            )
        used = {name for tensor in self.spec.tensors for name in tensor.source_names}
        in_header = self.family.header_parameters
        used |= {f"model.layers.{layer}.{name}" for layer in range(self.spec.n_layers) for name in in_header}
        notes += [
            f"{note}; --mtp keep writes them" if self.family.keeps_mtp and note.startswith("the heads") else note
            for note in weights.left_out(used)
        ]
        return tuple(notes) + (() if self.adapter is None else self.adapter.notes)

    @property
    def has_mtp(self) -> bool:
        """Whether it has a head for multi-token prediction, which need not be in use."""
        return any(name.startswith(MTP_PREFIX) for name in self._weights.names)

    @property
    def notes_on_scores(self) -> tuple[str, ...]:
        """No notes: config.json has all that scores need."""
        return ()

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor in the source's own type and row order, mapped and not copied; float32 if an adapter changes it.

        A matrix that is published quantised is decoded, in the type that transformers gives it. Matrices of experts are
        stacked, ``[n_experts, n_out, n_in]``, and so are their biases.
        """
        if tensor.source_name is None:
            return self.family.computed_tensor(self.spec.config, tensor.name)
        if not tensor.of_experts:
            return self._stored(tensor.source_name)
        import torch

        return torch.stack([self._stored(name) for name in tensor.source_names])

    def read_rows(self, tensor: TensorSpec, rows: Sequence[int]) -> torch.Tensor:
        """Some rows ``[n_rows, n_in]`` of a table of tokens."""
        assert tensor.source_name is not None
        factors = self.family.factors(self.spec.config, tensor.source_name)  # of a table they are the same for all rows
        return multiplied(self._merged(tensor.source_name)[list(rows)], factors)

    def read_head(self) -> torch.Tensor:
        """The output matrix that transformers uses: one of its own if the files have one, otherwise the embedding."""
        return self._stored(HEAD if HEAD in self._weights.names else EMBEDDING)

    def rows(self, tensor: TensorSpec) -> Iterator[FloatArray]:
        """The weights in file order, some rows ``[n_rows, n_in]`` of one matrix at a time; a vector is one row."""
        if tensor.of_experts:
            for name in tensor.source_names:  # one at a time: together they are much of the model
                yield from file_rows(tensor, self._stored(name))
        else:
            yield from file_rows(tensor, self.read(tensor))

    def encoded_rows(self, tensor: TensorSpec, quant_type: QuantType) -> None:
        """None: no weights of a directory are quantised."""

    def check_output(self, output: Path) -> None:
        """Check nothing: no file of the directory is a GGUF file."""

    def transformers_config(self) -> PretrainedConfig:
        """The configuration that transformers reads, for float32, without factors that are folded into the weights.

        Raises:
            SourceError: if transformers cannot read it.
        """
        import torch
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # it raises many kinds of errors for wrong values
            raise SourceError(
                f"transformers cannot read {self.path / 'config.json'}: {' '.join(str(error).split())}"
            ) from None
        text: PretrainedConfig = config.get_text_config()
        text.__dict__.pop("quantization_config", None)  # weights are decoded here
        text.dtype = torch.float32
        text.tie_word_embeddings = self.spec.has_tied_embeddings
        for key, value in self.family.folded_settings.items():
            setattr(text, key, value)
        return text

    def load_model(self) -> PreTrainedModel:
        """The whole model in transformers, in float32, without the adapter.

        Raises:
            SourceError: if transformers cannot make it.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils.quantization_config import Mxfp4Config

        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
        model: PreTrainedModel
        are_stacked = isinstance(self._weights, PublishedWeights) and self._weights.are_stacked
        if are_stacked:  # only MXFP4 can be, which transformers decodes by itself
            options["quantization_config"] = Mxfp4Config(dequantize=True)
        if are_stacked or isinstance(self._weights, WeightFiles):
            auto = AutoModelForImageTextToText if self.is_wrapper else AutoModelForCausalLM
            model = auto.from_pretrained(self.path, **options)
            return model
        # transformers needs a library for each format, and some of them a GPU; so it gets decoded weights
        config = self.transformers_config()
        for key in self.family.folded_settings:  # the weights are read without factors here
            setattr(config, key, self.spec.config[key])
        names = {name for tensor in self.spec.tensors for name in tensor.source_names} | {HEAD}
        has_class = type(config) in AutoModelForCausalLM._model_mapping
        if not has_class or any(self._weights.is_renamed(name) for name in names & self._weights.names):
            raise SourceError(
                f"{self.path} has decoded weights under names that transformers does not read; make an F16 GGUF of it "
                "(convert --types F16 --bits 16) and compare with that"
            )
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
        decoded = {name: self._weights.read(name) for name in names & self._weights.names}
        model = kind.from_pretrained(None, config=config, state_dict=decoded, **options)
        return model

    def load_tokenizer(self) -> SourceTokenizer:
        """The tokenizer of the directory's files."""
        return load_source_tokenizer(self.path)

    def transformers_ids(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Token ids that transformers makes of a text; None if it cannot load the tokenizer or leaves out BOS."""
        tokenizer = self._transformers_tokenizer
        return None if tokenizer is None else list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    @property
    def has_unreadable_tokenizer(self) -> bool:
        """Whether transformers cannot load the tokenizer, so that nothing says which tokens it adds to a text."""
        return self._transformers_tokenizer is None and not adds_bos_unlike_transformers(self.path)

    @cached_property
    def _transformers_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if adds_bos_unlike_transformers(self.path):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception:  # as for the configuration; our own reading of the files then stands alone
            return None

    def read_metadata(self, pre_tokenizer: str | None = None) -> SourceMetadata:
        """Metadata for the file; ``pre_tokenizer`` names a pre-tokenizer that cannot be recognised.

        Raises:
            TokenizerError: if llama.cpp does not support the model's tokenizer.
            FormatError: if config.json has a number that the format cannot store.
        """
        spec = self.spec
        vocabulary = read_vocabulary(self.path, spec.config["vocab_size"], pre_tokenizer, spec.architecture)
        adapter = None if self.adapter is None else self.adapter.name
        return directory_metadata(self.path, self.repository, spec, self.family, vocabulary, adapter)

    @cached_property
    def fingerprint(self) -> str:
        """A digest that differs for every model and adapter.

        It covers configuration, tensor headers, some bytes of every tensor, and the adapter. It reads a few kilobytes
        per tensor, not the model.
        """
        config = {key: value for key, value in self.spec.config.items() if key != MTP_KEPT}  # no pass runs it
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        self._weights.add_to(digest)
        if self.adapter is not None:
            digest.update(self.adapter.digest.encode())
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
        """Unmap the shards, whose pages count as this process's memory while they are mapped.

        Tensors that were read stay valid; the next ``read`` maps the file again.
        """
        self._weights.release()

    def _header_parameters(self, n_layers: int) -> dict[str, list[float]]:
        """Numbers among the weights that a GGUF file keeps in its header, one for each layer, by name in the layer."""
        return {
            name: self._weights.numbers([f"model.layers.{layer}.{name}" for layer in range(n_layers)])
            for name in self.family.header_parameters
        }

    def _require_mtp(self) -> None:
        if not self.has_mtp:
            raise SourceError(f"{self.path} has no head for multi-token prediction; leave out --mtp keep")
        if not self.family.keeps_mtp:
            raise SourceError(
                f"the head for multi-token prediction can be kept only of {_KEEPING}, not of {self.family.gguf_name}; "
                "leave out --mtp keep"
            )

    def _stored(self, name: str) -> torch.Tensor:
        return multiplied(self._merged(name), self.family.factors(self.spec.config, name))

    def _merged(self, name: str) -> torch.Tensor:
        loaded = self._weights.read(name)
        return loaded if self.adapter is None else self.adapter.merged(name, loaded)

    def _names_in_use(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Names of the tensors, without an output matrix that is the embedding once more.

        One that differs is used, whatever ``tie_word_embeddings`` says, as in transformers: merging an adapter into a
        model with tied embeddings leaves such files.
        """
        names = self._weights.names
        is_tied = config.get("tie_word_embeddings", self.family.tied_by_default)
        if is_tied and {HEAD, EMBEDDING} <= names and self._weights.are_equal(HEAD, EMBEDDING):
            return names - {HEAD}
        return names


def repository_of(path: Path) -> str | None:
    """The name on the hub, ``owner/name``, of a snapshot in the hub's cache; None for any other directory."""
    snapshot = _SNAPSHOT.fullmatch(path.resolve().as_posix())
    return None if snapshot is None else snapshot[1].replace("--", "/")


def model_name(path: Path) -> str:
    """Name of a model for people: its directory's name, or its name on the hub without the owner."""
    return (repository_of(path) or path.resolve().name).rpartition("/")[2]


@dataclass(frozen=True)
class SupportedConfig:
    """What ``config.json`` of a directory says.

    Attributes:
        config: That of the language model, complete.
        family: Its family.
        stored_as: The format of weights that are published quantised, or None.
        is_wrapper: Whether the language model is inside a model of images or sound.
    """

    config: Mapping[str, Any]
    family: Decoder
    stored_as: WeightFormat | None
    is_wrapper: bool


def read_supported_config(path: Path) -> SupportedConfig:
    """Read ``config.json`` of a directory; the weights may still be missing.

    Raises:
        SourceError: if it is missing or damaged, or the weights are quantised in a format that cannot be read.
        ArchitectureError: if the architecture is not supported.
    """
    whole = _read_config(path)
    stored_as = find_format(path, whole)
    config = language_model_config(whole)
    with _complete_config(path):
        family = find_family(config)
        config = family.completed(config)
        family.check(config)
    return SupportedConfig(config, family, stored_as, is_wrapper(whole))


@contextmanager
def _complete_config(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise SourceError(f"{path / 'config.json'} has no {error}; expected the configuration of a model") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SourceError(
            f"{path / 'config.json'} has a value that does not fit this architecture ({error}); download it again"
        ) from None


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_dir():
        found = "is a file, but not a GGUF file" if path.exists() else "does not exist"
        raise SourceError(
            f"{path} {found}; expected a model directory with config.json and {WEIGHTS_FILE}, a GGUF file, "
            "or a model on the Hugging Face hub as owner/name"
        )
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path / "adapter_config.json").is_file():
            raise SourceError(f"{path} is an adapter; give its base model, and the adapter with --adapter") from None
        raise SourceError(f"{path} has no config.json; expected a model directory in Hugging Face's layout") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    return config

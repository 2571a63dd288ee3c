"""A model that is already a GGUF file, in one part or several.

For a supported architecture, transformers' configuration is made from the file's metadata, and everything that can be
measured in a model directory can be measured in the file. llama.cpp runs any other architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

from lieq_gguf.architectures import Decoder, StoredParameters, family_named
from lieq_gguf.architectures.mtp import MTP_TYPE
from lieq_gguf.errors import ArchitectureError, FormatError, OutputError, SourceError, TokenizerError
from lieq_gguf.formats.gguf_file import COMPUTED_TENSORS, GgufFile, is_never_quantised
from lieq_gguf.native import ggml
from lieq_gguf.native.llama_cpp import load_vocabulary
from lieq_gguf.quant_types import F32, QuantType
from lieq_gguf.records.options import SourceOptions
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.directory_metadata import INITIALIZER_RANGE
from lieq_gguf.sources.file_order import CHUNK_WEIGHTS, ByteArray, FloatArray, in_model_form
from lieq_gguf.sources.gguf_parts import model_name, open_parts, require_language_model
from lieq_gguf.sources.source import SourceMetadata
from lieq_gguf.tokenizers import ChatTemplate, SourceTokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_SAMPLE_BYTES = 1024
_BUILDER_KEYS = ("split.", "quantize.imatrix.", "lieq.")
_MODEL_KEYS = ("lieq.adapter", INITIALIZER_RANGE)  # under a prefix of _BUILDER_KEYS, but about the model
_FILE_KEYS = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_OF_ANY_ARCHITECTURE = ("xielu.",)  # keys of hyper-parameters without the architecture before them
_IN_TEXT = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)


@dataclass(frozen=True)
class _Place:
    """The place of a tensor: file, first byte, type, and shape ``[n_rows, row_bytes]``."""

    path: Path
    offset: int
    quant_type: QuantType
    shape: tuple[int, int]


class GgufSource:
    """A model in a GGUF file: its spec from the header alone, its tensors on demand.

    Attributes:
        path: The file; the first of several.
        spec: Tensors and structure of the model.
        why_not_supported: Why transformers cannot run the model; empty if it can.
        has_error_feedback: Whether it says that it was written with error feedback.
        is_tuned: Whether it says that scales and norms were tuned.

    Raises:
        FormatError: if the file is damaged.
        SourceError: if it is not a language model, a part is missing, or it is quantised and that is not allowed.
    """

    def __init__(self, path: Path, options: SourceOptions = SourceOptions()) -> None:
        """Open a file; weights that are already quantised are accepted only with ``allow_requantize``."""
        self.path = path
        files = open_parts(path)
        first = files[0]
        require_language_model(files)
        self.metadata = SourceMetadata({key: first.value_bytes(key) for key in first.keys if _tells_of_model(key)})
        self.has_error_feedback = first.value("lieq.refine") == "feedback"
        self.is_tuned = first.value("lieq.tune", "none") != "none"
        self._places = {
            t.spec.name: _Place(file.path, t.offset, t.quant_type, (t.data.shape[0], t.data.shape[1]))
            for file in files
            for t in file.tensors
        }
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}
        tensors = [t.spec for file in files for t in file.tensors]
        self._quantised = self._quantised_types(tensors)
        if self._quantised and not options.allow_requantize:
            raise SourceError(
                f"{path} is already quantised ({', '.join(self._quantised)}), and new errors would add to its errors; "
                "expected F16, BF16 or F32: convert the original, or pass --allow-requantize"
            )
        self._tokens = first.value("tokenizer.ggml.tokens", [])
        self._token_types = first.value("tokenizer.ggml.token_type", [])
        self._chat_template = first.value("tokenizer.chat_template")
        self._special_ids = {role: first.value(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
        self._family, config, self.why_not_supported = self._transformers_model(first, tensors)
        config |= self._initializer_range(first, options.initializer_range)
        if self._family is None:
            specs = [_as_llama_quantize(t, self._places[t.name].quant_type) for t in tensors]
        else:
            by_name = {t.name: t for t in _family_tensors(self._family, config, {t.name: t.shape for t in tensors})}
            left_out = self._family.never_read(config)
            specs = [by_name.get(t.name, t) for t in tensors if t.name not in left_out]
        self.spec = ModelSpec(
            name=model_name(path),
            architecture=first.architecture,
            config=config,
            n_layers=1 + max(t.layer for t in tensors if t.layer is not None),
            tensors=tuple(_layers_in_order(specs)),
            has_tied_embeddings="output.weight" not in self._places,
        )

    @property
    def has_transformers_model(self) -> bool:
        """Whether the architecture is supported and transformers supports everything in the metadata."""
        return self._family is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The cost of quantising a second time, and what cannot be measured in a model that llama.cpp runs."""
        result = []
        if self._quantised:
            result.append(
                f"{self.path} is already quantised to {self._layer_bpw():.2f} bits per weight "
                f"({', '.join(self._quantised)}): new errors add to the errors it has, and a divergence "
                "predicted here is from this file, not from the original model"
            )
        if self._family is None:
            result.append(
                f"{self.path} is run by llama.cpp, not layer by layer: {self.why_not_supported}; types are chosen only "
                "by the weighted error of the weights, without error feedback"
            )
        return tuple(result)

    @property
    def notes(self) -> tuple[str, ...]:
        """No notes."""
        return ()

    @property
    def notes_on_scores(self) -> tuple[str, ...]:
        """How they can differ from the scores of the directory that the file was made from."""
        if self._family is None or "initializer_range" in self.spec.config:
            return ()
        return (
            f"{self.path} does not store initializer_range, so the untrained twin (for the scores lieq, lieq-qkv and "
            "energy-gain) uses transformers' default; if config.json of the model has another number, pass it with "
            "--initializer-range",
        )

    def _initializer_range(self, first: GgufFile, given: float | None) -> dict[str, float]:
        """``initializer_range`` from the file or from the user; empty if neither has it."""
        stored = first.value(INITIALIZER_RANGE)
        if stored is not None and not isinstance(stored, float):
            raise FormatError(f"{self.path} has {INITIALIZER_RANGE} {stored!r}; expected a number")
        if self._family is None:
            if given is not None:
                raise SourceError(
                    f"{self.path} is run by llama.cpp, without an untrained twin ({self.why_not_supported}); "
                    "leave out --initializer-range"
                )
            return {}
        if given is not None and stored is not None and given != stored:
            raise SourceError(f"{self.path} has initializer_range {stored:g}; leave out --initializer-range {given:g}")
        value = given if given is not None else stored
        return {} if value is None else {"initializer_range": value}

    def _layer_bpw(self) -> float:
        """Stored bits per weight of the layers' matrices in this file."""
        matrices = [t for layer in self.spec.layer_matrices for t in layer]
        n_bytes = sum(self._places[t.name].quant_type.tensor_bytes(t.shape) for t in matrices)
        return 8 * n_bytes / sum(t.n_weights for t in matrices)

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor as transformers has it; a plain type stays as stored, unless a norm's offset is subtracted."""
        import torch

        place = self._places[tensor.name]
        data = self._mapped(place)
        if place.quant_type.name == "BF16":
            loaded = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
        elif place.quant_type.name == "F16":
            loaded = torch.from_numpy(data.view(np.float16))
        else:
            loaded = torch.from_numpy(ggml.dequantize(data, place.quant_type))
        return in_model_form(tensor, loaded)

    def read_head(self) -> torch.Tensor:
        """The output matrix, or the embedding if there is none."""
        names = ("output.weight", "token_embd.weight")
        return next(self.read(t) for name in names for t in self.spec.tensors if t.name == name)

    def read_rows(self, tensor: TensorSpec, rows: slice | Sequence[int]) -> torch.Tensor:
        """Some rows, in file order, decoded to float32."""
        import torch

        place = self._places[tensor.name]
        return torch.from_numpy(ggml.dequantize(self._mapped(place)[rows], place.quant_type))

    def stored_type(self, tensor: TensorSpec) -> QuantType:
        """The type of a tensor in the file."""
        return self._places[tensor.name].quant_type

    def rows(self, tensor: TensorSpec) -> Iterator[FloatArray]:
        """The weights, decoded; they are already in file order."""
        place = self._places[tensor.name]
        data = self._mapped(place)
        step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
        for matrix in np.split(data, tensor.shape[0] if tensor.of_experts else 1):
            for start in range(0, len(matrix), step):
                yield ggml.dequantize(matrix[start : start + step], place.quant_type)

    def encoded_rows(self, tensor: TensorSpec, quant_type: QuantType) -> Iterator[ByteArray] | None:
        """The stored bytes of a quantised tensor that keeps its type: encoding it again would add errors."""
        place = self._places[tensor.name]
        if place.quant_type is not quant_type or not quant_type.is_quantized:
            return None
        step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
        return (self._mapped(place)[start : start + step] for start in range(0, tensor.n_rows, step))

    def release(self) -> None:
        """Unmap the file; tensors that were read stay valid, the next ``read`` maps again."""
        self._maps.clear()

    def transformers_config(self) -> PretrainedConfig:
        """The configuration of transformers' model, for float32.

        Raises:
            SourceError: if transformers does not support the architecture or a value of the metadata.
        """
        if self._family is None:
            raise SourceError(f"{self.path} cannot be run by transformers: {self.why_not_supported}")
        import torch
        from transformers import AutoConfig

        settings = {key: value for key, value in self.spec.config.items() if key != "model_type"}
        settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # defaults are another model's
        try:
            config: PretrainedConfig = AutoConfig.for_model(self.spec.config["model_type"], **settings)
        except Exception as error:  # it raises many kinds of errors for wrong values
            raise SourceError(
                f"transformers cannot make a model from the metadata of {self.path}: {' '.join(str(error).split())}"
            ) from None
        config.dtype = torch.float32
        return config

    def load_tokenizer(self) -> SourceTokenizer:
        """The file's tokenizer, run by llama.cpp."""
        tokens = [str(token) for token in self._tokens]
        if not tokens:
            raise TokenizerError(f"{self.path} has no tokens; expected a model with a vocabulary")
        in_text = {tokens[i]: i for i, kind in enumerate(self._token_types[: len(tokens)]) if kind in _IN_TEXT}
        loaded = load_vocabulary(self.path)
        special = {f"{role}_token": tokens[i] for role, i in self._special_ids.items() if i is not None}
        template = None if self._chat_template is None else ChatTemplate(self._chat_template, special)
        return SourceTokenizer(len(tokens), in_text, loaded.tokenize, lambda token_id: tokens[token_id], template)

    def transformers_ids(self, text: str, add_special_tokens: bool) -> None:
        """None: transformers does not read the tokenizer of the file."""

    def read_metadata(self, pre_tokenizer: str | None = None) -> SourceMetadata:
        """The file's metadata about the model; what it says of the file itself (types, parts) is left out.

        Raises:
            TokenizerError: if a pre-tokenizer is given, since the file names its own.
        """
        if pre_tokenizer is not None:
            raise TokenizerError(
                f"you asked for pre-tokenizer '{pre_tokenizer}', but {self.path} names its own, which is kept; "
                "leave out --pre-tokenizer"
            )
        return self.metadata

    @cached_property
    def fingerprint(self) -> str:
        """A digest of hyper-parameters, names, shapes, types and some bytes of every tensor."""
        digest = hashlib.sha256()
        for key, content in self.metadata.values.items():
            if _is_hyper_parameter(key, self.spec.architecture):
                digest.update(key.encode() + content)
        digest.update(str(self.spec.config.get("initializer_range")).encode())
        for name, place in sorted(self._places.items()):
            digest.update(f"{name} {place.shape} {place.quant_type.name}".encode())
            data = self._mapped(place).reshape(-1)
            for start in (0, len(data) // 2, max(0, len(data) - _SAMPLE_BYTES)):
                digest.update(data[start : start + _SAMPLE_BYTES].tobytes())
        self.release()
        return digest.hexdigest()[:32]

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """A digest of the tokenizer's values."""
        digest = hashlib.sha256()
        for key, content in self.metadata.values.items():
            if key.startswith("tokenizer."):
                digest.update(key.encode() + content)
        return digest.hexdigest()[:32]

    def check_output(self, output: Path) -> None:
        """Require that the output does not overwrite a part of the model.

        Raises:
            OutputError: if it would.
        """
        for path in {place.path for place in self._places.values()}:
            if output.exists() and output.samefile(path):
                raise OutputError(f"{output} is the model to read; expected another file to write, with -o")

    def _mapped(self, place: _Place) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor ``[n_rows, row_bytes]``."""
        if place.path not in self._maps:
            # copy on write, since torch requires a writable array; nobody writes to it
            self._maps[place.path] = np.memmap(place.path, mode="c").view(np.ndarray)
        n_rows, row_bytes = place.shape
        return self._maps[place.path][place.offset : place.offset + n_rows * row_bytes].reshape(n_rows, row_bytes)

    def _quantised_types(self, tensors: Sequence[TensorSpec]) -> tuple[str, ...]:
        """Types of the quantised matrices, without a kept head for multi-token prediction, whose bytes are copied."""
        matrices = [t for t in tensors if len(t.shape) > 1]
        heads = {t.name for t in matrices if t.layer is None and t.name.startswith("blk.")}
        kept = {name for name in heads if self._places[name].quant_type.name == MTP_TYPE}
        types = dict.fromkeys(self._places[t.name].quant_type for t in matrices if t.name not in kept)
        return tuple(quant_type.name for quant_type in types if quant_type.is_quantized)

    def _transformers_model(
        self, first: GgufFile, tensors: Sequence[TensorSpec]
    ) -> tuple[Decoder | None, dict[str, Any], str]:
        """Family and configuration, or neither and the reason."""
        name = first.architecture
        values = {k.removeprefix(f"{name}."): first.value(k) for k in first.keys if _is_hyper_parameter(k, name)}
        family = family_named(name, values.keys())
        if family is None:
            return None, {}, f"the architecture {name} has no forward pass here"
        shapes = {t.name: t.shape for t in tensors}
        stored = StoredParameters(values, shapes, self._vector)
        try:
            config = family.source_config(stored)
            n_layers = 1 + max(t.layer for t in tensors if t.layer is not None)
            if config["num_hidden_layers"] != n_layers:  # check first: a wrong count could list millions of tensors
                raise ArchitectureError(f"block_count is {config['num_hidden_layers']}, but found {n_layers} layers")
            expected = {t.name: t.shape for t in _family_tensors(family, config, shapes)}
        except ArchitectureError as error:
            return None, {}, f"{name} model of an unusual kind ({error})"
        if stored.unread:
            return None, {}, f"{name} model of an unusual kind ({stored.unread[0]} is set)"
        left_out = COMPUTED_TENSORS | family.never_read(config)
        found = {name: shape for name, shape in shapes.items() if name not in left_out}
        if expected != found:
            odd = sorted(expected.items() ^ found.items())[0]
            return None, {}, f"{name} model of an unusual kind (tensor {odd[0]} of shape {odd[1]})"
        return family, config, ""

    def _vector(self, name: str) -> npt.NDArray[np.float32]:
        place = self._places[name]
        return ggml.dequantize(self._mapped(place), place.quant_type).reshape(-1)


def _family_tensors(
    family: Decoder, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[TensorSpec, ...]:
    """The tensors of a family for a configuration, with the biases that the file has."""
    biases = frozenset(
        f"model.layers.{layer}.{module.name}.bias"
        for layer in range(config["num_hidden_layers"])
        for module in family.modules
        if module.suffixes[0] == ".weight" and f"blk.{layer}.{module.role}.bias" in shapes
    )
    return tuple(t for t in family.tensors(config, biases) if t.name not in COMPUTED_TENSORS)


def _as_llama_quantize(tensor: TensorSpec, stored: QuantType) -> TensorSpec:
    """A tensor of an unsupported architecture: quantised if llama-quantize would, otherwise kept in its type."""
    is_outer = tensor.layer is None and tensor.name not in ("token_embd.weight", "output.weight")
    is_kept = len(tensor.shape) < 2 or is_outer or is_never_quantised(tensor.name)
    return replace(tensor, is_fixed=is_kept and len(tensor.shape) > 1, fixed_type=stored.name if is_kept else F32.name)


def _layers_in_order(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """File order, but with layers in ascending order and nothing between them.

    llama.cpp's converter can write them in the order of their names.
    """
    first = next(i for i, t in enumerate(tensors) if t.layer is not None)
    outside = [t for t in tensors[first:] if t.layer is None]
    inside = sorted((t for t in tensors if t.layer is not None), key=lambda t: t.layer or 0)
    return [*tensors[:first], *inside, *outside]


def _is_hyper_parameter(key: str, architecture: str) -> bool:
    return key.startswith((f"{architecture}.", *_OF_ANY_ARCHITECTURE))


def _tells_of_model(key: str) -> bool:
    if key in _MODEL_KEYS:
        return True
    return key not in _FILE_KEYS and not key.startswith(_BUILDER_KEYS)

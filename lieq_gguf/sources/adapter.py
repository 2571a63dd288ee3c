"""A LoRA adapter as PEFT saves it, merged into each tensor when it is read; there is no merged copy of the model."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lieq_gguf.errors import SourceError
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.sources.tensor_names import SEVERAL_MATRICES, own_name
from lieq_gguf.sources.weight_files import FOR_IMAGES_AND_SOUND

if TYPE_CHECKING:
    import torch

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
_MERGE_ELSEWHERE = "merge it with PEFT's merge_and_unload, save model and tokenizer, and convert that"

# Options that make an adapter more than W + scale * B A, and their effect.
_REFUSED_OPTIONS = {
    "fan_in_fan_out": "is for transposed weights",
    "layer_replication": "repeats layers",
    "lora_bias": "adds a bias to B",
    "megatron_config": "is for Megatron's layers",
    "target_parameters": "adapts parameters that are not modules",
    "trainable_token_indices": "trains single tokens of the embedding",
    "use_bdlora": "makes A or B block-diagonal",
    "kasa_config": "changes the base's weights",
    "monteclora_config": "samples its weights",
}
# PEFT itself does not merge these.
_UNMERGEABLE_OPTIONS = {
    "alora_invocation_tokens": "acts only after its invocation tokens",
    "arrow_config": "chooses between adapters at every token",
    "use_qalora": "works on pooled inputs",
}
# Initialisations that subtract the initial adapter from the base, so the trained one does not fit the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_UPDATE = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_REPLACEMENT = re.compile(
    r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.(?P<adapter>[^.]+))?)?\.(?P<kind>weight|bias)"
)

_WRAPPED = re.compile(r"^(model\.)?language_model\.(model\.)?")

# Safetensors' name of a type to the integer type of its bits, and the bits that are all set in NaN and infinity.
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class LowRankUpdate:
    """``scale * B A``, which is added to a matrix; A and B by their names in the adapter's file.

    Attributes:
        a: ``[r, n_in]``; for an embedding ``[r, n_vocab]``.
        b: ``[n_out, r]``; for an embedding ``[d_model, r]``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
        is_embedding: Whether the product is transposed, as for an embedding.
        magnitude: DoRA's norms, ``[n_out]``, or ``[d_model]`` for an embedding; None without DoRA.
    """

    a: str
    b: str
    scale: float
    is_embedding: bool = False
    magnitude: str | None = None


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter that fits a model.

    Attributes:
        name: Name of its directory.
        file: File with its tensors.
        digest: Digest of configuration and tensors.
        updates: Source tensor name to the update added to it.
        replacements: Source tensor name to the name, in ``file``, of a tensor that replaces it (PEFT's
            ``modules_to_save``, and trained biases).
        notes: What the user may want to know about it.
    """

    name: str
    file: Path
    digest: str
    updates: Mapping[str, LowRankUpdate]
    replacements: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def merged(self, source_name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the model with the adapter merged in.

        PEFT's ``merge_and_unload`` rounds the sum to the type of the base; this does not.

        Args:
            source_name: Name of the tensor in the model.
            weight: The model's tensor.

        Returns:
            ``W + scale * B A`` in float32, with DoRA ``m * (W + scale * B A) / |W + scale * B A|``, with one norm for
            the weights of each output; or the tensor's replacement, in the adapter's type; or ``weight`` itself if the
            adapter does not change it.

        Raises:
            SourceError: if DoRA would divide by the norm of weights that are all zero.
        """
        replacement, update = self.replacements.get(source_name), self.updates.get(source_name)
        if replacement is None and update is None:
            return weight
        with safe_open(self.file, framework="pt") as tensors:
            if replacement is not None:
                weight = tensors.get_tensor(replacement)
            if update is None:
                return weight
            a, b = tensors.get_tensor(update.a).float(), tensors.get_tensor(update.b).float()
            merged: torch.Tensor = a.T @ b.T if update.is_embedding else b @ a
            merged *= update.scale
            merged += weight
            if update.magnitude is not None:
                norms = merged.norm(dim=0 if update.is_embedding else 1, keepdim=True)
                if not bool(norms.all()):
                    raise SourceError(
                        f"{source_name} has an output whose weights are all zero, which DoRA cannot scale; "
                        f"{self.file} does not fit the model"
                    )
                merged *= tensors.get_tensor(update.magnitude).float().view_as(norms) / norms
        return merged


def load_adapter(path: Path, base: Path, spec: ModelSpec) -> LoraAdapter:
    """Read an adapter's configuration and headers, and check that it can be merged into a model.

    Args:
        path: Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: Directory of the model.
        spec: The model.

    Raises:
        SourceError: if something is missing or damaged, does not fit the model, or cannot be merged exactly.
    """
    config = _read_config(path)
    _check_config(path / _CONFIG, config)
    file = path / _WEIGHTS
    shapes = _read_shapes(path)
    shape_of = {name: t.source_shape for t in spec.tensors for name in t.source_names}
    matrices, replacements = _assign(file, shapes, shape_of, spec)
    updates = {name: _make_update(file, config, name, keys, shapes) for name, keys in matrices.items()}
    for name, update in updates.items():
        _check_shapes(file, shapes, update, shape_of[name])
    for name, key in replacements.items():
        if shapes[key] != shape_of[name]:
            resized = name.startswith(("model.embed_tokens", "lm_head")) and shapes[key][1:] == shape_of[name][1:]
            advice = f"its vocabulary was resized: {_MERGE_ELSEWHERE}" if resized else "was it made for another model?"
            raise SourceError(f"{key} in {file} has shape {shapes[key]}, but {name} has {shape_of[name]}; {advice}")
    named = [key for u in updates.values() for key in (u.a, u.b, u.magnitude) if key is not None]
    _check_finite(file, [*named, *replacements.values()])
    return LoraAdapter(path.resolve().name, file, _digest(path), updates, replacements, _notes(path, base, config))


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise SourceError(f"{path} {found}; expected a directory with {_CONFIG} and {_WEIGHTS}")
    file = path / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} has no {_CONFIG}; expected a LoRA adapter as PEFT saves it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    return config


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse adapters that are not ``W + scale * B A`` or DoRA's formula."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{file} has peft_type {kind!r}; expected 'LORA': {_MERGE_ELSEWHERE}")
    for key, effect in _UNMERGEABLE_OPTIONS.items():
        if config.get(key):
            raise SourceError(f"{file} sets {key}: such an adapter {effect} and cannot be merged into weights")
    for key, effect in _REFUSED_OPTIONS.items():
        if config.get(key):
            raise SourceError(f"{file} sets {key}, which {effect} and is not supported; {_MERGE_ELSEWHERE}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise SourceError(
            f"{file} has init_lora_weights '{start}', which changes the base's weights, so the adapter does not fit "
            f"the original weights; convert it to plain LoRA as PEFT describes, or {_MERGE_ELSEWHERE}"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise SourceError(f"{key} in {file} is {config[key]!r}; expected an object")


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the adapter, from the header."""
    file = path / _WEIGHTS
    if not file.is_file():
        pickle = next((name for name in _PICKLES if (path / name).exists()), None)
        held = "no weights" if pickle is None else f"only pickled weights ({pickle}), which can run code when loaded"
        raise SourceError(f"{path} holds {held}; expected {_WEIGHTS}: save the adapter with PEFT's save_pretrained")
    shapes = {}
    try:
        # numpy as framework reads headers without loading torch.
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a dict
                header = opened.get_slice(key)
                if header.get_dtype() not in _EXPONENTS:
                    raise SourceError(f"{key} in {file} is {header.get_dtype()}; expected {', '.join(_EXPONENTS)}")
                shapes[key] = tuple(header.get_shape())
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{file} is damaged or incomplete ({file.stat().st_size:,} bytes: {error}); expected a safetensors file: "
            "download it again"
        ) from None
    return shapes


def _assign(
    file: Path, keys: Iterable[str], names: Collection[str], spec: ModelSpec
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Assign the adapter's tensors to tensors of the model.

    Returns:
        Source tensor name to ``lora_A``, ``lora_B``, … to the adapter's tensor; and source tensor name to the
        adapter's tensor that replaces it.
    """
    matrices: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    adapters = set()
    for key in sorted(keys, key=len):  # of several copies of a replacement, PEFT loads the one with the plain name
        name = key.removeprefix("base_model.model.")
        if ".original_module." in name:  # the base's own weights, which are replaced
            continue
        update, replacement = _UPDATE.fullmatch(name), _REPLACEMENT.fullmatch(name)
        match = update or replacement
        if match is None:
            raise SourceError(f"{file} has a tensor {key}, which is not part of a LoRA adapter; {_MERGE_ELSEWHERE}")
        target = _usual_name(f"{match['module']}.{'weight' if replacement is None or update else replacement['kind']}")
        if spec.has_tied_embeddings and target in ("model.embed_tokens.weight", "lm_head.weight"):
            raise SourceError(
                f"{file} changes {match['module']}, but embedding and output of {spec.name} are one matrix, and the "
                f"adapter unties them; {_MERGE_ELSEWHERE}"
            )
        if target not in names:
            if SEVERAL_MATRICES.search(target) or FOR_IMAGES_AND_SOUND.search(target):
                of_what = "several matrices at once" if SEVERAL_MATRICES.search(target) else "images or sound"
                raise SourceError(f"{file} has {key}, which is for {of_what}; {_MERGE_ELSEWHERE}")
            raise SourceError(
                f"{file} has {key}, but {spec.name} with {spec.n_layers} layers has no {target}; was the adapter made "
                "for another model?"
            )
        if update:
            adapters.add(update["adapter"])
            matrices.setdefault(target, {})[update["part"]] = key
        else:
            replacements.setdefault(target, key)
    if len(adapters) > 1:
        listed = ", ".join(sorted(str(name) for name in adapters))
        raise SourceError(f"{file} holds several adapters ({listed}); expected one: save them separately")
    if not matrices and not replacements:
        raise SourceError(f"{file} holds no tensors; expected those of a LoRA adapter: save it again")
    return matrices, replacements


def _usual_name(target: str) -> str:
    """The name of a tensor of a model by itself, for that of a language model inside another one."""
    inner = _WRAPPED.sub("", target)
    if inner != target:
        target = inner if inner.startswith("lm_head.") else f"model.{inner}"
    return own_name(re.sub(r"^backbone\.", "model.", target))


def _make_update(
    file: Path, config: Mapping[str, Any], name: str, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> LowRankUpdate:
    """The update of a source tensor, from the adapter's tensors ``found`` for it."""
    is_embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    expected = ["lora_embedding_A", "lora_embedding_B"] if is_embedding else ["lora_A", "lora_B"]
    if config.get("use_dora"):
        expected.append("lora_magnitude_vector")
    if set(found) != set(expected):
        raise SourceError(
            f"{file} has {', '.join(sorted(found))} for {name}; by {_CONFIG} expected {', '.join(expected)}: "
            "save the adapter again"
        )
    rank, scale = _rank_and_scale(file.parent / _CONFIG, config, name.removesuffix(".weight"))
    a, b = found[expected[0]], found[expected[1]]
    if shapes[a][:1] != (rank,):
        raise SourceError(f"{a} in {file} has shape {shapes[a]}; {_CONFIG} gives it a rank of {rank}")
    return LowRankUpdate(a, b, scale, is_embedding, found.get("lora_magnitude_vector"))


def _rank_and_scale(file: Path, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of a module: the general values, or those of the first pattern that matches its name's end."""

    def value(key: str, patterns: str) -> Any:
        for pattern, special in (config.get(patterns) or {}).items():
            try:
                is_match = re.match(rf"(?:.*\.)?(?:{pattern})$", module)
            except re.error as error:
                raise SourceError(
                    f"{patterns} in {file} has '{pattern}', which is not a regular expression ({error})"
                ) from None
            if is_match:
                return special
        return config.get(key)

    rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SourceError(f"r in {file} is {rank!r} for {module}; expected a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise SourceError(f"lora_alpha in {file} is {alpha!r} for {module}; expected a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(
    file: Path, shapes: Mapping[str, tuple[int, ...]], update: LowRankUpdate, shape: tuple[int, ...]
) -> None:
    """Refuse A and B whose product does not have the shape of the base's tensor."""
    if len(shape) != 2:
        raise SourceError(f"{file} has {update.a}, but the model has a vector there; expected a matrix")
    rank = shapes[update.a][0]
    n_out, n_in = reversed(shape) if update.is_embedding else shape
    expected: dict[str, tuple[int, ...]] = {update.a: (rank, n_in), update.b: (n_out, rank)}
    if update.magnitude is not None:
        expected[update.magnitude] = (n_out,)
    for key, expected_shape in expected.items():
        if shapes[key] != expected_shape:
            raise SourceError(
                f"{key} in {file} has shape {shapes[key]}, but the model needs {expected_shape}; was the adapter made "
                "for another model?"
            )


def _check_finite(file: Path, keys: Sequence[str]) -> None:
    """Refuse NaN and infinite values. Reads their bits, since torch takes seconds to load and numpy has no BF16."""
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_bytes))
    content = np.memmap(file, np.uint8, "r", 8 + header_bytes)
    for key in keys:
        start, stop = header[key]["data_offsets"]
        bits_type, exponent = _EXPONENTS[header[key]["dtype"]]
        bits = content[start:stop].view(bits_type)
        for first in range(0, len(bits), _CHUNK):
            if ((bits[first : first + _CHUNK] & exponent) == exponent).any():
                raise SourceError(f"{key} in {file} holds NaN or infinite values; the adapter is damaged")


def _digest(path: Path) -> str:
    digest = hashlib.sha256((path / _CONFIG).read_bytes())
    with (path / _WEIGHTS).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:32]


def _notes(path: Path, base: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    made_for = str(config.get("base_model_name_or_path") or "")
    # in the hub's cache, the model's name is in a parent folder of the snapshot
    if made_for.replace("\\", "/").rstrip("/").rpartition("/")[2].lower() not in str(base.resolve()).lower():
        notes.append(f"the adapter names {made_for} as its base model, but it is merged into {base}")
    differing = [
        name
        for name in _TOKENIZER_FILES
        if (path / name).is_file()
        and not ((base / name).is_file() and (base / name).read_bytes() == (path / name).read_bytes())
    ]
    if differing:
        notes.append(
            f"{path} has its own {', '.join(differing)}, but tokenizer and chat template are taken from {base}; "
            "copy these files there if the adapter was trained with them"
        )
    return tuple(notes)

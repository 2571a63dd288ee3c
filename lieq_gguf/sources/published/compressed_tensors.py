"""The format of the library compressed-tensors, in which llm-compressor writes FP8, INT8 and packed INT4.

``config_groups`` of ``quantization_config`` say which modules are stored how. Source: ``NaiveQuantizationCompressor``
and ``PackedQuantizationCompressor`` of that library, by which transformers decodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lieq_gguf.errors import SourceError
from lieq_gguf.sources.published.stored import (
    Parts,
    column_groups,
    count,
    one_of,
    require_part,
    require_scale,
    scaled,
    unpacked,
)

if TYPE_CHECKING:
    import torch

_PACKED = "pack-quantized"
_STORAGES = ("float-quantized", "int-quantized", "naive-quantized", _PACKED)
_STRATEGIES = ("tensor", "channel", "group", "block")
_WITH_PACKED_ZEROS = ("channel", "group")
_WORD_BITS = 32
_PACKED_BITS = (2, 4, 8)  # for others, versions of the library pack differently
_ZEROS = ("I8", "F8_E4M3", "BF16", "F16", "F32")


@dataclass(frozen=True)
class Scheme:
    """How the modules of a group are stored.

    Attributes:
        targets: Names of modules, patterns that begin with ``re:``, or names of classes.
        is_packed: Whether several codes are in a 32-bit word.
        is_float: Whether a code is an FP8 number and not an integer.
        n_bits: Bits of a code.
        strategy: What shares a scale: a ``tensor``, ``channel``, ``group`` of inputs or ``block``.
        block: Rows and columns of a block; rows are 1 for groups. Not for the other strategies.
        is_symmetric: Whether codes have no zero of their own.
    """

    targets: tuple[str, ...]
    is_packed: bool
    is_float: bool
    n_bits: int
    strategy: str
    block: tuple[int, int] | None
    is_symmetric: bool

    @property
    def packs_zeros(self) -> bool:
        """Whether zeros are packed, along the outputs."""
        return self.is_packed and not self.is_symmetric and self.strategy in _WITH_PACKED_ZEROS

    def block_in(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale, in a matrix ``(n_out, n_in)``."""
        return self.block or (shape if self.strategy == "tensor" else (1, shape[1]))


@dataclass(frozen=True)
class CompressedTensors:
    """Codes in ``weight`` or ``weight_packed``, with ``weight_scale`` and perhaps ``weight_zero_point``.

    Attributes:
        schemes: How modules are stored.
        dtype: torch's name of the type of the model.
    """

    schemes: tuple[Scheme, ...]
    dtype: str
    name: ClassVar[str] = "compressed-tensors"
    marks: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_packed")
    parts: ClassVar[tuple[str, ...]] = (
        "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    )  # fmt: skip

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], dtype: str) -> CompressedTensors:
        """Read ``quantization_config``.

        Raises:
            SourceError: if a value cannot be; the message begins with the key.
        """
        one_of(settings, "quantization_status", ("compressed",), None)
        if _object(settings, "transform_config").get("config_groups"):
            raise SourceError("a transform_config, which rotates weights; expected none")
        sparsity = _object(settings, "sparsity_config").get("format", "dense")
        if sparsity != "dense":
            raise SourceError(f"sparse weights ({sparsity}); expected dense ones")
        groups = _object(settings, "config_groups")
        schemes = [_scheme(settings, name, group) for name, group in groups.items()]
        found = tuple(scheme for scheme in schemes if scheme is not None)
        if not found:
            raise SourceError("no config_groups with weights; expected one at least")
        return cls(found, dtype)

    def check(self, module: str, parts: Parts, shape: tuple[int, int]) -> None:
        """Require codes and scales, and zeros if codes have zeros."""
        scheme = self._scheme_of(module)
        n_out, n_in = shape
        rows, columns = scheme.block_in(shape)
        grid = -(-n_out // rows), -(-n_in // columns)
        per_word = _WORD_BITS // scheme.n_bits
        if scheme.is_packed:
            if n_in % per_word:
                raise SourceError(f"{module} packs {n_in} weights in a row; expected a multiple of {per_word}")
            require_part(module, parts, "weight_packed", ("I32",), (n_out, n_in // per_word))
        else:
            require_part(module, parts, "weight", ("F8_E4M3" if scheme.is_float else "I8",), shape)
        grids = (grid, (), (1,)) if grid == (1, 1) else (grid,)
        require_scale(module, parts, "weight_scale", *grids)
        if scheme.packs_zeros:
            require_part(module, parts, "weight_zero_point", ("I32",), (-(-n_out // per_word), grid[1]))
        elif not scheme.is_symmetric or "weight_zero_point" in parts:
            require_part(module, parts, "weight_zero_point", _ZEROS, *grids)
        if "weight_g_idx" in parts:
            require_part(module, parts, "weight_g_idx", ("I32", "I64"), (n_in,))

    def decode(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Multiplied in the type of the scales, then in the type of the model."""
        import torch

        scheme = self._scheme_of(module)
        scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
        codes = _signed(parts["weight_packed"], scheme.n_bits) if scheme.is_packed else parts["weight"]
        block = scheme.block_in((codes.shape[0], codes.shape[1]))
        if zeros is not None and scheme.packs_zeros:
            zeros = _signed(zeros.T, scheme.n_bits)[:, : codes.shape[0]].T
        grid = scales if scales.ndim == 2 else scales.reshape(1, 1)
        zeros = zeros if zeros is None else zeros.reshape(grid.shape)
        groups = column_groups(module, _activation_order(parts), grid.shape[1], block[1])
        dtype: torch.dtype = getattr(torch, self.dtype)
        return scaled(codes, grid, block, zeros, groups).to(dtype)

    def _scheme_of(self, module: str) -> Scheme:
        """That of the first target that fits: by name, then by pattern, then by class."""
        targets = [(target, scheme) for scheme in self.schemes for target in scheme.targets]
        patterns = sorted((t for t in targets if t[0].startswith("re:")), key=lambda t: t[0])
        for target, scheme in targets:
            if target == module:
                return scheme
        for target, scheme in patterns:
            if re.match(target.removeprefix("re:"), module):
                return scheme
        by_class = [scheme for target, scheme in targets if target == "Linear"] or list(self.schemes)
        if len(set(by_class)) > 1:
            raise SourceError(f"{module} is quantised, but no target of config_groups in config.json names it")
        return by_class[0]


def _activation_order(parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The group of every column; the library writes -1 where they are in order."""
    groups = parts.get("weight_g_idx")
    return None if groups is None or bool((groups == -1).any()) else groups


def _signed(words: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Codes that are packed with half their range added."""
    import torch

    return (unpacked(words, n_bits) - (1 << (n_bits - 1))).view(torch.int8)  # bytes wrap


def _scheme(settings: Mapping[str, Any], name: str, group: Any) -> Scheme | None:
    """How a group is stored; None if its weights are not quantised."""
    if not isinstance(group, dict):
        raise SourceError(f"config_groups {name} {group!r:.60}; expected an object")
    weights = _object(group, "weights")
    if not weights:
        return None
    formats = {"format": group.get("format") or settings.get("format")}
    storage = one_of(formats, "format", _STORAGES, None)
    kind = one_of(weights, "type", ("int", "float"), "int")
    is_packed = storage == _PACKED
    if is_packed and kind == "float":
        raise SourceError(f"{_PACKED} weights of type float; expected type int")
    n_bits: int = one_of(weights, "num_bits", _PACKED_BITS if is_packed else (8,), 8)
    strategy, block = _strategy(weights)
    is_symmetric: bool = one_of(weights, "symmetric", (True, False), True)
    return Scheme(_targets(group), is_packed, kind == "float", n_bits, strategy, block, is_symmetric)


def _strategy(weights: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """What shares a scale, and rows and columns of a group or block."""
    size = weights.get("group_size")
    usual = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy: str = one_of(weights, "strategy", _STRATEGIES, usual)
    if strategy == "group":
        return strategy, (1, count(weights, "group_size", size))
    if strategy == "block":
        block: Sequence[Any] = weights.get("block_structure") or ()
        if not isinstance(block, list) or len(block) != 2:
            raise SourceError(f"block_structure {weights.get('block_structure')!r}; expected two numbers")
        return strategy, (count(weights, "block_structure", block[0]), count(weights, "block_structure", block[1]))
    return strategy, None


def _targets(group: Mapping[str, Any]) -> tuple[str, ...]:
    targets = group.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SourceError(f"targets {targets!r:.60}; expected a list of names")
    try:
        _ = [re.compile(target.removeprefix("re:")) for target in targets if target.startswith("re:")]
    except re.error as error:
        raise SourceError(f"targets with {error.pattern!r}, which is not a regular expression ({error})") from None
    return tuple(targets)


def _object(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise SourceError(f"{key} {value!r:.60}; expected an object")
    return value

"""GPTQ and AWQ: 4-bit codes (GPTQ also 2 and 8) in 32-bit words, a zero and a scale for some inputs of each output.

Sources: GPTQModel, which transformers uses for both (``dequantize_weight`` and ``convert_gptq_v1_to_v2_format`` for
GPTQ, ``dequantize_gemm`` for AWQ).
"""

from __future__ import annotations

from collections.abc import Mapping
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

_WORD_BITS = 32
_AWQ_BITS = 4
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in its word of each of eight codes


@dataclass(frozen=True)
class Gptq:
    """``qweight`` packs inputs, ``qzeros`` outputs; with ``g_idx``, groups are of inputs that lie apart.

    Attributes:
        n_bits: Bits of a code: 2, 4 or 8.
        group_size: Inputs that share a scale; None for all.
        stores_zero_less_one: Whether stored zeros are one less than those in use, as all but ``gptq_v2`` are.
    """

    n_bits: int
    group_size: int | None
    stores_zero_less_one: bool
    name: ClassVar[str] = "gptq"
    marks: ClassVar[tuple[str, ...]] = ("qweight", "qzeros")
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], dtype: str) -> Gptq:  # noqa: ARG003
        """Read ``quantization_config``.

        Raises:
            SourceError: if a value cannot be; the message begins with the key.
        """
        n_bits: int = one_of(settings, "bits", (2, 4, 8), None)
        key = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
        version = one_of(settings, key, ("gptq", "gptq_v2"), "gptq")
        return cls(n_bits, _group_size(settings), version == "gptq")

    def check(self, module: str, parts: Parts, shape: tuple[int, int]) -> None:
        """Require codes, zeros and scales, and the group of each input if there is one."""
        n_out, n_in = shape
        n_groups = -(-n_in // (self.group_size or n_in))
        per_word = _WORD_BITS // self.n_bits
        _require_whole_words(module, n_in, per_word)
        require_part(module, parts, "qweight", ("I32",), (n_in // per_word, n_out))
        require_part(module, parts, "qzeros", ("I32",), (n_groups, -(-n_out // per_word)))
        require_scale(module, parts, "scales", (n_groups, n_out))
        if "g_idx" in parts:
            require_part(module, parts, "g_idx", ("I32", "I64"), (n_in,))

    def decode(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """In the type of the scales."""
        codes = unpacked(parts["qweight"].T, self.n_bits)
        zeros, scales = parts["qzeros"], parts["scales"]
        if self.stores_zero_less_one:  # as whole words, so that a carry goes where the writer has borrowed
            zeros = zeros + sum(1 << bit for bit in range(0, _WORD_BITS, self.n_bits))
        zeros = unpacked(zeros, self.n_bits)[:, : codes.shape[0]]
        group_size = self.group_size or codes.shape[1]
        groups = column_groups(module, parts.get("g_idx"), len(scales), group_size)
        return scaled(codes, scales.T, (1, group_size), zeros.T, groups)


@dataclass(frozen=True)
class Awq:
    """``qweight`` and ``qzeros`` pack outputs, in an order of their own.

    Attributes:
        group_size: Inputs that share a scale; None for all.
    """

    group_size: int | None
    name: ClassVar[str] = "awq"
    marks: ClassVar[tuple[str, ...]] = ("qweight", "qzeros")
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], dtype: str) -> Awq:  # noqa: ARG003
        """Read ``quantization_config``.

        Raises:
            SourceError: if a value cannot be; the message begins with the key.
        """
        one_of(settings, "bits", (_AWQ_BITS,), _AWQ_BITS)
        key = "version" if settings.get("version") is not None else "format"
        version = settings.get(key)
        one_of({key: version.lower() if isinstance(version, str) else version}, key, ("gemm",), "gemm")
        if settings.get("backend") == "llm-awq":
            raise SourceError("backend llm-awq; expected weights in AutoAWQ's gemm layout")
        return cls(_group_size(settings))

    def check(self, module: str, parts: Parts, shape: tuple[int, int]) -> None:
        """Require codes, zeros and scales."""
        n_out, n_in = shape
        n_groups = -(-n_in // (self.group_size or n_in))
        per_word = _WORD_BITS // _AWQ_BITS
        _require_whole_words(module, n_out, per_word)
        require_part(module, parts, "qweight", ("I32",), (n_in, n_out // per_word))
        require_part(module, parts, "qzeros", ("I32",), (n_groups, n_out // per_word))
        require_scale(module, parts, "scales", (n_groups, n_out))

    def decode(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        """In the type of the scales."""
        codes, zeros = (_in_awq_order(unpacked(parts[end], _AWQ_BITS)) for end in ("qweight", "qzeros"))
        return scaled(codes.T, parts["scales"].T, (1, self.group_size or len(codes)), zeros.T)


def _in_awq_order(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(len(codes), -1, len(_AWQ_ORDER))[..., list(_AWQ_ORDER)].flatten(1)


def _group_size(settings: Mapping[str, Any]) -> int | None:
    size = settings.get("group_size", 128)
    return None if size == -1 else count(settings, "group_size", size)


def _require_whole_words(module: str, n: int, per_word: int) -> None:
    if n % per_word:
        raise SourceError(f"{module} has {n} weights in a row that is packed; expected a multiple of {per_word}")

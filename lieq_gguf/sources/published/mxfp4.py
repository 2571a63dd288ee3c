"""MXFP4 as gpt-oss is published in: E2M1 numbers, two in a byte, and a power of two for each 32 of a row.

Source: ``convert_moe_packed_tensors`` in transformers' ``integrations/mxfp4``, which decodes all experts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lieq_gguf.errors import SourceError
from lieq_gguf.sources.published.stored import Parts, require_part

if TYPE_CHECKING:
    import torch

_BLOCK = 32
_BLOCK_BYTES = _BLOCK // 2
_EXPONENT_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = (*_MAGNITUDES, *(-number for number in _MAGNITUDES))  # of a code, whose highest bit is the sign


@dataclass(frozen=True)
class Mxfp4:
    """``blocks``, the earlier number in the lower bits of a byte, times two to the power of ``scales`` less 127.

    Attributes:
        dtype: torch's name of the type of the model.
    """

    dtype: str
    name: ClassVar[str] = "mxfp4"
    marks: ClassVar[tuple[str, ...]] = ("blocks", "scales")
    parts: ClassVar[tuple[str, ...]] = marks

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], dtype: str) -> Mxfp4:  # noqa: ARG003
        """Read ``quantization_config``, which has no numbers for the format."""
        return cls(dtype)

    def check(self, module: str, parts: Parts, shape: tuple[int, int]) -> None:
        """Require blocks and scales of whole rows."""
        for end, other in zip(self.marks, reversed(self.marks), strict=True):
            if end not in parts:  # several matrices are in one tensor, whose name is not the module's
                beside = parts[other]
                raise SourceError(
                    f"{beside.file} has {beside.name}, but no {end} for all its matrices; download the model again"
                )
        n_out, n_in = shape
        if n_in % _BLOCK:
            raise SourceError(f"{parts['blocks'].name} is for rows of {n_in} weights; expected a multiple of {_BLOCK}")
        require_part(module, parts, "blocks", ("U8",), (n_out, n_in // _BLOCK, _BLOCK_BYTES))
        require_part(module, parts, "scales", ("U8",), (n_out, n_in // _BLOCK))

    def decode(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        """Multiplied in float32, then rounded to the type of the model, which changes only numbers near its limits."""
        import torch

        blocks, exponents = parts["blocks"], parts["scales"].int() - _EXPONENT_BIAS
        codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
        numbers = torch.tensor(_NUMBERS)[codes.int()]
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.ldexp(numbers, exponents[..., None]).to(dtype).flatten(1)

"""How far a file and its model may differ: what rounding explains in a layer and in the logits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lieq_gguf.quant_types import QuantType

PLAIN_BOUNDS = {"F32": 0.01, "F16": 0.01, "BF16": 0.05}  # of layers and of logits
QUANTIZED_LAYER_BOUND = 0.25
"""Largest error of a layer's output, over the length of its update ``h_out - h_in``, at four of five tokens. llama.cpp
rounds the input of every product: to F16 by 2⁻¹¹/√3 (kernels of ARM also add in F16, thrice as much), to BF16 by eight
times that, and to 8 bits by 0.6 to 1.4 %, more beside massive activations; queries and keys carry that into an
exponent. Measured: 0.001 with F16; of two to eight bits 0.08 in SmolLM2 and 0.03 in the tiny models of the tests.
Beyond the bound, the rounding is emulated in the layer, and what it changes there is allowed three times."""

QUANTIZED_HEAD_BOUND = 0.15
"""Error of the logits, root mean square in standard deviations. Measured: 0.0004 with F16, 0.024 with Q6_K."""

_EMULATED_FACTOR = 3.0
_ROUNDED_TOGETHER = 256  # numbers with one scale, for the K types; others have smaller blocks and less error
_SHARE = 0.8
_LEAST_UPDATE = 0.01  # of the hidden state: a layer that does nothing yet has no update

_TINY = float(np.finfo(np.float32).tiny)


class DifferenceError(Exception):
    """What differs, in words."""


@dataclass(frozen=True)
class Equality:
    """How equal the file and its model are; a difference beyond rounding raises instead.

    Attributes:
        reference: What the file was compared with: transformers' model, or the source itself in llama.cpp.
        layer_errors: For each layer that was compared, the change of its update at four of five tokens.
        head_error: The change of the logits, root mean square in their standard deviations.
        tokens_left_out: Ids that transformers adds before a text and llama.cpp, which adds one at most, does not.
    """

    reference: str
    layer_errors: tuple[float, ...]
    head_error: float
    tokens_left_out: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document for ``--json``."""
        return {
            "layer_errors": list(self.layer_errors),
            "head_error": self.head_error,
            "tokens_left_out": list(self.tokens_left_out),
        }


def layer_bound(types: Collection[QuantType]) -> float:
    """What rounding the inputs of matrices of these types usually changes in a layer's update."""
    return max((PLAIN_BOUNDS.get(t.name, QUANTIZED_LAYER_BOUND) for t in types), default=PLAIN_BOUNDS["F32"])


def head_bound(quant_type: QuantType) -> float:
    """What rounding usually changes in logits from the same last layer, with an output matrix of this type."""
    return PLAIN_BOUNDS.get(quant_type.name, QUANTIZED_HEAD_BOUND)


def check_layer(index: int, error: float, bound: float, reference: str, emulated: Callable[[], float]) -> None:
    """Raise a DifferenceError if a layer is farther off than rounding explains.

    Args:
        index: The layer.
        error: Its error.
        bound: What rounding usually explains.
        reference: What it was compared with.
        emulated: Gives what rounding changes here, for where that is more; called only beyond the bound.
    """
    bound = _widened(error, bound, emulated)
    if not error <= bound:  # NaN is not
        place = "embedding or layer 0" if index == 0 else f"layer {index}"
        raise DifferenceError(
            f"llama.cpp computes {place} otherwise than {reference}, {error:.0%} off where rounding explains "
            f"{bound:.0%}"
        )


def check_head(error: float, bound: float, reference: str, emulated: Callable[[], float] = lambda: 0.0) -> None:
    """The same of logits from the same last layer."""
    bound = _widened(error, bound, emulated)
    if not error <= bound:
        raise DifferenceError(
            f"llama.cpp computes the logits otherwise than {reference} from the same last layer, {error:.2g} standard "
            f"deviations off where rounding explains {bound:g}"
        )


def _widened(error: float, bound: float, emulated: Callable[[], float]) -> float:
    return bound if error <= bound else max(bound, _EMULATED_FACTOR * emulated())


def change(before: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> float:
    """Error of a layer's output ``[n_tokens, d_model]`` over its update, the largest of the better four fifths."""
    size, update, error = (np.linalg.norm(x.numpy(), axis=1) for x in (before, expected - before, found - expected))
    return float(np.quantile(error / np.maximum(update, _LEAST_UPDATE * size + _TINY), _SHARE))


def logits_change(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """Error of logits ``[n_tokens, n_vocab]``, root mean square in their standard deviations."""
    return float(np.sqrt(np.square(found - expected, dtype=np.float64).mean()) / expected.std())


def rounded(x: torch.Tensor, types: Collection[QuantType]) -> torch.Tensor:
    """Inputs ``[…, n_in]`` as llama.cpp's product with matrices of these types rounds them."""
    if not any(t.is_quantized for t in types):
        return x.half().float() if all(t.name == "F16" for t in types) else x.bfloat16().float()
    blocks = x.reshape(-1, _ROUNDED_TOGETHER if x.shape[-1] % _ROUNDED_TOGETHER == 0 else x.shape[-1])
    step = blocks.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / 127
    return (blocks / step).round().mul(step).reshape(x.shape)

"""The numbers of a model that are no weights: what two configurations must have in common to be the same function."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PretrainedConfig

from lieq_gguf.measure.base_model import given_to_layers, initialised, layer_kinds

_POSITIONS = (0, 1, 2, 5, 20, 100, 500, 2000, 10_000, 50_000)  # whose rotations are compared
_ANGLE = 0.02
# numbers for training or generation, that no forward pass reads, tokens computed together, and sizes, which the shapes
# of the tensors tell
_NOT_COMPARED = re.compile(
    r"training|.*dropout.*|padding_idx|_.*|chunk_size|max_seq_len_cached|original_max_seq_len|layer_idx|(in|out)_features"
    r"|sliding_window_pattern"
)


def numbers_differ(found: PretrainedConfig, expected: PretrainedConfig, *, with_windows: bool) -> str:
    """The first number of transformers' modules in which two configurations differ, in words; empty if there is none.

    Compared are the numbers that modules keep (epsilons, scales, caps, numbers of heads), rotations at near and far
    positions, the kinds of layers, and the factors before the first layer and after the last.

    Args:
        found: Made from the metadata of a file.
        expected: That of the model.
        with_windows: Whether to compare windows; some of llama.cpp's graphs have none.
    """
    kinds = layer_kinds(found), layer_kinds(expected)
    if with_windows and kinds[0] != kinds[1]:
        layer = next(i for i, pair in enumerate(zip(*kinds, strict=True)) if pair[0] != pair[1])
        return f"layer {layer} is of kind {kinds[0][layer]}, not of kind {kinds[1][layer]}"
    context = min(found.max_position_embeddings, expected.max_position_embeddings)
    positions = [position for position in _POSITIONS if position < context]
    # the widths of networks are told by the shapes of the tensors
    models = [initialised(config, n_vocab=1, seed=0, narrow=True) for config in (found, expected)]
    ours, theirs = _numbers(models[0], found), _numbers(models[1], expected)
    for name in sorted(ours.keys() | theirs.keys()):
        is_compared = with_windows or not name.endswith("sliding_window")
        if is_compared and not _is_same(ours.get(name), theirs.get(name)):
            return f"{name} is {_shown(ours.get(name))}, not {_shown(theirs.get(name))}"
    rotations = (_rotations(model, expected.hidden_size, positions) for model in models)
    for position, a, b in zip(positions, *rotations, strict=True):
        # a frequency in float32 is off by 1e-7 of itself, and the angle of position 50,000 by as many times more
        if len(a) != len(b) or not np.allclose(a, b, rtol=0, atol=_ANGLE):
            return f"position {position} is rotated otherwise (rotary base or scaling)"
    return ""


def _numbers(model: nn.Module, config: PretrainedConfig) -> dict[str, Any]:
    """Module and attribute to number."""
    found: dict[str, Any] = {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if (value is None or isinstance(value, (int, float))) and not _NOT_COMPARED.fullmatch(key)
    }
    found |= {key: getattr(config, key, None) for key in ("logits_scaling", "final_logit_softcapping")}
    model.get_input_embeddings().weight.data.fill_(1)  # type: ignore[operator]
    with torch.inference_mode():
        [(scaled, _), *_] = given_to_layers(model, input_ids=torch.zeros(1, 1, dtype=torch.long))
        found["factor of the embedding"] = float(scaled[0, 0, 0])
    return found


def _rotations(model: nn.Module, width: int, positions: Sequence[int]) -> npt.NDArray[np.float32]:
    """Cosines and sines that the layers of each kind get ``[n_positions, …]``."""
    hidden = torch.zeros(1, len(positions), width)
    with torch.inference_mode():
        given = given_to_layers(model, inputs_embeds=hidden, position_ids=torch.tensor([positions]))
    tables = [table[0].numpy() for _, around in given for table in around.get("position_embeddings") or ()]
    return np.concatenate(tables, axis=1) if tables else np.zeros((len(positions), 0), dtype=np.float32)


def _is_same(found: Any, expected: Any) -> bool:
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-5)
    return found is None and expected is None


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

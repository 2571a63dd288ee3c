"""The numbers of a model that are no weights: what two configurations must have in common to be the same function."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from lieq_gguf.measure.base_model import given_to_layers, initialised, layer_kinds

_POSITIONS = (0, 1, 2, 5, 20, 100, 500, 2000, 10_000, 50_000)  # whose rotations are compared
_ANGLE = 0.02  # a frequency in float32 is off by 1e-7 of itself, the angle of position 50,000 by that many times more
_SMALL = 32  # neurons of the feed-forward network, whose width the shapes of the tensors tell
_IN_TRAINING = re.compile(r"training|.*dropout.*|padding_idx|_.*|max_seq_len_cached|original_max_seq_len|layer_idx")


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
    ours, theirs = _numbers(found, positions), _numbers(expected, positions)
    for name in sorted(ours.keys() | theirs.keys()):
        is_compared = with_windows or not name.endswith("sliding_window")
        if is_compared and not _is_same(ours.get(name), theirs.get(name)):
            return f"{name} is {_shown(ours.get(name))}, not {_shown(theirs.get(name))}"
    return ""


def _numbers(config: PretrainedConfig, positions: Sequence[int]) -> dict[str, Any]:
    """Module and attribute to number; and what each kind of layer gets besides hidden states."""
    sizes = {key: _SMALL for key in ("intermediate_size", "moe_intermediate_size") if hasattr(config, key)}
    model = initialised(type(config).from_dict(config.to_dict() | sizes), n_vocab=1, seed=0)
    found: dict[str, Any] = {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if (value is None or isinstance(value, (int, float))) and not _IN_TRAINING.fullmatch(key)
    }
    found |= {key: getattr(config, key, None) for key in ("logits_scaling", "final_logit_softcapping")}
    model.get_input_embeddings().weight.data.fill_(1)  # type: ignore[operator]
    with torch.inference_mode():
        [(scaled, _), *_] = given_to_layers(model, input_ids=torch.zeros(1, 1, dtype=torch.long))
        found["factor of the embedding"] = float(scaled[0, 0, 0])
        hidden = torch.zeros(1, len(positions), config.hidden_size)
        given = given_to_layers(model, inputs_embeds=hidden, position_ids=torch.tensor([positions]))
    for kind, (_, around) in enumerate(given):
        for name, tensor in zip(("cosines", "sines"), around.get("position_embeddings") or (), strict=False):
            found[f"the {name} of rotation {kind}"] = tensor.numpy()
    return found


def _is_same(found: Any, expected: Any) -> bool:
    if isinstance(found, np.ndarray) and isinstance(expected, np.ndarray):
        return found.shape == expected.shape and bool(np.allclose(found, expected, rtol=0, atol=_ANGLE))
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-5)
    return found is None and expected is None


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.ravel()[-1]:g} at the last of them"
    return f"{value:g}" if isinstance(value, float) else str(value)

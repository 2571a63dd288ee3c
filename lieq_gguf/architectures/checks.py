"""What more than one family requires of a ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lieq_gguf.errors import ArchitectureError

Config = Mapping[str, Any]
"""``config.json``."""


def check_yarn(rope: Config, takes_all_dims: bool = False) -> None:
    """Refuse a scaling of attention other than yarn's own, by which llama.cpp always scales.

    Where it ``takes_all_dims``, it divides its own by that of ``mscale_all_dim``.

    Source: ``_compute_yarn_parameters`` in transformers' ``modeling_rope_utils``.
    """
    if not rope.get("truncate", True):  # null turns it off as well
        raise ArchitectureError("yarn rope scaling with truncate off is not supported; expected it to be on")
    keys = ("attention_factor", "mscale", "mscale_all_dim")
    for key in keys:
        if rope.get(key) is not None:
            require_number(key, rope[key])
    given, scale, scale_all = (rope.get(key) for key in keys)
    own = _yarn_scale(rope["factor"], 1.0)
    if takes_all_dims and scale_all:
        own /= _yarn_scale(rope["factor"], scale_all)
    if given is None:
        given = own
        if scale and scale_all:
            given = _yarn_scale(rope["factor"], scale) / _yarn_scale(rope["factor"], scale_all)
    if not math.isclose(given, own, rel_tol=1e-4):
        raise ArchitectureError(
            f"yarn rope scaling that multiplies attention by {given:g} is not supported; expected yarn's own {own:g}"
        )


def yarn_range(rope: Config, head_dim: int, n_ctx: int) -> tuple[float, float]:
    """Between which frequencies of a head yarn goes from the rotation as it was to the slower one, not rounded.

    Source: as for :func:`check_yarn`. ``n_ctx`` is the context before the scaling, if ``rope`` does not say.
    """
    n_ctx = rope.get("original_max_position_embeddings") or n_ctx
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    low, high = (head_dim * math.log(n_ctx / (n * 2 * math.pi)) / (2 * math.log(rope["rope_theta"])) for n in turns)
    return max(low, 0.0), min(high, head_dim - 1.0)


def _yarn_scale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def config_object(config: Config, key: str) -> Config:
    """A value that must be an object; empty if there is none."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ArchitectureError(f"{key} in config.json is {value!r}; expected an object")
    return value


def windowed_layers(n_layers: int, period: int) -> tuple[str, ...]:
    """Attention types of the layers, as transformers names them, where every ``period``-th layer sees all tokens."""
    return tuple("sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layers))


def require_layer_types(config: Config, expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Refuse an order of attention types other than the one built into llama.cpp's graph."""
    if found != expected:
        layer = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found))
        raise ArchitectureError(
            f"layer {layer} of {config['num_hidden_layers']} in config.json has "
            f"{found[layer] if layer < len(found) else 'no attention type'}, but llama.cpp's graph has "
            f"{expected[layer] if layer < len(expected) else 'no such layer'} there; only that order is supported"
        )


def require_kinds(config: Config, kinds: Collection[str]) -> None:
    """Refuse a list of layers that is not of the model's length, or has other than the given kinds."""
    found, n_layers = config["layer_types"], config["num_hidden_layers"]
    other = next((kind for kind in found if kind not in kinds), None)
    if other is not None:
        raise ArchitectureError(f"layer_types in config.json has '{other}'; expected {' or '.join(kinds)}")
    if len(found) != n_layers:
        raise ArchitectureError(f"layer_types in config.json has {len(found)} layers, num_hidden_layers is {n_layers}")


def require_experts(
    config: Config, key: str, n_chosen_from: int | None = None, used: str = "num_experts_per_tok"
) -> None:
    """Require numbers of experts, of which a token uses no more than there are, or than it may choose from."""
    n_used = config[used]
    require_count(key, config[key])
    require_count(used, n_used)
    n_experts = config[key] if n_chosen_from is None else n_chosen_from
    if n_used > n_experts:
        raise ArchitectureError(f"{used} is {n_used}, more than the {n_experts} experts")


def require_usual_heads(config: Config, head_dim: int, gguf_name: str) -> None:
    """Refuse heads whose widths do not add up to the model's, where the graph or the format knows of no others."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    if head_dim != usual:
        raise ArchitectureError(
            f"head_dim is {head_dim}, but llama.cpp runs {gguf_name} only with hidden_size / num_attention_heads = "
            f"{usual}"
        )


def require_count(key: str, value: object, least: int = 1) -> None:
    """Require an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ArchitectureError(f"{key} in config.json is {value!r}; expected {expected}")


def require_number(key: str, value: object) -> None:
    """Require a number."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise ArchitectureError(f"{key} in config.json is {value!r}; expected a number")

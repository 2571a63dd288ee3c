"""From what stands on the command line to values; what is none of them is wrong usage."""

from __future__ import annotations

import math
import re

import typer

from lieq_gguf.allocation.problem import Pin
from lieq_gguf.cli.grouping import Given
from lieq_gguf.errors import LieqError
from lieq_gguf.quant_types import DEFAULT_LADDER, QuantType, parse_types
from lieq_gguf.records.options import usable_cores
from lieq_gguf.scorers import scorers


def positive(value: float | None) -> float | None:
    """Require a number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


def scorer_name(value: str | None) -> str | None:
    """Require the name of a layer score."""
    if value is not None and value not in scorers():
        raise typer.BadParameter(f"'{value}' is not a layer score; the scores are {', '.join(scorers())}")
    return value


def n_threads_or_all(value: int) -> int:
    """0 stands for all cores that this process may use."""
    return value or usable_cores()


def revision_of(model: str, revision: str | None) -> str | None:
    """The revision of a model on the hub; anything else has none."""
    if revision is not None:
        from lieq_gguf.sources.hub import is_hub_name  # numpy and safetensors come with it

        if not is_hub_name(model):
            raise typer.BadParameter(f"'{model}' is not a model on the hub; leave this out", param_hint="--revision")
    return revision


def refuse_given(given: Given, names: tuple[str, ...], why: str) -> None:
    """Refuse options that would be ignored."""
    for name in names:
        if name in given:
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")


def thread_counts(text: str | None) -> tuple[int, ...]:
    """Numbers of threads from a text separated by commas; without a text, all cores."""
    if text is None:
        return (n_threads_or_all(0),)
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise typer.BadParameter(
            f"'{text}' is not a list of thread counts; expected for example 1,2,4", param_hint="-t"
        )
    return tuple(dict.fromkeys(counts))


def types_named(option: str, names: str | None) -> tuple[QuantType, ...]:
    """Types from a text separated by commas; after a plus they are added to the default types."""
    if names is None:
        return DEFAULT_LADDER
    usual = DEFAULT_LADDER if names.startswith("+") else ()
    try:
        return tuple(dict.fromkeys([*usual, *parse_types(names.removeprefix("+").split(","))]))
    except LieqError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def one_type(option: str, name: str | None) -> QuantType | None:
    """A single type by name."""
    if name is None:
        return None
    types = types_named(option, name)
    if len(types) > 1:
        raise typer.BadParameter(f"'{name}' names {len(types)} types; expected one", param_hint=option)
    return types[0]


def pin_of(text: str) -> Pin:
    """A type fixed by hand, ``REGEX=TYPE``."""
    pattern, _, name = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(f"'{pattern}' is not a regular expression ({error})", param_hint="--pin") from None
    quant_type = one_type("--pin", name) if pattern else None
    if quant_type is None:
        raise typer.BadParameter(f"'{text}' is not a pin; expected for example 'ffn_down=Q4_K'", param_hint="--pin")
    return Pin(pattern, quant_type)

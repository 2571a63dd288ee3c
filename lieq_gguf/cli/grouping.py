"""Options declared once, in groups: a command takes dataclasses, and typer sees one parameter for every field.

The fields of a group have the annotations of typer parameters. So a command's arguments are typed, and several commands
can share a group without repeating its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar, get_type_hints

import typer

_Result = TypeVar("_Result")
_CONTEXT = "context"


class Given(frozenset[str]):
    """Names of the parameters on the command line, for commands with a parameter of this type."""


def grouped(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """A function of flat typer parameters, from a command whose parameters may be groups or ``Given``."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
    given = [name for name, kind in hints.items() if kind is Given]

    @wraps(command)
    def flat(**values: Any) -> _Result:
        context: typer.Context = values.pop(_CONTEXT)
        arguments: dict[str, Any] = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        arguments |= dict.fromkeys(given, _given(context))
        return command(**arguments, **values)

    parameters = [inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += inspect.signature(groups[name], eval_str=True).parameters.values()
        elif name not in given:
            parameters.append(parameter.replace(annotation=hints[name]))
    signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    del flat.__wrapped__  # otherwise typer would see the groups
    return flat


def _given(context: typer.Context) -> Given:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return Given(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")

"""Options of the command line: groups as typer sees them, and old spellings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from lieq_gguf.cli.grouping import Given, grouped
from lieq_gguf.cli.old_spellings import with_new_spellings


@dataclass(frozen=True)
class Words:
    first: Annotated[str, typer.Argument()]
    second: Annotated[int, typer.Option("--second")] = 2


def app_of(seen: list[object]) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    @grouped
    def say(words: Words, third: Annotated[bool, typer.Option("--third")] = False, *, given: Given) -> None:
        """Say it."""
        seen.extend([words, third, given])

    return app


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a"], [Words("a", 2), False, {"first"}]),
        (["a", "--second", "3", "--third"], [Words("a", 3), True, {"first", "second", "third"}]),
        (["--second", "2", "b"], [Words("b", 2), False, {"first", "second"}]),  # given, though it is the default
    ],
)
def test_a_group_is_a_record_of_its_options(arguments: list[str], expected: list[object]) -> None:
    seen: list[object] = []
    app_of(seen)(args=arguments, standalone_mode=False)
    assert seen == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["convert", "m", "--scores", "s.json"], ["convert", "m", "--scores-file", "s.json"]),
        (["plan", "--scores=s.json"], ["plan", "--scores-file=s.json"]),
        (["score", "m", "--scorer", "lim"], ["score", "m", "--layer-score", "lim"]),
        (["convert", "--refine", "none", "-q"], ["convert", "--no-error-feedback", "-q"]),
        (["convert", "--refine=feedback"], ["convert", "--error-feedback"]),
        (["convert", "--refine", "magic"], ["convert", "--refine=magic"]),
        (["convert", "--refine"], ["convert", "--refine"]),
        (["run", "f", "--", "--scores"], ["run", "f", "--", "--scores"]),
        (["convert", "--scores-file", "s", "--bits", "3"], ["convert", "--scores-file", "s", "--bits", "3"]),
    ],
)
def test_old_spellings_are_taken(old: list[str], new: list[str]) -> None:
    assert with_new_spellings(old) == new

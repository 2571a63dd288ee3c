"""Old names of options, accepted for one release but not shown in the help."""

from __future__ import annotations

from collections.abc import Sequence

_NEW_NAMES = {"--scores": "--scores-file", "--scorer": "--layer-score"}
_REFINE = "--refine"
_FEEDBACK = {"feedback": "--error-feedback", "none": "--no-error-feedback"}


def with_new_spellings(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, with new names for old options; arguments after ``--`` are not options."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    result: list[str] = []
    rest = list(arguments[:end])
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == _REFINE and (equals or rest):
            value = value if equals else rest.pop(0)
            result.append(_FEEDBACK.get(value, f"{_REFINE}={value}"))
        else:
            result.append(_NEW_NAMES.get(name, name) + equals + value)
    return result + list(arguments[end:])

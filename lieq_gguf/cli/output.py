"""Where commands print: stdout is the result, for people or as one JSON document."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_WITHOUT_TERMINAL = 160  # a pipe or file has no width; wide enough that tables are not folded


def stdout() -> Console:
    """The console of results."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)


def print_json(document: Any) -> None:
    """Print a result for scripts."""
    print(json.dumps(document, indent=1))

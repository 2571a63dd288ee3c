#!/usr/bin/env python3
"""Write docs/cli.md from the commands themselves, or with ``--check`` fail if it is out of date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
NOTE = "<!-- Made by tools/make_cli_docs.py; run `make docs` after changing a command. -->\n\n"


def render() -> str:
    """The page, by typer's own documentation command."""
    command = [sys.executable, "-m", "typer", "lieq_gguf.cli.commands", "utils", "docs", "--name", "lieq-gguf"]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return NOTE + result.stdout.strip() + "\n"


def main() -> None:
    """Write or compare."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE} is out of date; run `make docs` and commit it")


if __name__ == "__main__":
    main()

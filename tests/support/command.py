"""Running ``lieq-gguf``: what the ``run_cli`` fixture gives, and a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """
import sys
from lieq_gguf.cli.commands import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
print("loaded", *sorted({"torch", "transformers", "huggingface_hub"} & sys.modules.keys()), file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class CliResult:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


RunCli = Callable[..., CliResult]


def run_apart(arguments: Sequence[str], folder: Path | None = None) -> tuple[CliResult, list[str]]:
    """Run a command in a process of its own, in ``folder``; its result, and which of the slow packages it loaded."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], cwd=folder, capture_output=True, text=True)
    *said, loaded = done.stderr.splitlines()
    return CliResult(done.returncode, done.stdout, "\n".join(said)), loaded.split()[1:]


def assert_refused(done: CliResult, words: str, folder: Path | None = None) -> None:
    """Require a refusal: one line on stderr with these words, and nothing in the folder for outputs."""
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("\n")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert folder is None or list(folder.iterdir()) == []

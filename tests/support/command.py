"""What the ``run_cli`` fixture gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CliResult:
    """What a command left behind in this process."""

    exit_code: int
    stdout: str
    stderr: str


RunCli = Callable[..., CliResult]

"""Progress for people, on stderr, so that stdout stays the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Names the stages of a run, times them, and shows a bar for each unless it is silent.

    Attributes:
        seconds: Stage name to wall-clock seconds, in order of first appearance.
    """

    def __init__(self, silent: bool = True) -> None:
        self.silent = silent
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Run a stage; the function it yields takes the amount of work done since the last call.

        Args:
            name: Key in ``seconds``.
            label: Words beside the bar.
            total: Amount of work; without it the stage is timed but not shown.
        """
        start = time.perf_counter()
        try:
            if self.silent or total is None:
                yield lambda _amount: None
            else:
                yield from self._bar(label, total)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def note(self, text: str) -> None:
        """Print something the user may want to know, unless silent."""
        if not self.silent:
            print("note:", " ".join(text.split()), file=sys.stderr)

    @staticmethod
    def warn(text: str) -> None:
        """Print something the user should know, in one line, even if silent."""
        print("warning:", " ".join(text.split()), file=sys.stderr)

    @staticmethod
    def _bar(label: str, total: float) -> Iterator[Callable[[float], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(label, total=total)
            yield lambda amount: bars.advance(task, amount)

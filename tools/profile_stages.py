#!/usr/bin/env python3
"""Shows where the time of a conversion goes: runs one and prints a table of its steps.

Usage: profile_stages.py convert MODEL_DIR --bits 2.7 …      (any arguments of lieq-gguf)

Time spent in a step inside another counts for the inner one alone. Threads of the encoders run inside `encode`.
Prints Markdown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

IMPORTS_BEGAN = time.perf_counter()

from lieq_gguf import pipeline  # noqa: E402
from lieq_gguf.allocation import allocate  # noqa: E402
from lieq_gguf.cli.commands import main  # noqa: E402
from lieq_gguf.measure import forward_pass, layer_model, measuring, second_moments  # noqa: E402
from lieq_gguf.measure.observers.outer_damage import OuterDamage  # noqa: E402
from lieq_gguf.writing import error_feedback, feedback_pass, output_feedback  # noqa: E402

IMPORTS = time.perf_counter() - IMPORTS_BEGAN

STEPS: tuple[tuple[str, object, str], ...] = (
    ("read headers and options", pipeline, "resolve"),
    ("tokenise", measuring, "tokenize"),
    ("load layers", layer_model.LayerModel, "load"),
    ("run layers", layer_model.LayerModel, "_output"),
    ("measure, besides running layers", forward_pass, "run_pass"),
    ("allocate", allocate, "allocate"),
    ("moments of inputs", second_moments.SecondMoments, "see_input"),
    ("moments of what is lacking", second_moments.SecondMoments, "end_batch"),
    ("factor moments", error_feedback, "coupling"),
    ("make good what is lacking", feedback_pass, "correction"),
    ("move weights", feedback_pass, "moved"),
    ("encode with error feedback", error_feedback, "encode"),
    ("put decoded weights into layers", feedback_pass.FeedbackPass, "_assign"),
    ("output matrix, besides encoding", output_feedback.OutputFeedback, "encode"),
    ("write, and encode without feedback", pipeline, "write_file"),
    ("read back", pipeline, "verify"),
    ("compare with the source", pipeline, "compare"),
)


class Clock:
    """Seconds of each step, without those of steps inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def watch(self, name: str, owner: object, attribute: str) -> None:
        """Time the calls of a function from now on."""
        original: Callable[..., Any] = getattr(owner, attribute)

        @wraps(original)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return original(*arguments, **named)
            finally:
                took = time.perf_counter() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, attribute, timed)


def show(seconds: dict[str, float], total: float) -> None:
    """Print the table, the longest step first."""
    print("| step | s | share |\n|---|---|---|")
    for name, took in sorted(seconds.items(), key=lambda item: -item[1]):
        if took >= 0.05:
            print(f"| {name} | {took:.1f} | {took / total:.0%} |")
    print(f"| in all | {total:.1f} | 100% |")


if __name__ == "__main__":
    clock = Clock()
    for step in STEPS:
        clock.watch(*step)
    for observer in forward_pass.STATISTICS_BY:
        clock.watch(f"score: {observer.__name__}", observer, "finish")
    clock.watch("score: embedding and output", OuterDamage, "conclude")
    began = time.perf_counter()
    try:
        main()
    finally:
        total = time.perf_counter() - began + IMPORTS
        known = clock.seconds | {"import torch, transformers and ours": IMPORTS}
        show(known | {"everything else": total - sum(known.values())}, total)

"""Tokens per second in llama.cpp, measured as llama-bench does: random tokens, prompt and generation apart."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lieq_gguf.engine import LoadedModel, open_model
from lieq_gguf.gguf_file import GgufFile


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the repetitions.

    Attributes:
        mean: Mean.
        deviation: Standard deviation, 0 for one repetition.
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class Benchmark:
    """Speed of a file.

    Attributes:
        file: The file.
        file_bytes: Its size.
        n_threads: Threads used.
        n_prompt: Tokens of the prompt, run at once.
        n_generate: Tokens generated, run one by one.
        prompt: Speed of the prompt.
        generation: Speed of the generation.
    """

    file: Path
    file_bytes: int
    n_threads: int
    n_prompt: int
    n_generate: int
    prompt: Rate
    generation: Rate

    def to_json(self) -> dict[str, Any]:
        """An element of the list that ``bench --json`` prints."""
        return {
            "file": str(self.file),
            "file_bytes": self.file_bytes,
            "n_threads": self.n_threads,
            "n_prompt": self.n_prompt,
            "n_generate": self.n_generate,
            "prompt_tokens_per_sec": self.prompt.mean,
            "prompt_deviation": self.prompt.deviation,
            "generation_tokens_per_sec": self.generation.mean,
            "generation_deviation": self.generation.deviation,
        }


def bench(
    file: Path,
    n_prompt: int = 512,
    n_generate: int = 128,
    repetitions: int = 5,
    n_threads: int = 1,
    advance: Callable[[float], None] = lambda _amount: None,
) -> Benchmark:
    """Run a file in llama.cpp.

    Args:
        file: GGUF file.
        n_prompt: Tokens decoded at once from an empty context.
        n_generate: Tokens decoded one by one from an empty context.
        repetitions: Counted runs after one warm-up of each.
        n_threads: Threads of llama.cpp.
        advance: Called with 1 after each counted run.

    Raises:
        FormatError: if the file is no complete GGUF.
        VerificationError: if llama.cpp does not load or run it.
    """
    file_bytes = GgufFile(file).file_bytes
    with open_model(file, n_ctx=max(n_prompt, n_generate), n_threads=n_threads) as model:
        numbers = random.Random(0)
        prompt = [numbers.randrange(model.n_vocab) for _ in range(n_prompt)]
        generated = [numbers.randrange(model.n_vocab) for _ in range(n_generate)]
        prompt_rate = _rate(model, lambda: model.decode(prompt), n_prompt, repetitions, advance)
        generation_rate = _rate(model, lambda: _decode_singly(model, generated), n_generate, repetitions, advance)
    return Benchmark(file, file_bytes, n_threads, n_prompt, n_generate, prompt_rate, generation_rate)


def _decode_singly(model: LoadedModel, ids: list[int]) -> None:
    for token in ids:
        model.decode([token])


def _rate(
    model: LoadedModel, run: Callable[[], object], n_tokens: int, repetitions: int, advance: Callable[[float], None]
) -> Rate:
    rates = []
    for repetition in range(repetitions + 1):
        model.clear()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        if repetition > 0:  # the first run only warms caches
            rates.append(n_tokens / seconds)
            advance(1)
    return Rate(statistics.fmean(rates), statistics.stdev(rates) if len(rates) > 1 else 0.0)

"""Tokens per second in llama.cpp, measured as llama-bench does: random tokens, prompt and generation separately.

Generating a token reads every weight once, so speed is also given as bytes read per second. Its share of this machine's
memory bandwidth gives a rough estimate for other devices.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lieq_gguf.allocation.decode_costs import decode_costs
from lieq_gguf.evaluation.devices import DEVICES, USABLE_SHARE, Device
from lieq_gguf.evaluation.inspection import inspect
from lieq_gguf.native.llama_cpp import LoadedModel, open_model

_PROBE_BYTES = 1 << 28  # per thread, far beyond any cache
_PROBE_RUNS = 3


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
class Estimate:
    """The estimated speed of a file on another device; nothing was measured there.

    Attributes:
        device: The device.
        tokens_per_sec: Speed of generation, if it uses the same share of its bandwidth as this machine.
        fits: Whether weights, key-value cache and buffers fit its memory.
    """

    device: Device
    tokens_per_sec: float
    fits: bool


@dataclass(frozen=True)
class Benchmark:
    """Speed and memory of a file.

    Attributes:
        file: The file.
        file_bytes: Size of the file.
        n_threads: Threads of llama.cpp.
        n_prompt: Tokens of the prompt, run at once.
        n_generate: Tokens generated, run one by one.
        prompt: Speed of the prompt.
        generation: Speed of the generation.
        load_seconds: From opening the file to a ready context; the file may be in the system's cache.
        resident_bytes: Memory that loading and running the file added to this process.
        bytes_per_token: Bytes of weights read to generate a token.
        memory_bandwidth: Bytes per second that the same number of threads read from this machine's memory.
        needed_bytes: Weights, buffers and key-value cache at ``n_ctx`` tokens.
        n_ctx: Number of tokens for ``needed_bytes``.
        predicted: Tokens per second of generation, predicted from the decode costs.
        predicted_for: Machine and number of threads of the decode costs.
    """

    file: Path
    file_bytes: int
    n_threads: int
    n_prompt: int
    n_generate: int
    prompt: Rate
    generation: Rate
    load_seconds: float
    resident_bytes: int
    bytes_per_token: int
    memory_bandwidth: float
    needed_bytes: int
    n_ctx: int
    predicted: float
    predicted_for: str

    @property
    def bandwidth(self) -> float:
        """Bytes of weights read per second of generation."""
        return self.bytes_per_token * self.generation.mean

    def estimates(self) -> tuple[Estimate, ...]:
        """Estimates for other devices: their published bandwidth times the share of bandwidth reached here."""
        share = min(1.0, self.bandwidth / self.memory_bandwidth)  # above 1, the weights were in a cache
        return tuple(
            Estimate(
                device=device,
                tokens_per_sec=share * device.bandwidth / self.bytes_per_token,
                fits=self.needed_bytes <= USABLE_SHARE * device.memory_bytes,
            )
            for device in DEVICES
        )

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
            "predicted": {"generation_tokens_per_sec": self.predicted, "machine": self.predicted_for},
            "load_seconds": self.load_seconds,
            "resident_bytes": self.resident_bytes,
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_sec": self.bandwidth,
            "memory_bytes_per_sec": self.memory_bandwidth,
            "n_ctx": self.n_ctx,
            "needed_bytes": self.needed_bytes,
            "estimates": [
                {"device": e.device.name, "generation_tokens_per_sec": e.tokens_per_sec, "fits": e.fits}
                for e in self.estimates()
            ],
        }


def bench(
    file: Path,
    n_prompt: int = 512,
    n_generate: int = 128,
    repetitions: int = 5,
    thread_counts: Sequence[int] = (1,),
    advance: Callable[[float], None] = lambda _amount: None,
) -> list[Benchmark]:
    """Run a file in llama.cpp.

    Args:
        file: GGUF file.
        n_prompt: Tokens decoded at once from an empty context.
        n_generate: Tokens decoded one by one from an empty context.
        repetitions: Counted runs, after one warm-up each.
        thread_counts: Numbers of threads of llama.cpp; everything is measured with each.
        advance: Called with 1 after each counted run.

    Returns:
        One result per number of threads.

    Raises:
        FormatError: if the file is not a complete GGUF file.
        VerificationError: if llama.cpp does not load or run it.
    """
    facts, costs, process = inspect(file), decode_costs(), psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    n_ctx = max(n_prompt, n_generate)
    with open_model(file, n_ctx=n_ctx, n_threads=thread_counts[0]) as model:
        load_seconds = time.perf_counter() - start
        rates = [_rates(model, n, n_prompt, n_generate, repetitions, advance) for n in thread_counts]
        resident = process.memory_info().rss - before
    cache_here = facts.kv_cache_bytes * n_ctx // facts.n_ctx
    buffers = max(0, resident - facts.meter.file_bytes - cache_here)
    return [
        Benchmark(
            file=file,
            file_bytes=facts.meter.file_bytes,
            n_threads=n_threads,
            n_prompt=n_prompt,
            n_generate=n_generate,
            prompt=prompt_rate,
            generation=generation_rate,
            load_seconds=load_seconds,
            resident_bytes=resident,
            bytes_per_token=facts.bytes_per_token,
            memory_bandwidth=read_bandwidth(n_threads),
            needed_bytes=facts.meter.file_bytes + facts.kv_cache_bytes + buffers,
            n_ctx=facts.n_ctx,
            predicted=1 / costs.seconds(facts.tensors, facts.types),
            predicted_for=costs.machine,
        )
        for n_threads, (prompt_rate, generation_rate) in zip(thread_counts, rates, strict=True)
    ]


def _rates(
    model: LoadedModel,
    n_threads: int,
    n_prompt: int,
    n_generate: int,
    repetitions: int,
    advance: Callable[[float], None],
) -> tuple[Rate, Rate]:
    """Tokens per second of a prompt and of generation; the tokens are random, the same for every number of threads."""
    numbers = random.Random(0)
    prompt = [numbers.randrange(model.n_vocab) for _ in range(n_prompt)]
    generated = [numbers.randrange(model.n_vocab) for _ in range(n_generate)]
    model.use_threads(n_threads)
    return (
        _rate(model, lambda: model.decode(prompt), n_prompt, repetitions, advance),
        _rate(model, lambda: _decode_singly(model, generated), n_generate, repetitions, advance),
    )


@lru_cache
def read_bandwidth(n_threads: int) -> float:
    """Bytes per second that all threads together read from memory, the best of some runs; measured once."""
    arrays = [np.ones(_PROBE_BYTES // 8) for _ in range(n_threads)]
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_PROBE_RUNS):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, n_threads * _PROBE_BYTES / (time.perf_counter() - start))
    return best


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

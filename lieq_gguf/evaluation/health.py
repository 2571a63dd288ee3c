"""Does a file still generate text? Files near two bits may load and run, but repeat themselves or say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lieq_gguf.native.llama_cpp import LoadedModel, open_model

N_CTX = 128
"""Tokens of context the check needs."""

_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "To bake a simple loaf of bread, you need",
    "Dear Ms Novak,\n\nthank you for your letter of",
)
_N_GENERATE = 64
_TEMPERATURE = 0.7  # with always the likeliest token, even intact small models loop
_TOP_K = 40
_NGRAM = 4
_LOOPING = 0.5


@dataclass(frozen=True)
class Health:
    """How a file continued a handful of prompts.

    Attributes:
        n_prompts: Number of prompts.
        n_looping: Continuations in which more than half of the 4-token sequences had occurred before.
        n_empty: Continuations that are empty or blank.
        repetition: Share of repeated 4-token sequences, mean over the prompts (seq-rep-4, arXiv 1908.04319).
        samples: The continuations.
    """

    n_prompts: int
    n_looping: int
    n_empty: int
    repetition: float
    samples: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return vars(self) | {"samples": list(self.samples)}

    @property
    def verdict(self) -> str:
        """A few words for people."""
        if self.n_looping + self.n_empty == 0:
            return "speaks"
        defects = [f"{self.n_looping} loop"] * (self.n_looping > 0) + [f"{self.n_empty} empty"] * (self.n_empty > 0)
        return f"{', '.join(defects)} of {self.n_prompts}"


def check_file(file: Path, n_threads: int) -> Health:
    """Load a file and let it continue the prompts.

    Raises:
        VerificationError: if llama.cpp does not load or run it.
    """
    with open_model(file, n_ctx=N_CTX, n_threads=n_threads) as model:
        return check(model)


def check(model: LoadedModel) -> Health:
    """Let a model continue the prompts; the same model always gives the same result."""
    outputs = [
        model.generate(model.tokenize(prompt, add_special_tokens=True), _N_GENERATE, _Sampler()) for prompt in _PROMPTS
    ]
    samples = tuple(model.text(ids) for ids in outputs)
    shares = [repetition(ids) for ids in outputs]
    return Health(
        n_prompts=len(_PROMPTS),
        n_looping=sum(share > _LOOPING for share in shares),
        n_empty=sum(not sample.strip() for sample in samples),
        repetition=float(np.mean(shares)),
        samples=samples,
    )


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-token sequences that occurred before, in [0, 1]; 0 for fewer than five tokens (seq-rep-4)."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class _Sampler:
    """Picks among the likeliest tokens, reproducibly."""

    def __init__(self) -> None:
        self._draw = np.random.default_rng(0)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        k = min(_TOP_K, len(logits))
        top = np.argpartition(logits, -k)[-k:]
        top = top[np.argsort(-logits[top], kind="stable")]
        weights = np.exp((logits[top] - logits[top[0]]).astype(np.float64) / _TEMPERATURE)
        return int(self._draw.choice(top, p=weights / weights.sum()))

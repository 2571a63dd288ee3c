#!/usr/bin/env python3
"""Run EleutherAI's lm-evaluation-harness (pip install lm-eval) on a GGUF file, in this process, without a server.

Usage: run_lm_eval.py FILE.gguf TASK… [--n-ctx N] [--threads N] [--limit N] [--include-path FOLDER]

Without a hub, from the root of the repository: run_lm_eval.py FILE.gguf lieq_demo --include-path tools/lm_eval_tasks
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from lieq_gguf.evaluation.tasks import sum_of_log_probabilities
from lieq_gguf.native.llama_cpp import LoadedModel, open_model


class GgufModel(TemplateLM):  # type: ignore[misc]
    """A model in llama.cpp with the harness's interface."""

    def __init__(self, model: LoadedModel, n_ctx: int) -> None:
        super().__init__()
        self._model = model
        self.max_length = n_ctx

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        return self._model.bos_token if self._model.bos_token is not None else self._model.eos_token

    def tok_encode(self, string: str, **_options: Any) -> list[int]:
        """Token ids without automatic special tokens, which the harness adds."""
        return self._model.tokenize(string, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Any, **_options: Any) -> list[tuple[float, bool]]:
        return [self._log_likelihood(context, continuation) for _, context, continuation in requests]

    def _log_likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest."""
        ids = [*context, *continuation][-self.max_length - 1 :]
        logits = self._model.logits(ids[:-1], first=len(ids) - len(continuation) - 1)
        is_greedy = bool((logits.argmax(axis=1) == continuation).all())
        return sum_of_log_probabilities(logits, continuation), is_greedy

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Log-likelihood of whole texts, in windows of the context."""
        result = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            pairs = map(make_disjoint_window, windows)
            result.append(sum(self._log_likelihood(context, rest)[0] for context, rest in pairs))
        return result

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Greedy continuations up to a stop text."""
        result = []
        for context, options in (request.args for request in requests):
            n_tokens = int(options.get("max_gen_toks", 256))
            ids = self.tok_encode(context)[-(self.max_length - n_tokens) :]
            text = self._model.text(self._model.generate(ids, n_tokens, lambda logits: int(logits.argmax())))
            for stop in options.get("until", ()):
                text = text.split(stop)[0]
            result.append(text)
        return result


def main() -> None:
    """Load the file, run the tasks, print the harness's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--include-path")
    arguments = parser.parse_args()
    with open_model(arguments.file, n_ctx=arguments.n_ctx, n_threads=arguments.threads) as model:
        result = lm_eval.simple_evaluate(
            GgufModel(model, arguments.n_ctx),
            tasks=arguments.tasks,
            limit=arguments.limit,
            task_manager=TaskManager(include_path=arguments.include_path),
        )
    print(make_table(result))


if __name__ == "__main__":
    main()

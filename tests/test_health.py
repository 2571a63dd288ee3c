from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.command import RunCli
from support.tolerances import EIGHT_BIT_LOGITS, assert_logits_close, distance

from lieq_gguf import pipeline
from lieq_gguf.evaluation.health import N_CTX, check, check_file, repetition
from lieq_gguf.native.llama_cpp import open_model

Pick = Callable[[npt.NDArray[np.float32]], int]


class Speaker:
    """Says what it is told to, whatever the prompt."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:  # noqa: ARG002
        return [1, 2]

    def generate(self, ids: Sequence[int], n_tokens: int, pick: Pick) -> list[int]:  # noqa: ARG002
        return self.ids[:n_tokens]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(" \n"[i] if i < 2 else chr(i) for i in ids)


def spoken(ids: Sequence[int]) -> Any:
    return check(Speaker(ids))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), (list(range(20)), 0.0), ([7] * 14, 10 / 11), ([1, 2, 3] * 5, 9 / 12)],
)
def test_share_of_repeated_sequences(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_varied_text_is_sound() -> None:
    found = spoken(range(65, 165))
    assert (found.n_looping, found.n_empty, found.verdict) == (0, 0, "speaks")


def test_a_cycle_is_a_loop() -> None:
    found = spoken([65, 66, 67] * 40)
    assert (found.n_looping, found.n_empty) == (found.n_prompts, 0)
    assert found.verdict == f"{found.n_prompts} loop of {found.n_prompts}"


@pytest.mark.parametrize("ids", [[], [0, 1]], ids=["nothing", "blank"])
def test_silence_is_empty(ids: list[int]) -> None:
    found = spoken(ids)
    assert (found.n_looping, found.n_empty) == (0, found.n_prompts)


def test_the_same_file_says_the_same(conversion: pipeline.Conversion) -> None:
    first, second = check_file(conversion.output, 1), check_file(conversion.output, 2)
    assert first == second
    assert len(first.samples) == first.n_prompts
    json.dumps(first.to_json(), allow_nan=False)


def test_generation_stays_in_the_context_and_ends_where_the_model_does(conversion: pipeline.Conversion) -> None:
    with open_model(conversion.output, n_ctx=16) as model:
        assert model.generate([5, 6, 7], 64, lambda _logits: 9) == [9] * 13
        assert model.generate([5, 6, 7], 4, lambda _logits: 9) == [9] * 4
        assert model.generate([5, 6, 7], 4, lambda _logits: model.eos_token) == []


def test_generation_takes_the_logits_of_the_last_token(conversion: pipeline.Conversion) -> None:
    seen: list[npt.NDArray[np.float32]] = []
    with open_model(conversion.output, n_ctx=N_CTX) as model:
        # given ones: the likeliest tokens repeat each other, and with them the logits of neighbours
        ids = np.random.default_rng(0).integers(8, model.n_vocab, 3 + 12).tolist()

        def pick(logits: npt.NDArray[np.float32]) -> int:
            seen.append(logits.copy())
            return int(ids[2 + len(seen)])

        assert model.generate(ids[:3], 12, pick) == ids[3:]
        batch = model.logits(ids)
    assert_logits_close(seen, batch[2:-1], EIGHT_BIT_LOGITS)
    for neighbours in (batch[1:-2], batch[3:]):
        assert distance(seen, neighbours).min() > 3 * EIGHT_BIT_LOGITS


def test_text_of_tokens(conversion: pipeline.Conversion) -> None:
    with open_model(conversion.output, vocab_only=True) as model:
        text = "Grüße, wörld! " * 200
        assert model.text(model.tokenize(text, add_special_tokens=False)) == text


def test_verify_and_eval_report_it(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    verified = json.loads(run_cli("verify", conversion.output, "--json").stdout)
    done = run_cli("eval", conversion.output, "--reference", conversion.output, "--chunks", 1, "--n-ctx", 32, "--json")
    evaluated = json.loads(done.stdout)
    assert verified["health"] == evaluated["health"] == evaluated["reference_health"]
    assert "short continuations" in run_cli("verify", conversion.output).stdout

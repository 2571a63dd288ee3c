from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.command import RunCli

from lieq_gguf import pipeline
from lieq_gguf.errors import EvaluationError
from lieq_gguf.evaluation.tasks import Answers, Question, answer, load_questions, tokens_needed
from lieq_gguf.native.llama_cpp import open_model

LINE = '{"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}'


class Letters:
    """A model whose tokens are bytes and which expects the text it knows."""

    architecture = "letters"
    n_vocab = 256

    def __init__(self, known: str) -> None:
        self.known = known.encode()

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def logits(self, ids: Sequence[int], first: int = 0) -> npt.NDArray[np.float32]:
        result = np.zeros((len(ids) - first, 256), dtype=np.float32)
        for row, position in enumerate(range(first, len(ids))):
            result[row, self.known[position] if position < len(self.known) else 0] = 1.0
        return result


def likelihood(text: str, known: str, start: int) -> float:
    """Log-likelihood of ``text[start:]`` under ``Letters(known)`` by hand."""
    right = math.log(math.e / (math.e + 255))
    return sum(right if a == b else right - 1 for a, b in zip(text[start:], known[start:].ljust(99), strict=False))


def test_the_likeliest_choice_is_chosen() -> None:
    model = Letters("The sky is blue, I think")
    given = answer(model, [Question("The sky is", ("red!", "blue", "gree"), 1)])
    assert (given.chosen, given.right) == ((1,), (1,))


def test_likelihoods_are_divided_by_bytes_for_the_normalised_answer() -> None:
    known = "Say yes certainly"
    question = Question("Say", ("no", "yes certainly"), 1)
    short, long = likelihood("Say no", known, 3), likelihood(known, known, 3)
    assert short > long
    assert short / 2 < long / 13
    given = answer(Letters(known), [question])
    assert (given.chosen, given.chosen_norm) == ((0,), (1,))


def test_choice_follows_a_line_end_directly() -> None:
    known = "Answer:\nB"
    assert answer(Letters(known), [Question("Answer:\n", ("A", "B"), 1)]).chosen == (1,)


def test_accuracy_and_its_error() -> None:
    found = Answers(chosen=(0, 1, 1, 0), chosen_norm=(1, 1, 1, 1), right=(0, 1, 0, 0)).to_json()
    assert found["n_questions"] == 4
    assert found["accuracy"] == {"value": 0.75, "stderr": pytest.approx(0.25)}
    assert found["accuracy_norm"]["value"] == 0.25


def test_one_question_has_no_error() -> None:
    assert Answers((0,), (0,), (0,)).to_json()["accuracy"] == {"value": 1.0, "stderr": None}


def test_shipped_questions_are_good() -> None:
    questions = load_questions(None)
    assert len(questions) >= 20
    assert {q.answer for q in questions} == {0, 1, 2, 3}  # a model that always takes the first is found out


def test_a_file_of_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{LINE}\n\n{LINE}\n", encoding="utf-8")
    assert load_questions(file) == (Question("1 + 1 =", ("2", "3"), 0),) * 2


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '"text"',
        '{"question": "?", "choices": ["a", "b"]}',
        '{"question": "?", "choices": ["a"], "answer": 0}',
        '{"question": "?", "choices": ["a", ""], "answer": 0}',
        '{"question": "?", "choices": "ab", "answer": 0}',
        '{"question": "?", "choices": ["a", "b"], "answer": 2}',
        '{"question": "?", "choices": ["a", "b"], "answer": true}',
        '{"question": "", "choices": ["a", "b"], "answer": 0}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{LINE}\n{line}\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="line 2 is not a question"):
        load_questions(file)


def test_no_questions_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="empty"):
        load_questions(tmp_path / "empty.jsonl")
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")


def test_context_is_as_long_as_the_longest_question(conversion: pipeline.Conversion) -> None:
    questions = [Question("Short", ("a", "b"), 0), Question("word " * 50, ("a", "a much longer choice"), 0)]
    with open_model(conversion.output, vocab_only=True) as model:
        expected = len(model.tokenize("word " * 50 + "a much longer choice", add_special_tokens=True))
        assert tokens_needed(model, questions) == expected


def test_eval_answers_questions(run_cli: RunCli, conversion: pipeline.Conversion, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "word " * 100, "choices": ["a", "b"], "answer": 0}), encoding="utf-8")
    done = run_cli(
        "eval", conversion.output, "--reference", conversion.output, "--chunks", 1, "--n-ctx", 32, "--tasks", file,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tasks"] == found["reference_tasks"]
    assert found["tasks"]["n_questions"] == 1

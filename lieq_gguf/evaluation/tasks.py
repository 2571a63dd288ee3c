"""Multiple-choice questions answered by likelihood: the choice that is likeliest after the question is the answer.

As in EleutherAI's lm-evaluation-harness: ``accuracy`` compares sums of log-likelihoods, ``accuracy_norm`` divides them
by the length of the choice in bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from lieq_gguf.errors import EvaluationError
from lieq_gguf.evaluation.reference import LanguageModel


@dataclass(frozen=True)
class Question:
    """A question and its possible answers.

    Attributes:
        question: The text before the answer.
        choices: Possible continuations, at least two, none empty.
        answer: Index of the right choice.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        chosen: Index of the likeliest choice of every question.
        chosen_norm: The same with log-likelihoods divided by the length of the choice in bytes.
        right: Index of the right choice.
    """

    chosen: tuple[int, ...]
    chosen_norm: tuple[int, ...]
    right: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Shares of right answers with their standard errors."""
        return {
            "n_questions": len(self.right),
            "accuracy": _share(self.chosen, self.right),
            "accuracy_norm": _share(self.chosen_norm, self.right),
        }


def load_questions(file: Path | None) -> tuple[Question, ...]:
    """Questions of a JSONL file, with ``{"question": text, "choices": [text, …], "answer": index}`` in each line.

    Args:
        file: The file, or None for the small set in the package.

    Raises:
        EvaluationError: if the file cannot be read, or a line is not a question, giving its number.
    """
    if file is None:
        content = resources.files("lieq_gguf").joinpath("data", "questions.jsonl").read_bytes()
    else:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise EvaluationError(f"the questions {file} cannot be read: {error.strerror}") from None
    lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if not lines:
        raise EvaluationError(f"the questions {file} are empty; expected one JSON object per line")
    return tuple(_question(line, f"{file}, line {number}") for number, line in lines)


def tokens_needed(model: LanguageModel, questions: Sequence[Question]) -> int:
    """Number of tokens of the longest question with a choice."""
    return max(len(model.tokenize(text + c, True)) for q in questions for text in (_context(q),) for c in q.choices)


def answer(
    model: LanguageModel, questions: Sequence[Question], advance: Callable[[float], None] = lambda _amount: None
) -> Answers:
    """Let a model answer.

    Args:
        model: A model whose context holds the longest question.
        questions: At least one.
        advance: Called with 1 after each question.
    """
    chosen, chosen_norm = [], []
    for question in questions:
        likelihoods = [_log_likelihood(model, _context(question), choice) for choice in question.choices]
        n_bytes = [len(choice.encode()) for choice in question.choices]
        chosen.append(int(np.argmax(likelihoods)))
        chosen_norm.append(int(np.argmax([value / n for value, n in zip(likelihoods, n_bytes, strict=True)])))
        advance(1)
    return Answers(tuple(chosen), tuple(chosen_norm), tuple(q.answer for q in questions))


def sum_of_log_probabilities(logits: npt.NDArray[np.float32], targets: Sequence[int]) -> float:
    """Log-probability of a sequence of tokens, from the logits ``[n_tokens, n_vocab]`` of the positions before them."""
    return float(log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(targets)), targets].sum())


def _log_likelihood(model: LanguageModel, context: str, choice: str) -> float:
    """Sum of the log-probabilities of the choice's tokens.

    Context and choice are tokenised together, since a blank before a word belongs to the word's token.
    """
    whole = model.tokenize(context + choice, add_special_tokens=True)
    stripped = context.rstrip(" ")
    n_context = min(len(model.tokenize(stripped, add_special_tokens=True)), len(whole) - 1)
    n_context = max(n_context, 1)  # the first token is never predicted
    return sum_of_log_probabilities(model.logits(whole[:-1], first=n_context - 1), whole[n_context:])


def _context(question: Question) -> str:
    """The question, followed by a blank."""
    return question.question if question.question[-1:].isspace() else question.question + " "


def _question(line: bytes, where: str) -> Question:
    expected = 'expected {"question": text, "choices": [text, text, …], "answer": index of the right one}'
    try:
        document = json.loads(line)
        text, choices, right = document["question"], document["choices"], document["answer"]
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(f"{where} is not a question; {expected}") from None
    is_valid = (
        isinstance(text, str)
        and text
        and isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
        and type(right) is int
        and 0 <= right < len(choices)
    )
    if not is_valid:
        raise EvaluationError(f"{where} is not a question; {expected}")
    return Question(text, tuple(choices), right)


def _share(chosen: Sequence[int], right: Sequence[int]) -> dict[str, float | None]:
    """Share of right answers, and its standard error, which is None for a single question."""
    n = len(right)
    share = sum(c == r for c, r in zip(chosen, right, strict=True)) / n
    return {"value": share, "stderr": math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None}

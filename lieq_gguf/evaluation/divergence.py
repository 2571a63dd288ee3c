"""How far a file is from the model it was made from: perplexity, Kullback-Leibler divergence, same top token.

The definitions are llama-perplexity's: the text is cut into sequences of ``n_ctx`` tokens, each is run from an empty
context, and only the second half is scored. All models run side by side, sequence by sequence, so no file of logits is
needed. Errors are bootstrapped over sequences, since tokens of one sequence are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from lieq_gguf.errors import EvaluationError
from lieq_gguf.evaluation import health
from lieq_gguf.evaluation.health import Health
from lieq_gguf.evaluation.reference import LanguageModel, check_reference, open_reference
from lieq_gguf.evaluation.tasks import Answers, Question, answer, tokens_needed
from lieq_gguf.formats.gguf_file import require_gguf_file
from lieq_gguf.native.llama_cpp import LoadedModel, open_model
from lieq_gguf.records.files import SCHEMA_VERSION

_ROWS_AT_A_TIME = 32  # limits the float64 copies to about 100 MB for a vocabulary of 150,000
_RESAMPLES = 1000

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is None if there is only one sequence."""

    value: float
    stderr: float | None

    def to_json(self) -> dict[str, float | None]:
        """Both by name."""
        return {"value": self.value, "stderr": self.stderr}


@dataclass(frozen=True)
class Evaluation:
    """A file compared with its reference.

    Attributes:
        file: The file.
        n_tokens: Number of scored tokens.
        n_chunks: Number of their sequences.
        perplexity: Perplexity of the file.
        reference_perplexity: Perplexity of the reference on the same tokens.
        kld: Mean divergence of the file's next-token distribution from the reference's, in nats.
        kld_median: Its median over tokens.
        kld_p99: Its 99th percentile.
        kld_max: Its largest value.
        same_top: Share of positions where both have the same likeliest token.
        probability_change: Mean change of the right token's probability, in [-1, 1].
        probability_change_rms: Root mean square of this change.
        health: How the file continues a handful of prompts.
        reference_health: The same for the reference; None if it does not run in llama.cpp.
        answers: Its answers to multiple-choice questions, or None.
        reference_answers: The same for the reference, or None.
    """

    file: Path
    n_tokens: int
    n_chunks: int
    perplexity: Estimate
    reference_perplexity: Estimate
    kld: Estimate
    kld_median: float
    kld_p99: float
    kld_max: float
    same_top: Estimate
    probability_change: Estimate
    probability_change_rms: float
    health: Health
    reference_health: Health | None = None
    answers: Answers | None = None
    reference_answers: Answers | None = None

    def to_json(self) -> dict[str, Any]:
        """The document that ``eval --json`` prints, or an element of its list."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "file": str(self.file),
            "file_bytes": self.file.stat().st_size,
            "n_tokens": self.n_tokens,
            "n_chunks": self.n_chunks,
            "perplexity": self.perplexity.to_json(),
            "reference_perplexity": self.reference_perplexity.to_json(),
            "kld": {
                "mean": self.kld.value,
                "stderr": self.kld.stderr,
                "median": self.kld_median,
                "p99": self.kld_p99,
                "max": self.kld_max,
            },
            "same_top": self.same_top.to_json(),
            "probability_change": self.probability_change.to_json() | {"rms": self.probability_change_rms},
            "health": self.health.to_json(),
            "reference_health": None if self.reference_health is None else self.reference_health.to_json(),
        }
        if self.answers is not None and self.reference_answers is not None:
            document["tasks"] = self.answers.to_json()
            document["reference_tasks"] = self.reference_answers.to_json()
        return document


@dataclass(frozen=True)
class TokenFigures:
    """Figures of every scored token, each ``[n_tokens]``.

    Attributes:
        nll: Negative log-likelihood of the right token in the file.
        reference_nll: The same in the reference.
        kld: Divergence of the two distributions.
        same_top: 1 where both have the same likeliest token, otherwise 0.
    """

    nll: FloatArray
    reference_nll: FloatArray
    kld: FloatArray
    same_top: FloatArray


def compare_logits(
    reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> TokenFigures:
    """Compare next-token distributions.

    Args:
        reference: ``[n_tokens, n_vocab]`` logits.
        candidate: ``[n_tokens, n_vocab]`` logits.
        targets: ``[n_tokens]``, the token that comes next in the text.
    """
    batches = []
    for start in range(0, len(targets), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        p, q = (log_softmax(logits[rows].astype(np.float64), axis=1) for logits in (reference, candidate))
        at = (np.arange(len(targets[rows])), targets[rows])
        kld = (np.exp(p) * (p - q)).sum(axis=1)
        same = (reference[rows].argmax(axis=1) == candidate[rows].argmax(axis=1)).astype(np.float64)
        batches.append((-q[at], -p[at], kld, same))
    return TokenFigures(*(np.concatenate(column) for column in zip(*batches, strict=True)))


@dataclass(frozen=True)
class ComparisonOptions:
    """How files are compared with their reference.

    Attributes:
        n_ctx: Tokens of a sequence; the second half is scored.
        n_chunks: Sequences to use, from the start of the text; None for all.
        n_threads: Threads to run with.
        questions: Multiple-choice questions to answer as well.
    """

    n_ctx: int = 512
    n_chunks: int | None = None
    n_threads: int = 1
    questions: Sequence[Question] = ()


def evaluate(
    files: Sequence[Path],
    reference: Path,
    text: str,
    options: ComparisonOptions,
    advance: Callable[[float], None] = lambda _amount: None,
) -> list[Evaluation]:
    """Compare files with a reference on a text; the reference runs once for all of them.

    Args:
        files: GGUF files.
        reference: GGUF file or model directory.
        text: Text that calibration has not seen.
        options: How to compare.
        advance: Called with 1 after each sequence and each question.

    Raises:
        EvaluationError: if a file has another architecture or tokenizer than the reference, or the text is too short.
        LieqError: if a file or the reference cannot be loaded.
    """
    check_reference(reference)
    for file in files:
        require_gguf_file(file)
    n_ctx, n_threads, questions = options.n_ctx, options.n_threads, options.questions
    n_needed = max(n_ctx, health.N_CTX, _tokens_needed(files[0], questions))
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(file, n_ctx=n_needed, n_threads=n_threads)) for file in files]
        base = stack.enter_context(open_reference(reference, n_needed, n_threads))
        for file, model in zip(files, models, strict=True):
            if model.architecture != base.architecture:
                raise EvaluationError(
                    f"{file} is a {model.architecture} model and {reference} a {base.architecture} model; "
                    "expected files made from the same model"
                )
        ids = _common_tokens(files, models, reference, base, text)
        chunks = list(_chunks(ids, n_ctx, options.n_chunks, models[0].bos_token))
        figures: list[list[TokenFigures]] = [[] for _ in files]
        first = n_ctx // 2
        for chunk in chunks:
            targets = np.array(chunk[first + 1 :], dtype=np.int64)
            reference_logits = base.logits(chunk, first)[:-1]
            for model, of_file in zip(models, figures, strict=True):
                of_file.append(compare_logits(reference_logits, model.logits(chunk, first)[:-1], targets))
            advance(1)
        reference_health = health.check(base) if isinstance(base, LoadedModel) else None
        reference_answers = answer(base, questions, advance) if questions else None
        return [
            replace(
                _summary(file, of_file, health.check(model)),
                reference_health=reference_health,
                answers=answer(model, questions) if questions else None,
                reference_answers=reference_answers,
            )
            for file, model, of_file in zip(files, models, figures, strict=True)
        ]


def _tokens_needed(file: Path, questions: Sequence[Question]) -> int:
    if not questions:
        return 0
    with open_model(file, vocab_only=True) as model:
        return tokens_needed(model, questions)


def read_text(file: Path | None) -> str:
    """The text of a file, byte for byte: other line endings would give other tokens.

    None stands for a short text in the package, which is not part of its calibration text.

    Raises:
        EvaluationError: if it cannot be read or is not UTF-8.
    """
    if file is None:
        return resources.files("lieq_gguf").joinpath("data", "held_out.txt").read_bytes().decode("utf-8")
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise EvaluationError(f"the text {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"the text {file} is not UTF-8 (byte {error.start})") from None


def count_chunks(file: Path, text: str, n_ctx: int, n_chunks: int | None) -> int:
    """Number of sequences that ``evaluate`` will use, for the progress bar."""
    require_gguf_file(file)
    with open_model(file, vocab_only=True) as model:
        available = len(model.tokenize(text, add_special_tokens=True)) // n_ctx
    return available if n_chunks is None else min(n_chunks, available)


def _common_tokens(
    files: Sequence[Path], models: Sequence[LoadedModel], reference: Path, base: LanguageModel, text: str
) -> list[int]:
    ids = models[0].tokenize(text, add_special_tokens=True)
    others = [*zip(files[1:], models[1:], strict=True), (reference, base)]
    for name, model in others:
        if model.n_vocab != models[0].n_vocab or model.tokenize(text, add_special_tokens=True) != ids:
            raise EvaluationError(
                f"{files[0]} and {name} split the text into different tokens ({models[0].n_vocab} and {model.n_vocab} "
                "in the vocabulary); expected files made from the same model"
            )
    return ids


def _chunks(ids: list[int], n_ctx: int, n_chunks: int | None, bos_token: int | None) -> Iterator[list[int]]:
    available = len(ids) // n_ctx
    if available == 0 or n_ctx < 4:
        raise EvaluationError(
            f"the text has {len(ids)} tokens; expected at least one sequence of {n_ctx}: use a smaller --n-ctx, or a "
            "longer --text"
        )
    for i in range(available if n_chunks is None else min(n_chunks, available)):
        chunk = ids[i * n_ctx : (i + 1) * n_ctx]
        yield chunk if bos_token is None else [bos_token, *chunk[1:]]


def _summary(file: Path, chunks: Sequence[TokenFigures], spoken: Health) -> Evaluation:
    nll = np.array([c.nll.mean() for c in chunks])
    reference_nll = np.array([c.reference_nll.mean() for c in chunks])
    kld = np.concatenate([c.kld for c in chunks])
    change = np.concatenate([np.exp(-c.nll) - np.exp(-c.reference_nll) for c in chunks])
    return Evaluation(
        file=file,
        n_tokens=len(kld),
        n_chunks=len(chunks),
        perplexity=_estimate(nll, np.exp),
        reference_perplexity=_estimate(reference_nll, np.exp),
        kld=_estimate(np.array([c.kld.mean() for c in chunks])),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.quantile(kld, 0.99)),
        kld_max=float(kld.max()),
        same_top=_estimate(np.array([c.same_top.mean() for c in chunks])),
        probability_change=_estimate(change.reshape(len(chunks), -1).mean(axis=1)),
        probability_change_rms=float(np.sqrt((change**2).mean())),
        health=spoken,
    )


def _estimate(chunk_means: FloatArray, transform: Callable[[FloatArray], FloatArray] = lambda x: x) -> Estimate:
    """``transform`` of the mean over sequences of equal length, and its bootstrap error."""
    value = float(transform(chunk_means.mean(keepdims=True))[0])
    if len(chunk_means) < 2:
        return Estimate(value, None)
    draws = np.random.default_rng(0).integers(len(chunk_means), size=(_RESAMPLES, len(chunk_means)))
    return Estimate(value, float(transform(chunk_means[draws].mean(axis=1)).std(ddof=1)))

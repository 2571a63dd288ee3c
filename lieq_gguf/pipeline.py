"""The whole job, top to bottom: resolve, measure, allocate, write, verify."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lieq_gguf import __version__
from lieq_gguf.allocation.allocate import allocate
from lieq_gguf.errors import BudgetError, ScoringError, TokenizerError, VerificationError
from lieq_gguf.job import Job, open_model, resolve, shown_scorer
from lieq_gguf.measure.measuring import Measured, MeasuringNeeds, measure, resolve_measuring
from lieq_gguf.measure.text import CalibrationText, read_calibration_texts
from lieq_gguf.native import block_encoder, ggml
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.files import SCHEMA_VERSION, replaced_when_complete
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.plan import QuantPlan, quantizes_layers
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.request import ImatrixRequest, Request, ScoreRequest
from lieq_gguf.scorers import scorers
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source
from lieq_gguf.tokenizers import Vocabulary, known_deviation, tokenizer_differences
from lieq_gguf.writing.header import Header, make_header
from lieq_gguf.writing.unfinished import Unfinished
from lieq_gguf.writing.verification import verify
from lieq_gguf.writing.writer import encode_tensors, write_file

if TYPE_CHECKING:
    from lieq_gguf.writing.differences import Equality
    from lieq_gguf.writing.feedback_pass import FeedbackPass
    from lieq_gguf.writing.model_tuning import ModelTuning

_COMPARED_CHARACTERS = 2000  # more than the tokens that are compared


@dataclass(frozen=True)
class PreparedFile:
    """A plan, and the header of the file it becomes.

    Attributes:
        job: What is to be done.
        measured: What was measured.
        plan: One type per tensor.
        header: Metadata and figures.
        seconds: Stage name to wall-clock seconds.
    """

    job: Job
    measured: Measured
    plan: QuantPlan
    header: Header
    seconds: Mapping[str, float]

    @property
    def tokens_per_sec(self) -> float:
        """Generation speed predicted from the decode costs."""
        return 1 / self.job.costs.seconds(self.job.source.spec.tensors, self.plan.types)

    @property
    def is_tuned(self) -> bool:
        """Whether scales and norms are tuned after the codes are chosen."""
        tunes = self.job.request.writing.tune != "none"
        return tunes and quantizes_layers(self.plan.types, self.job.source.spec)

    def to_json(self) -> dict[str, Any]:
        """The document that ``plan --json`` prints."""
        return (
            self.plan.to_json()
            | self.header.meter.to_json()
            | {
                "n_layers": self.job.source.spec.n_layers,
                "predicted": {
                    "generation_tokens_per_sec": self.tokens_per_sec,
                    "machine": self.job.costs.machine,
                },
                "seconds": _rounded(self.seconds),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did.

    Attributes:
        output: The file.
        prepared: Its plan and figures.
        seconds: Stage name to wall-clock seconds.
        block_errors: With error feedback, one per layer: how far its output is from the intact model's.
        divergences: Divergence on calibration sequences held out from tuning, before and after it; None without.
        equality: How equal the file and its model are; None without proof.
    """

    output: Path
    prepared: PreparedFile
    seconds: Mapping[str, float]
    block_errors: tuple[float, ...] = ()
    divergences: tuple[float, float] | None = None
    equality: Equality | None = None

    def to_json(self) -> dict[str, Any]:
        """The document that ``convert --json`` prints."""
        return self.prepared.to_json() | {
            "schema_version": SCHEMA_VERSION,
            "kind": "conversion",
            "output": str(self.output),
            "block_errors": list(self.block_errors),
            "tuning": None
            if self.divergences is None
            else dict(zip(("before", "after"), self.divergences, strict=True)),
            "equality": None if self.equality is None else self.equality.to_json(),
            "seconds": _rounded(self.seconds),
        }


def convert(request: Request, progress: Progress | None = None) -> Conversion:
    """From a model directory or a GGUF file to a verified GGUF file.

    Args:
        request: What the user said.
        progress: Where stages are shown and timed.

    Raises:
        LieqError: on any expected error; an existing file of that name is then unchanged.
    """
    progress = progress or Progress()
    job = resolve(request, progress)
    decided = job.plan or job.problem
    if decided is not None and decided.error_feedback:
        block_encoder.require_library()
    if job.plan is not None:
        ggml.prepare([QUANT_TYPES[name] for name in sorted(set(job.plan.types.values()))])
    prepared = prepare(job, progress)
    unfinished = _unfinished(prepared)

    def tell_what_is_kept() -> None:
        progress.note("interrupted; what is done is kept, and the same command goes on there")

    with unfinished.until_done(tell_what_is_kept):
        feedback = _feedback_pass(prepared, unfinished, progress) if prepared.plan.error_feedback else None
        tuning = _tuning(prepared, progress) if prepared.is_tuned else None
        with replaced_when_complete(job.output) as temporary:
            checksums = _write(temporary, prepared, feedback, tuning, progress)
            equality = _verify(temporary, prepared, checksums, progress)
    block_errors = () if feedback is None else tuple(feedback.block_errors)
    divergences = None if tuning is None else tuning.divergences
    return Conversion(job.output, prepared, dict(progress.seconds), block_errors, divergences, equality)


def plan(request: Request, progress: Progress | None = None) -> PreparedFile:
    """The types and the figures of the file that a request would become, without writing it.

    Args:
        request: What the user said.
        progress: Where stages are shown and timed.

    Raises:
        LieqError: on any expected error.
    """
    progress = progress or Progress()
    return prepare(resolve(request, progress, for_writing=False), progress)


@dataclass(frozen=True)
class Scored:
    """The result of ``score``.

    Attributes:
        scores: All layer scores, and the errors by type.
        scorer: The score to show first.
    """

    scores: LayerScores
    scorer: str


def score(request: ScoreRequest, progress: Progress | None = None) -> Scored:
    """Score the layers of a model, from the cache or by one pass.

    Raises:
        LieqError: on any expected error.
    """
    progress = progress or Progress()
    source = open_model(request.model, request.source, progress)
    scorer = shown_scorer(source, request.scorer)
    is_costly = request.measures_all or scorers()[scorer].is_costly
    needs = MeasuringNeeds(types=request.types, costly=is_costly)
    measured = measure(resolve_measuring(source, request.measuring, request.compute, needs), progress)
    assert measured.scores is not None
    if scorer not in measured.scores.by_scorer:
        raise ScoringError(
            f"llama.cpp's graph of {source.spec.architecture} does not show what '{scorer}' needs; use --layer-score zd"
        )
    return Scored(measured.scores, scorer)


def imatrix(request: ImatrixRequest, progress: Progress | None = None) -> ImportanceMatrix:
    """Measure the importance matrix of a model, from the cache or by one pass.

    Raises:
        LieqError: on any expected error.
    """
    progress = progress or Progress()
    source = open_model(request.model, request.source, progress)
    measured = measure(
        resolve_measuring(source, request.measuring, request.compute, MeasuringNeeds(scores=False)), progress
    )
    assert measured.importance is not None
    return measured.importance


def prepare(job: Job, progress: Progress) -> PreparedFile:
    """Everything between the job and the first tensor: measure the model and divide the bits."""
    measured = measure(job.measuring, progress)
    chosen = job.plan or _allocated(job, measured, progress)
    spec = job.source.spec
    provenance = job.provenance(measured.importance, quantizes_layers(chosen.types, spec))
    header = make_header(spec, job.metadata, chosen, provenance)
    _check_size(job, chosen, header, progress)
    return PreparedFile(job, measured, chosen, header, dict(progress.seconds))


def _allocated(job: Job, measured: Measured, progress: Progress) -> QuantPlan:
    assert job.problem is not None
    with progress.stage("allocate", "Allocating bits"):
        return allocate(job.problem, measured.scores)


def _check_size(job: Job, chosen: QuantPlan, header: Header, progress: Progress) -> None:
    """Require that the file is no larger than its target. A given plan, edited by hand, may exceed it."""
    if not chosen.budget.covers_file or 8 * header.meter.file_bytes <= chosen.budget.limit(job.source.spec):
        return
    excess = f"the file takes {header.meter.file_bytes} bytes, more than {chosen.budget}"
    if job.plan is None:
        raise BudgetError(f"{excess}; please report this")
    progress.warn(f"{excess}, the target of {job.request.target}")


def _unfinished(prepared: PreparedFile) -> Unfinished:
    """Where the second pass keeps what it has done; without one, or a cache, nowhere."""
    task, importance = prepared.job.measuring, prepared.measured.importance
    if not (prepared.plan.error_feedback and task.options.use_cache):
        return Unfinished()
    import torch

    return Unfinished.of(
        versions=[__version__, torch.__version__],
        model=task.source.fingerprint,
        types=dict(prepared.plan.types),
        tokens=hashlib.sha256(task.tokens.ids.tobytes()).hexdigest(),
        importance=None if importance is None else importance.digest(),
        device=task.compute.device,
        in_float32=task.compute.in_float32,
    )


def _feedback_pass(prepared: PreparedFile, unfinished: Unfinished, progress: Progress) -> FeedbackPass:
    """Prepare the second pass and say how long it will take."""
    from lieq_gguf.writing.feedback_pass import FeedbackPass

    task = prepared.job.measuring
    measured = prepared.measured
    feedback = FeedbackPass(
        task.source, prepared.plan, task.tokens, measured.importance, task.compute, measured.output_moments, unfinished
    )
    if feedback.n_finished:
        progress.note(
            f"goes on at layer {feedback.n_finished} of {task.source.spec.n_layers}, where it was interrupted; "
            "--no-cache begins anew"
        )
    elif not progress.silent:
        progress.note(
            f"error feedback takes about {feedback.expected_seconds():.0f} s and "
            f"{feedback.expected_bytes() / 1e6:.0f} MB; --no-error-feedback skips it"
        )
    return feedback


def _tuning(prepared: PreparedFile, progress: Progress) -> ModelTuning:
    """Prepare tuning and say how long it will take."""
    from lieq_gguf.writing.model_tuning import ModelTuning

    task = prepared.job.measuring
    tuning = ModelTuning(task.source, prepared.plan, task.tokens, task.compute)
    if not progress.silent:
        progress.note(
            f"tuning takes about {tuning.expected_seconds():.0f} s and {tuning.expected_bytes() / 1e6:.0f} MB besides; "
            "--tune none skips it"
        )
    return tuning


def _write(
    file: Path, prepared: PreparedFile, feedback: FeedbackPass | None, tuning: ModelTuning | None, progress: Progress
) -> Mapping[str, int]:
    """Write the file; returns the checksum of every tensor."""
    source, n_threads = prepared.job.source, prepared.job.request.compute.n_threads
    tensors = source.spec.tensors
    with progress.stage("write", "Quantising", sum(t.n_weights for t in tensors)) as advance:
        if feedback is None:
            encoded = encode_tensors(source, tensors, prepared.plan, prepared.measured.importance, n_threads)
        else:
            encoded = feedback.encoded()
        if tuning is None:
            return write_file(file, prepared.header, encoded, advance)
        tuning.take(encoded, advance)
    with progress.stage("tune", "Tuning", 1.0) as advance:
        return write_file(file, prepared.header, tuning.tuned(advance))


def _verify(file: Path, prepared: PreparedFile, checksums: Mapping[str, int], progress: Progress) -> Equality | None:
    job, tensors = prepared.job, prepared.job.source.spec.tensors
    with progress.stage("verify", "Verifying", sum(t.n_weights for t in tensors)) as advance:
        shapes = {t.name: t.shape for t in tensors}
        verify(file, prepared.plan.types, shapes, job.request.compute.n_threads, advance, checksums)
        check_tokenizer(job.source, file, job.metadata.vocabulary, progress)
    if not job.request.writing.proof:
        return None
    try:
        return compare(job.source, file, job.request.compute, progress, *job.measuring.texts[:1])
    except VerificationError as error:
        raise VerificationError(
            f"{error}; nothing is kept. Please report this, and if the model is right elsewhere, --no-proof keeps it"
        ) from None


def compare(
    source: Source, file: Path, compute: ComputeOptions, progress: Progress, text: CalibrationText | None = None
) -> Equality:
    """Prove that a file is the model that it was made from, on the beginning of a text or of the shipped one.

    Raises:
        VerificationError: at the first difference that rounding does not explain.
    """
    from lieq_gguf.writing.equality import check_equality

    beginning = (text or read_calibration_texts()[0]).content[:_COMPARED_CHARACTERS]
    with progress.stage("compare", "Comparing", source.spec.n_layers) as advance:
        equality = check_equality(source, file, beginning, compute, advance)
    if isinstance(source, ModelDirectory) and source.has_unreadable_tokenizer:
        progress.note(
            f"transformers cannot load the tokenizer of {source.path}, so it was not compared which tokens it adds to "
            "a text"
        )
    return equality


def check_tokenizer(source: Source, file: Path, vocabulary: Vocabulary | None, progress: Progress) -> None:
    """Tokenise a built-in text with the source's tokenizer and with the file in llama.cpp.

    Where llama.cpp is known to deviate, a difference is only a warning, since no file could avoid it.

    Raises:
        TokenizerError: at any other difference.
    """
    differences = tokenizer_differences(source.load_tokenizer(), file)
    if not differences:
        return
    caveat = "" if vocabulary is None else known_deviation(vocabulary, differences)
    if not caveat:
        has_name = vocabulary is not None and vocabulary.model == "gpt2"  # only byte-level BPE has a pre-tokenizer
        advice = "name the right pre-tokenizer with --pre-tokenizer" if has_name else "please report this"
        raise TokenizerError(f"llama.cpp tokenises differently from {source.path}: {differences[0]}; {advice}")
    progress.warn(f"{caveat}; for example {differences[0]}")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(duration, 3) for stage, duration in seconds.items()}


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

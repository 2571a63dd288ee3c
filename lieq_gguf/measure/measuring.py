"""The stage that finds out about a model: scores and importance from files, from the cache, or from one pass."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from lieq_gguf import __version__
from lieq_gguf.errors import CalibrationError
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.measure.cache import CacheEntry
from lieq_gguf.measure.engines import Engine, engine_of
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import CalibrationText, CalibrationTokens, read_calibration_text, tokenize
from lieq_gguf.native import ggml
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import COSTLY_STATISTICS
from lieq_gguf.records.options import ComputeOptions, MeasuringOptions
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.scorers import score_layers, scorers
from lieq_gguf.sources.source import Source

_FEW_TOKENS = 2048


@dataclass(frozen=True)
class Wanted:
    """What a job needs to know of a model.

    Attributes:
        scores: Whether layer scores and type errors are wanted.
        importance: Whether an importance matrix is wanted for itself; off, none is measured where scores are given.
        types: Types whose errors to estimate.
        costly: Whether the statistics that cost more than the pass are wanted as well.
        tokens: Whether the calibration tokens are wanted whatever is measured, as error feedback does.
    """

    scores: bool = True
    importance: bool = True
    types: tuple[QuantType, ...] = ()
    costly: bool = False
    tokens: bool = False


@dataclass(frozen=True)
class Measured:
    """What is known of a model before bits are divided.

    Attributes:
        scores: Layer scores and type errors, or None if they were not wanted.
        importance: Importance matrix, or None to quantise without.
    """

    scores: LayerScores | None = None
    importance: ImportanceMatrix | None = None


@dataclass(frozen=True)
class MeasuringTask:
    """What is to be found out about a model: files are read, and everything is decided.

    Attributes:
        source: The model.
        engine: What runs it.
        options: What the user says.
        compute: Where and how layers are run.
        wanted: What is needed.
        scores: Scores from a file, or None.
        importance: Importance matrix from a file, or None.
        text: Calibration text; None if nothing is to be run on it.
    """

    source: Source
    engine: Engine
    options: MeasuringOptions
    compute: ComputeOptions
    wanted: Wanted
    scores: LayerScores | None
    importance: ImportanceMatrix | None
    text: CalibrationText | None

    @property
    def measures_scores(self) -> bool:
        """Whether scores come from a pass."""
        return self.wanted.scores and self.scores is None

    @property
    def needs_pass(self) -> bool:
        """Whether the files leave anything to find out."""
        needs_importance = self.wanted.importance and self.options.use_imatrix and self.importance is None
        return self.measures_scores or needs_importance

    @cached_property
    def tokens(self) -> CalibrationTokens:
        """The calibration text in the model's own tokens, made when it is first asked for."""
        assert self.text is not None
        return tokenize(self.text, self.source.load_tokenizer(), self.options.n_tokens)


def resolve_measuring(
    source: Source, options: MeasuringOptions, compute: ComputeOptions, wanted: Wanted
) -> MeasuringTask:
    """Read the files that are given, and refuse what cannot be; no weights are read.

    Raises:
        CalibrationError: if the engine does not run on the device, or a text or importance matrix cannot be used.
        FormatError: if a file is damaged or of another model.
    """
    engine = engine_of(source)
    if compute.device != "cpu" and not engine.runs_on_devices:
        raise CalibrationError(f"{run_by(source, engine)}, here on the CPU only; leave out --device {compute.device}")
    scores = LayerScores.load(options.scores_file) if wanted.scores and options.scores_file else None
    if scores is not None:
        scores.check(source.spec, source.fingerprint)
    importance = load_importance(options.imatrix_file) if options.imatrix_file else None
    if importance is not None:
        importance.check(source.spec)
    task = MeasuringTask(source, engine, options, compute, wanted, scores, importance, text=None)
    if not (task.needs_pass or wanted.tokens):
        return task
    for scorer in scorers().values() if task.measures_scores else ():
        scorer.load()  # another package's may not be there, and the pass takes minutes
    text = read_calibration_text(options.text_file)
    return MeasuringTask(source, engine, options, compute, wanted, scores, importance, text)


def run_by(source: Source, engine: Engine) -> str:
    """How a message begins that says what an engine cannot do."""
    return f"{source.spec.name} ({source.spec.architecture}) is run by {engine.name}"


def measure(task: MeasuringTask, progress: Progress) -> Measured:
    """Scores and importance matrix, from files where they are given, and otherwise from the cache or one pass."""
    if not task.needs_pass:
        return Measured(task.scores, task.importance if task.options.use_imatrix else None)
    for note in task.source.notes_on_scores if task.measures_scores else ():
        progress.note(note)
    entry = _cache_entry(task)
    kept = entry.load() if task.options.use_cache else None
    if kept is not None and (kept[0] is not None) == task.measures_scores:
        progress.note(
            f"what an earlier pass found out about {task.source.spec.name} is used again; --no-cache measures anew"
        )
        scores, importance = kept
    else:
        scores, importance = _measured_by_pass(task, progress)
        if task.options.use_cache:
            entry.save(scores, importance)
    return Measured(task.scores or scores, (task.importance or importance) if task.options.use_imatrix else None)


def _cache_entry(task: MeasuringTask) -> CacheEntry:
    """The place for what the pass finds, by everything that this depends on."""
    options, compute, text = task.options, task.compute, task.text
    assert text is not None
    return CacheEntry.of(
        version=__version__,
        model=task.source.fingerprint,
        tokenizer=task.source.tokenizer_fingerprint,
        text=hashlib.sha256(text.content.encode()).hexdigest(),
        dataset=text.dataset,
        n_tokens=options.n_tokens,
        types=[t.name for t in task.wanted.types] if task.measures_scores else None,
        importance=None if task.importance is None else task.importance.digest(),
        weighed=options.use_imatrix,
        seed=options.seed if task.measures_scores else None,
        device=compute.device,
        in_float32=compute.in_float32,
        removal=task.wanted.costly,
        outer_matrices=task.measures_scores,
    )


def _measured_by_pass(task: MeasuringTask, progress: Progress) -> tuple[LayerScores | None, ImportanceMatrix]:
    result = _run_pass(task, progress)
    if result.importance.n_unseen:
        n_matrices = sum(counts.size for counts in result.importance.counts.values())
        progress.warn(
            f"{result.importance.n_unseen} of {n_matrices} matrices of experts were reached by no calibration token "
            "and get the importance of the others; give more --n-tokens, or a --calibration text nearer to the use"
        )
    if not task.measures_scores:
        return None, result.importance
    scores = LayerScores(
        model=task.source.spec.name,
        n_tokens=task.tokens.ids.size,
        dataset=task.tokens.dataset,
        seed=task.options.seed,
        by_scorer=score_layers(result.measurements),
        type_errors=result.type_errors,
        sensitivities=result.sensitivities,
        fingerprint=task.source.fingerprint,
        kld_per_block_error=result.kld_per_block_error,
    )
    return scores, result.importance


def _run_pass(task: MeasuringTask, progress: Progress) -> PassResult:
    types = task.wanted.types if task.measures_scores else ()
    ggml.prepare(types)
    with ThreadPoolExecutor(1) as pool:
        tokenizing = pool.submit(lambda: task.tokens)
        task.engine.load()  # takes seconds, and leaves the other core to the tokenizer
        tokens = tokenizing.result()
    if tokens.ids.size < min(_FEW_TOKENS, task.options.n_tokens):
        progress.warn(
            f"{tokens.dataset} gives only {tokens.ids.size} tokens to calibrate on; some thousands are better"
        )
    statistics = task.engine.statistics if task.wanted.costly else task.engine.statistics - COSTLY_STATISTICS
    options = PassOptions(
        statistics=statistics if task.measures_scores else frozenset(),
        error_types=types,
        importance=task.importance,
        weigh_errors=task.options.use_imatrix,
        seed=task.options.seed,
        compute=task.compute,
    )
    return task.engine.run_pass(task.source, tokens, options, progress)

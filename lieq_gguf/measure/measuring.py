"""The measuring stage: scores and importance matrix from files, from the cache, or from one pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lieq_gguf import __version__
from lieq_gguf.errors import CalibrationError
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.measure.cache import CacheEntry
from lieq_gguf.measure.engines import Engine, engine_of
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import CalibrationText, CalibrationTokens, read_calibration_texts, tokenize
from lieq_gguf.native import ggml
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import COSTLY_STATISTICS
from lieq_gguf.records.options import ComputeOptions, MeasuringOptions
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.scorers import score_layers, scorers
from lieq_gguf.sources.source import Source

if TYPE_CHECKING:
    import torch

_FEW_TOKENS = 2048


@dataclass(frozen=True)
class MeasuringNeeds:
    """What a job needs to have measured.

    Attributes:
        scores: Whether it needs layer scores and type errors.
        importance: Whether it needs an importance matrix even if scores are given.
        types: Types whose errors to estimate.
        costly: Whether it needs also the statistics that cost more than the pass.
        tokens: Whether it needs the calibration tokens in any case, as for error feedback.
    """

    scores: bool = True
    importance: bool = True
    types: tuple[QuantType, ...] = ()
    costly: bool = False
    tokens: bool = False


@dataclass(frozen=True)
class Measured:
    """What was measured before the bits are divided.

    Attributes:
        scores: Layer scores and type errors, or None if they are not needed.
        importance: Importance matrix, or None to quantise without one.
        output_moments: Second moments of the output matrix's input ``[d_model, d_model]``, if this run's own pass gave
            them: they are too large for the cache.
    """

    scores: LayerScores | None = None
    importance: ImportanceMatrix | None = None
    output_moments: torch.Tensor | None = None


@dataclass(frozen=True)
class MeasuringTask:
    """What to measure, with everything decided and all given files read.

    Attributes:
        source: The model.
        engine: What runs it.
        options: The user's options.
        compute: Device, threads and precision.
        needs: What the job needs.
        scores: Scores from a file, or None.
        importance: Importance matrix from a file, or None.
        texts: Calibration texts; empty if they are not needed.
    """

    source: Source
    engine: Engine
    options: MeasuringOptions
    compute: ComputeOptions
    needs: MeasuringNeeds
    scores: LayerScores | None
    importance: ImportanceMatrix | None
    texts: tuple[CalibrationText, ...] = ()

    @property
    def measures_scores(self) -> bool:
        """Whether scores come from a pass."""
        return self.needs.scores and self.scores is None

    @property
    def needs_pass(self) -> bool:
        """Whether the given files leave anything to measure."""
        needs_importance = self.needs.importance and self.options.use_imatrix and self.importance is None
        return self.measures_scores or needs_importance

    @cached_property
    def tokens(self) -> CalibrationTokens:
        """The calibration texts in the model's own tokens; tokenised at the first access."""
        return tokenize(self.texts, self.source.load_tokenizer(), self.options.n_tokens)


def resolve_measuring(
    source: Source, options: MeasuringOptions, compute: ComputeOptions, needs: MeasuringNeeds
) -> MeasuringTask:
    """Read the given files and refuse what is impossible; no weights are read.

    Raises:
        CalibrationError: if the engine does not run on the device, or a text or importance matrix cannot be used.
        FormatError: if a file is damaged or belongs to another model.
    """
    engine = engine_of(source)
    if compute.device != "cpu" and not engine.runs_on_devices:
        raise CalibrationError(f"{run_by(source, engine)}, here only on the CPU; leave out --device {compute.device}")
    scores = LayerScores.load(options.scores_file) if needs.scores and options.scores_file else None
    if scores is not None:
        scores.check(source.spec, source.fingerprint)
    importance = load_importance(options.imatrix_file) if options.imatrix_file else None
    if importance is not None:
        importance.check(source.spec)
    task = MeasuringTask(source, engine, options, compute, needs, scores, importance)
    if not (task.needs_pass or needs.tokens):
        return task
    for scorer in scorers().values() if task.measures_scores else ():
        scorer.load()  # fails now, not after a pass of minutes, if another package's scorer cannot be imported
    return replace(task, texts=read_calibration_texts(options.text_files))


def run_by(source: Source, engine: Engine) -> str:
    """The beginning of a message about what an engine cannot do."""
    return f"{source.spec.name} ({source.spec.architecture}) is run by {engine.name}"


def measure(task: MeasuringTask, progress: Progress) -> Measured:
    """Scores and importance matrix: from the given files, otherwise from the cache or one pass."""
    if task.importance is not None and task.options.use_imatrix:
        _warn_of_zeros(task.source, task.importance, progress)
    if not task.needs_pass:
        return Measured(task.scores, task.importance if task.options.use_imatrix else None)
    for note in task.source.notes_on_scores if task.measures_scores else ():
        progress.note(note)
    entry = _cache_entry(task)
    cached = entry.load() if task.options.use_cache else None
    if cached is not None and (cached[0] is not None) == task.measures_scores:
        progress.note(f"using what an earlier pass measured in {task.source.spec.name}; --no-cache measures it again")
        measured = Measured(*cached)
    else:
        measured = _measured_by_pass(task, progress)
        if task.options.use_cache and measured.importance is not None:
            entry.save(measured.scores, measured.importance)
    importance = (task.importance or measured.importance) if task.options.use_imatrix else None
    return replace(measured, scores=task.scores or measured.scores, importance=importance)


def _warn_of_zeros(source: Source, importance: ImportanceMatrix, progress: Progress) -> None:
    """Say which matrices of a given file have zeros where the model has weights."""
    found = []
    for tensor in (t for layer in source.spec.layer_matrices for t in layer if not t.of_experts):
        is_unused = importance.unused_columns(tensor.name)
        if is_unused.any() and next(iter(source.rows(tensor)))[:, is_unused].any():
            found.append(f"{is_unused.mean():.0%} of the columns of {tensor.name}")
    if found:
        others = f" and for columns of {len(found) - 1} other matrices" if len(found) > 1 else ""
        progress.warn(
            f"the importance matrix has zeros for {found[0]}{others}, as if no input ever used them; they count as "
            "much as the least used column. If that surprises you, make it again, or let it be measured"
        )


def _cache_entry(task: MeasuringTask) -> CacheEntry:
    """The cache entry of the pass, by everything that its result depends on."""
    options, compute = task.options, task.compute
    return CacheEntry.of(
        version=__version__,
        has_output=True,  # importance of the output matrix
        model=task.source.fingerprint,
        tokenizer=task.source.tokenizer_fingerprint,
        texts=[(text.dataset, text.digest()) for text in task.texts],
        n_tokens=options.n_tokens,
        types=[t.name for t in task.needs.types] if task.measures_scores else None,
        importance=None if task.importance is None else task.importance.digest(),
        weighed=options.use_imatrix,
        seed=options.seed if task.measures_scores else None,
        device=compute.device,
        in_float32=compute.in_float32,
        costly=task.needs.costly,
        scorers=list(scorers()) if task.measures_scores else None,  # another package's may come later
    )


def _measured_by_pass(task: MeasuringTask, progress: Progress) -> Measured:
    result = _run_pass(task, progress)
    if result.importance.n_unseen:
        n_matrices = sum(counts.size for counts in result.importance.counts.values())
        progress.warn(
            f"no calibration token reached {result.importance.n_unseen} of {n_matrices} matrices of experts, so they "
            "get the importance of the others; use more --n-tokens, or a --calibration text closer to your use"
        )
    if not task.measures_scores:
        return Measured(None, result.importance, result.output_moments)
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
    return Measured(scores, result.importance, result.output_moments)


def _run_pass(task: MeasuringTask, progress: Progress) -> PassResult:
    types = task.needs.types if task.measures_scores else ()
    ggml.prepare(types)
    with ThreadPoolExecutor(1) as pool:
        tokenizing = pool.submit(lambda: task.tokens)
        task.engine.load()  # takes seconds, while another core tokenises
        tokens = tokenizing.result()
    if tokens.ids.size < min(_FEW_TOKENS, task.options.n_tokens):
        progress.warn(f"{tokens.dataset} has only {tokens.ids.size} tokens to calibrate on; a few thousand are better")
    statistics = task.engine.statistics if task.needs.costly else task.engine.statistics - COSTLY_STATISTICS
    options = PassOptions(
        statistics=statistics if task.measures_scores else frozenset(),
        error_types=types,
        importance=task.importance,
        weigh_errors=task.options.use_imatrix,
        output_moments=task.needs.tokens and task.source.spec.has_tied_embeddings,
        seed=task.options.seed,
        compute=task.compute,
    )
    return task.engine.run_pass(task.source, tokens, options, progress)

"""``Job``: what will be done, decided from headers alone. Every default is filled in, everything impossible refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lieq_gguf.allocation.allocate import check_reachable
from lieq_gguf.allocation.build import build_problem, scorer_of, types_on_offer
from lieq_gguf.allocation.decode_costs import DecodeCosts, decode_costs
from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import AllocationOptions, Problem
from lieq_gguf.errors import BudgetError, CalibrationError, ScoringError
from lieq_gguf.measure.engines import Engine, engine_of
from lieq_gguf.measure.measuring import MeasuringNeeds, MeasuringTask, resolve_measuring, run_by
from lieq_gguf.measure.text import joined_name
from lieq_gguf.progress import Progress
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.files import check_output
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.options import MeasuringOptions, SourceOptions
from lieq_gguf.records.plan import QuantPlan, quantizes_layers
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.request import Request
from lieq_gguf.scorers import scorers, scorers_from
from lieq_gguf.sources import find_model, model_name, open_source
from lieq_gguf.sources.source import Source, SourceMetadata
from lieq_gguf.writing.header import ImatrixNote, PlanLabels, Provenance, header_bytes

_HEADER_SLACK = 4096  # bytes kept free under a size target, for the longer command line of 'convert --plan'
_TARGET_NAMES = {"bits": "bpw", "nominal": "-nominal", "file-bits": "bpw-file"}


@dataclass(frozen=True)
class Job:
    """A conversion, decided.

    Attributes:
        request: What the user said.
        output: The file to write.
        source: The model.
        metadata: What the file will say about the model.
        measuring: What to measure.
        costs: Decoding time of each type.
        problem: The bits to divide; None if a plan is given.
        plan: The given plan, or None.
    """

    request: Request
    output: Path
    source: Source
    metadata: SourceMetadata
    measuring: MeasuringTask
    costs: DecodeCosts
    problem: Problem | None
    plan: QuantPlan | None

    def provenance(self, importance: ImportanceMatrix | None, types_are_quantized: bool) -> Provenance:
        """What the file says about its origin."""
        if not types_are_quantized:
            return Provenance(self.request.writing.command_line)
        note = imatrix_note(self.source.spec, self.request.measuring, importance)
        return Provenance(self.request.writing.command_line, note, self.request.writing.tune)


def resolve(request: Request, progress: Progress, *, for_writing: bool = True) -> Job:
    """Decide everything and refuse what is impossible, without reading weights or loading torch.

    Args:
        request: What the user said.
        progress: Where warnings and notes are shown.
        for_writing: Whether a file will be written; if not, no importance matrix is measured when scores are given.

    Raises:
        LieqError: whatever is wrong.
    """
    output = output_of(request)
    if for_writing:
        check_output(output, request.writing.force)  # before a download
    source = open_model(request.model, request.source, progress)
    if for_writing:
        source.check_output(output)
    if isinstance(request.target, Path):
        return _job_with_plan(request, request.target, source, progress, for_writing)
    return _job_with_budget(request, request.target, source, progress, for_writing)


def _job_with_budget(request: Request, budget: BitBudget, source: Source, progress: Progress, for_writing: bool) -> Job:
    options, costs = _limited_to_engine(source, request), decode_costs()
    # A target of the whole file includes the vocabulary; otherwise reading it, which takes longest, comes last.
    metadata = _read_metadata(source, request, progress) if budget.covers_file else None
    problem = build_problem(
        source.spec,
        budget,
        options,
        costs=costs,
        has_imatrix=request.measuring.use_imatrix,
        error_feedback=_uses_error_feedback(source, request),
        header_bytes=0 if metadata is None else _expected_header_bytes(request, budget, options, source, metadata),
    )
    check_reachable(problem)
    measuring = _measuring_for_problem(source, request, problem, for_writing)
    metadata = metadata or _read_metadata(source, request, progress)
    return Job(request, output_of(request), source, metadata, measuring, costs, problem, None)


def _expected_header_bytes(
    request: Request, budget: BitBudget, options: AllocationOptions, source: Source, metadata: SourceMetadata
) -> int:
    no_scores = (0.0,) * source.spec.n_layers
    labels = PlanLabels(options.method, scorer_of(options), options.profile, False, budget, no_scores)
    note = imatrix_note(source.spec, request.measuring, None)
    provenance = Provenance(request.writing.command_line, note, request.writing.tune)
    return header_bytes(source.spec, metadata, labels, provenance) + _HEADER_SLACK


def _job_with_plan(request: Request, file: Path, source: Source, progress: Progress, for_writing: bool) -> Job:
    _limited_to_engine(source, request)
    plan = _given_plan(file, source, request)
    measuring = _measuring_for_plan(source, request, plan, for_writing)
    metadata = _read_metadata(source, request, progress)
    return Job(request, output_of(request), source, metadata, measuring, decode_costs(), None, plan)


def open_model(model: str, options: SourceOptions, progress: Progress) -> Source:
    """Open a model to convert, download it if needed, and show its warnings and notes.

    Raises:
        LieqError: if the model cannot be read.
    """
    source = open_source(find_model(model, options.revision, progress), options)
    for warning in source.warnings:
        progress.warn(warning)
    for note in source.notes:
        progress.note(note)
    return source


def output_of(request: Request) -> Path:
    """The file to write: the requested one, or one named after the model and the target."""
    if request.writing.output is not None:
        return request.writing.output
    target = request.target
    if isinstance(target, Path):
        name = target.stem
    elif target.kind == "size":
        name = f"{target.value / 1e6:g}MB"
    else:
        name = f"{target.value:g}{_TARGET_NAMES[target.kind]}"
    return Path(f"{model_name(Path(request.model))}-{name}.gguf")


def imatrix_note(spec: ModelSpec, options: MeasuringOptions, importance: ImportanceMatrix | None) -> ImatrixNote | None:
    """What the file will say about its importance matrix. Without the matrix, as for plans, it takes as many bytes."""
    if not options.use_imatrix:
        return None
    file = options.imatrix_file.name if options.imatrix_file else "computed by lieq-gguf"
    if importance is not None:
        return ImatrixNote(file, importance.dataset, len(importance.in_sum2), importance.n_chunks)
    return ImatrixNote(file, joined_name(options.text_files), 1 + sum(len(layer) for layer in spec.layer_matrices), 0)


def _read_metadata(source: Source, request: Request, progress: Progress) -> SourceMetadata:
    with progress.stage("read", "Reading the tokenizer"):
        metadata = source.read_metadata(request.writing.pre_tokenizer)
    for warning in metadata.warnings:
        progress.warn(warning)
    for note in metadata.notes:
        progress.note(note)
    return metadata


def _limited_to_engine(source: Source, request: Request) -> AllocationOptions:
    """The user's allocation options, limited to what the engine that runs the model can do.

    Raises:
        BudgetError, CalibrationError, ScoringError: if the user named something that it cannot do.
    """
    options, engine = request.allocation, engine_of(source)
    if engine.runs_layers_again:
        return options
    why = run_by(source, engine)
    if request.writing.error_feedback:
        raise CalibrationError(
            f"{why}, which cannot run a layer again with quantised weights, as error feedback does; "
            "use --no-error-feedback"
        )
    if request.writing.tune != "none":
        raise CalibrationError(f"{why}, which has no gradients, as tuning needs; leave out --tune")
    if options.scorer is not None:
        shown_scorer(source, options.scorer)
    if options.method == "best":
        return replace(options, method="weighted-error")
    expected = "expected --method weighted-error, lim or zd"
    if METHODS[options.method].needs_block_errors:
        raise BudgetError(f"{why}, which cannot give the block errors that {options.method} needs; {expected}")
    if scorer_of(options) not in _scorers_of(engine):
        raise BudgetError(f"{why}, which cannot give '{scorer_of(options)}'; {expected}, or another --layer-score")
    return options


def _scorers_of(engine: Engine) -> tuple[str, ...]:
    """Layer scores that an engine can give: first those it gives for every model."""
    return tuple(dict.fromkeys([*scorers_from(engine.certain_statistics), *scorers_from(engine.statistics)]))


def shown_scorer(source: Source, requested: str | None) -> str:
    """The layer score to show first: the requested one, or the first one available.

    Raises:
        ScoringError: if this model cannot give the requested score, naming those it can.
    """
    engine = engine_of(source)
    names = _scorers_of(engine)
    if requested is not None and requested not in names:
        raise ScoringError(f"{run_by(source, engine)}, which cannot give '{requested}'; expected {' or '.join(names)}")
    return requested or names[0]


def _uses_error_feedback(source: Source, request: Request, usual: bool = True) -> bool:
    """Whether there is error feedback: as requested, otherwise as ``usual`` if there is an importance matrix."""
    if not engine_of(source).runs_layers_again:
        return False
    requested = request.writing.error_feedback
    return usual and request.measuring.use_imatrix if requested is None else requested


def _measuring_for_problem(source: Source, request: Request, problem: Problem, for_writing: bool) -> MeasuringTask:
    """What to measure in order to divide the bits and write the file."""
    options = problem.options
    needs = MeasuringNeeds(
        scores=not problem.has_single_choice,
        importance=for_writing and problem.is_quantized,
        types=types_on_offer(options.types, request.measuring.use_imatrix),  # of any profile: the cache serves all
        costly=scorers()[problem.scorer].is_costly,
        tokens=for_writing and problem.is_quantized and (problem.error_feedback or request.writing.tune != "none"),
    )
    return resolve_measuring(source, request.measuring, request.compute, needs)


def _given_plan(file: Path, source: Source, request: Request) -> QuantPlan:
    """A plan from a file; the options given now decide how it is written.

    Raises:
        FormatError: if the plan is damaged or belongs to another model.
        CalibrationError: if it needs an importance matrix and the user wants none.
    """
    plan = QuantPlan.load(file)
    plan.check(source.spec)
    if plan.needs_imatrix and not request.measuring.use_imatrix:
        raise CalibrationError(f"{file} has types that need an importance matrix; drop --no-imatrix")
    has_feedback = quantizes_layers(plan.types, source.spec) and _uses_error_feedback(
        source, request, usual=plan.error_feedback
    )
    return replace(plan, error_feedback=has_feedback)


def _measuring_for_plan(source: Source, request: Request, plan: QuantPlan, for_writing: bool) -> MeasuringTask:
    """What to measure in order to write the file."""
    is_quantized = quantizes_layers(plan.types, source.spec) and for_writing
    has_tokens = plan.error_feedback or (is_quantized and request.writing.tune != "none")
    needs = MeasuringNeeds(scores=False, importance=is_quantized, tokens=for_writing and has_tokens)
    return resolve_measuring(source, request.measuring, request.compute, needs)

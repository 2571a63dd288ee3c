"""The whole job, top to bottom."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lieq_gguf import __version__
from lieq_gguf.allocation.allocate import (
    METHODS,
    Allocation,
    allocate,
    check_reachable,
    is_decided,
    offered_types,
    scorer_of,
)
from lieq_gguf.allocation.decode_costs import DecodeCosts
from lieq_gguf.errors import BudgetError, CalibrationError, ScoringError, TokenizerError
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.measure.cache import CacheEntry
from lieq_gguf.measure.text import CalibrationTokens, read_calibration_text, tokenize
from lieq_gguf.native import ggml
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import DEFAULT_LADDER, F32, QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.files import SCHEMA_VERSION, check_output, replaced_when_complete
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.sources import open_source
from lieq_gguf.sources.source import Source, SourceOptions
from lieq_gguf.tokenizers import Vocabulary, known_deviation, tokenizer_differences
from lieq_gguf.writing.verification import verify
from lieq_gguf.writing.writer import (
    Header,
    ImatrixNote,
    Provenance,
    encode_tensors,
    header_size,
    make_header,
    write_file,
)

if TYPE_CHECKING:
    from lieq_gguf.writing.feedback_pass import Refinement

DEFAULT_N_TOKENS = 16384
_FEW_TOKENS = 2048
_HEADER_SLACK = 4096  # bytes of a file of given size that are left for the longer command line of 'convert --plan'


@dataclass(frozen=True)
class CalibrationOptions:
    """How to learn about the model.

    Attributes:
        text_file: Calibration text, or None for the shipped one.
        n_tokens: Tokens of it to use.
        imatrix_file: Importance matrix to use instead of a measured one.
        use_imatrix: Whether to quantise with an importance matrix at all.
        scores_file: Scores to use instead of measured ones.
        seed: Seed of the untrained twin.
        n_threads: Threads of everything.
        device: Torch device of the forward pass.
        in_float32: Whether to multiply in float32 even where the device is fast in bfloat16.
        removal: Whether to measure the perplexity without each layer as well.
        use_cache: Whether to use what an earlier pass has learnt, and to keep what this one learns.
        refine: ``feedback``: write with error feedback, in a second pass; ``none``: every block by itself; None: what
            the plan was made for, or feedback where there is an importance matrix.
    """

    text_file: Path | None = None
    n_tokens: int = DEFAULT_N_TOKENS
    imatrix_file: Path | None = None
    use_imatrix: bool = True
    scores_file: Path | None = None
    seed: int = 0
    n_threads: int = 1
    device: str = "cpu"
    in_float32: bool = False
    removal: bool = False
    use_cache: bool = False
    refine: str | None = None

    @property
    def wants_feedback(self) -> bool:
        """Whether to write with error feedback, unless a given plan says otherwise."""
        return self.use_imatrix if self.refine is None else self.refine == "feedback"


@dataclass(frozen=True)
class Knowledge:
    """What is known of a model before bits are divided.

    Attributes:
        scores: Layer scores and type errors, or None if they were not asked for.
        importance: Importance matrix, or None to quantise without.
    """

    scores: LayerScores | None = None
    importance: ImportanceMatrix | None = None


@dataclass(frozen=True)
class Planned:
    """A plan, and the head of the file it will become.

    Attributes:
        plan: One type per tensor.
        header: Metadata and figures.
        importance: Importance matrix to quantise with, or None.
        vocabulary: The tokenizer as the file has it; None if it is taken over as it is.
        spec: The model.
        seconds: Stage name to wall-clock seconds, growing as the run goes on.
        costs: What decoding takes by type, or None.
    """

    plan: QuantPlan
    header: Header
    importance: ImportanceMatrix | None
    vocabulary: Vocabulary | None
    spec: ModelSpec
    seconds: Mapping[str, float]
    costs: DecodeCosts | None = None

    @property
    def tokens_per_sec(self) -> float | None:
        """Speed of generation that the decode costs foretell."""
        return None if self.costs is None else 1 / self.costs.seconds(self.spec.tensors, self.plan.types)

    def to_json(self) -> dict[str, Any]:
        """The document that ``plan --json`` prints."""
        return (
            self.plan.to_json()
            | self.header.meter.to_json()
            | {
                "n_layers": self.spec.n_layers,
                "predicted": {
                    "generation_tokens_per_sec": self.tokens_per_sec,
                    "machine": None if self.costs is None else self.costs.machine,
                },
                "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` has done.

    Attributes:
        output: The file.
        planned: Its plan, figures and times.
        block_errors: With error feedback, one a layer: how far its matrices, all quantised, move its output.
    """

    output: Path
    planned: Planned
    block_errors: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document that ``convert --json`` prints."""
        return self.planned.to_json() | {
            "schema_version": SCHEMA_VERSION,
            "kind": "conversion",
            "output": str(self.output),
            "block_errors": list(self.block_errors),
        }


def convert(
    source_path: Path,
    output: Path,
    budget: BitBudget | None,
    allocation: Allocation,
    calibration: CalibrationOptions,
    progress: Progress,
    *,
    source_options: SourceOptions = SourceOptions(),
    plan_file: Path | None = None,
    pre_tokenizer: str | None = None,
    command_line: str = "",
    force: bool = False,
) -> Conversion:
    """From a model directory or a GGUF file to a verified GGUF file.

    Args:
        source_path: The model.
        output: File to write.
        budget: Target, unless there is a ``plan_file``.
        allocation: How to divide the bits.
        calibration: How to learn about the model.
        progress: Where stages are shown and timed.
        source_options: How to take the model.
        plan_file: Plan to carry out instead of making one.
        pre_tokenizer: Name of the pre-tokenizer, if it cannot be recognised.
        command_line: Kept in the file.
        force: Whether an existing ``output`` may be replaced.

    Raises:
        LieqError: whatever is wrong; ``output`` is then as it was before.
    """
    check_output(output, force)
    source = open_with_warnings(source_path, progress, source_options)
    source.check_output(output)
    planned = make_plan(
        source, budget, allocation, calibration, progress,
        plan_file=plan_file, pre_tokenizer=pre_tokenizer, command_line=command_line,
    )  # fmt: skip
    plan, spec = planned.plan, source.spec
    refinement = _refinement(source, planned, calibration, progress) if plan.refine == "feedback" else None
    with replaced_when_complete(output) as temporary:
        n_weights = sum(t.n_weights for t in spec.tensors)
        with progress.stage("write", "Quantising", n_weights) as advance:
            if refinement is None:
                encoded = encode_tensors(source, spec.tensors, plan, planned.importance, calibration.n_threads)
            else:
                encoded = refinement.encoded()
            write_file(temporary, planned.header, encoded, advance)
        with progress.stage("verify", "Verifying", n_weights) as advance:
            verify(temporary, plan.types, {t.name: t.shape for t in spec.tensors}, calibration.n_threads, advance)
            check_tokenizer(source, temporary, planned.vocabulary, progress)
    return Conversion(output, planned, () if refinement is None else tuple(refinement.block_errors))


def open_with_warnings(path: Path, progress: Progress, options: SourceOptions = SourceOptions()) -> Source:
    """Open a model to convert, and say what the user should know of it.

    Raises:
        LieqError: if it is no readable model.
    """
    source = open_source(path, options)
    for warning in source.warnings:
        progress.warn(warning)
    for note in source.notes:
        progress.note(note)
    return source


def _refinement(source: Source, planned: Planned, calibration: CalibrationOptions, progress: Progress) -> Refinement:
    """The second pass, and what it will take."""
    from lieq_gguf.writing.feedback_pass import Refinement

    text, dataset = read_calibration_text(calibration.text_file)
    refinement = Refinement(
        source,
        planned.plan,
        _tokenize(source, text, dataset, calibration.n_tokens),
        planned.importance,
        device=calibration.device,
        n_threads=calibration.n_threads,
        in_float32=calibration.in_float32,
    )
    if not progress.silent:
        progress.note(
            f"error feedback takes about {refinement.expected_seconds():.0f} s and "
            f"{refinement.expected_bytes() / 1e6:.0f} MB; --refine none leaves it out"
        )
    return refinement


def make_plan(
    source: Source,
    budget: BitBudget | None,
    allocation: Allocation,
    calibration: CalibrationOptions,
    progress: Progress,
    *,
    plan_file: Path | None = None,
    pre_tokenizer: str | None = None,
    command_line: str = "",
    for_writing: bool = True,
) -> Planned:
    """Everything that is decided before the first tensor is written; arguments as for ``convert``.

    With ``for_writing`` off, no importance matrix is measured where scores are given.
    """
    spec = source.spec
    allocation, calibration = _possible(source, allocation, calibration)
    offered, head = allocation, 0
    if budget is not None:
        types = offered_types(allocation.types, calibration.use_imatrix, allocation.profile)
        offered = replace(allocation, types=types)
        for pin in allocation.pins:
            if pin.quant_type.needs_imatrix and not calibration.use_imatrix:
                raise BudgetError(
                    f"--pin '{pin.pattern}={pin.quant_type.name}' needs an importance matrix; drop --no-imatrix"
                )
        if not budget.covers_file:
            check_reachable(spec, budget, offered)
    with progress.stage("read", "Reading the tokenizer"):
        metadata = source.read_metadata(pre_tokenizer)
    if budget is not None and budget.covers_file:
        provenance = Provenance(command_line, _imatrix_note(spec, calibration, None))
        # the vocabulary is part of the file, so only now is it known what the types may take
        head = header_size(spec, metadata, _draft(spec, budget, offered), provenance) + _HEADER_SLACK
        check_reachable(spec, budget, offered, head)
    if plan_file is not None:
        plan = QuantPlan.load(plan_file)
        plan.check(spec)
        plan = replace(plan, refine=calibration.refine or (plan.refine if calibration.use_imatrix else "none"))
        if for_writing:
            ggml.prepare([QUANT_TYPES[name] for name in sorted(set(plan.types.values()))])
        if plan.needs_imatrix and not calibration.use_imatrix:
            raise CalibrationError(f"{plan_file} has types that need an importance matrix; drop --no-imatrix")
        known = Knowledge()
        if _quantizes_layers(plan, spec) and for_writing:
            known = learn(source, (), calibration, progress, scores=False)
    else:
        if budget is None:
            raise BudgetError("neither a budget nor a plan is given; give one of them")
        has_choice = not is_decided(spec, offered, budget)
        is_quantized = any(t.is_quantized for t in (*offered.types, *(pin.quant_type for pin in offered.pins)))
        known = Knowledge()
        if has_choice or is_quantized:
            measured = offered_types(
                allocation.types, calibration.use_imatrix
            )  # another profile finds them in the cache
            known = learn(source, measured, calibration, progress, scores=has_choice, imatrix=for_writing)
        with progress.stage("allocate", "Allocating bits"):
            scores = known.scores
            if scores is not None and calibration.wants_feedback:
                scores = scores.with_feedback(spec)
            plan = allocate(spec, budget, scores, offered, head)
            plan = replace(plan, refine="feedback" if calibration.wants_feedback else "none")
    if not _quantizes_layers(plan, spec):
        plan = replace(plan, refine="none")
    note = _imatrix_note(spec, calibration, known.importance) if _quantizes_layers(plan, spec) else None
    header = make_header(spec, metadata, plan, Provenance(command_line, note))
    if plan.budget.covers_file and 8 * header.meter.file_bytes > plan.budget.limit(spec):
        found = f"the file has {header.meter.file_bytes} bytes, more than {plan.budget}"
        if budget is not None:
            raise BudgetError(f"{found}; please report this")
        progress.warn(f"{found}, which {plan_file} was made for")  # edited by hand, which is welcome
    return Planned(plan, header, known.importance, metadata.vocabulary, spec, progress.seconds, allocation.costs)


def _possible(
    source: Source, allocation: Allocation, calibration: CalibrationOptions
) -> tuple[Allocation, CalibrationOptions]:
    """What was asked for, as far as it can be had of a model that llama.cpp runs.

    Raises:
        BudgetError, CalibrationError, ScoringError: if something was asked for by name that cannot.
    """
    if source.has_transformers_model:
        return allocation, calibration
    from lieq_gguf.scorers import FROM_LLAMA_CPP

    why = _run_by_llama_cpp(source)
    if calibration.refine == "feedback":
        raise CalibrationError(
            f"{why}, which cannot run a layer again with quantised weights, as error feedback does; use --refine none"
        )
    if allocation.scorer is not None:
        shown_scorer(source, allocation.scorer)
    if allocation.method == "best":
        allocation = replace(allocation, method="weighted-error")
    elif METHODS[allocation.method].needs_block_errors or scorer_of(allocation) not in FROM_LLAMA_CPP:
        raise BudgetError(
            f"{why}, which gives no '{scorer_of(allocation)}'; expected --method weighted-error, lim or zd, "
            "or another --scorer"
        )
    return allocation, replace(calibration, refine="none")


def shown_scorer(source: Source, asked: str | None) -> str:
    """The layer score to show first: the one asked for, or the first there is.

    Raises:
        ScoringError: if the one asked for cannot be had of this model, naming those that can.
    """
    from lieq_gguf.scorers import FROM_LLAMA_CPP, scorers

    there = tuple(scorers()) if source.has_transformers_model else FROM_LLAMA_CPP
    if asked is not None and asked not in there:
        raise ScoringError(f"{_run_by_llama_cpp(source)}, which gives no '{asked}'; expected {' or '.join(there)}")
    return asked or there[0]


def _run_by_llama_cpp(source: Source) -> str:
    return f"{source.spec.name} ({source.spec.architecture}) is run by llama.cpp"


def _quantizes_layers(plan: QuantPlan, spec: ModelSpec) -> bool:
    """Whether any matrix of the layers has a type with blocks, and with it a use for importance."""
    return any(QUANT_TYPES[plan.types[t.name]].is_quantized for layer in spec.layer_matrices for t in layer)


def _draft(spec: ModelSpec, budget: BitBudget, allocation: Allocation) -> QuantPlan:
    """A plan whose file has a header as long as the real one's."""
    types = {t.name: F32.name for t in spec.tensors}
    scores = (0.0,) * spec.n_layers
    return QuantPlan(
        spec.name, allocation.method, scorer_of(allocation), budget, (0, 0), types, scores, allocation.profile
    )


def _imatrix_note(
    spec: ModelSpec, calibration: CalibrationOptions, importance: ImportanceMatrix | None
) -> ImatrixNote | None:
    """What the file will say of its importance matrix; as long without the matrix at hand, for plans."""
    if not calibration.use_imatrix:
        return None
    file = calibration.imatrix_file.name if calibration.imatrix_file else "computed by lieq-gguf"
    if importance is not None:
        return ImatrixNote(file, importance.dataset, len(importance.in_sum2), importance.n_chunks)
    dataset = calibration.text_file.name if calibration.text_file else "shipped"
    return ImatrixNote(file, dataset, sum(len(layer) for layer in spec.layer_matrices), 0)


def learn(
    source: Source,
    types: tuple[QuantType, ...] = DEFAULT_LADDER,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
    *,
    scores: bool = True,
    imatrix: bool = True,
) -> Knowledge:
    """Scores and importance matrix, from files where they are given and from one calibration pass otherwise.

    Args:
        source: The model.
        types: Types whose errors to estimate.
        options: Where knowledge comes from.
        progress: Where stages are shown and timed.
        scores: Whether scores are wanted; without them the pass only collects the importance matrix.
        imatrix: Whether an importance matrix is wanted for itself; off, none is measured where scores are given.
    """
    options = options or CalibrationOptions()
    if options.device != "cpu" and not source.has_transformers_model:
        raise CalibrationError(
            f"{_run_by_llama_cpp(source)}, here on the CPU only; leave out --device {options.device}"
        )
    given_scores = LayerScores.load(options.scores_file) if scores and options.scores_file else None
    given = load_importance(options.imatrix_file) if options.imatrix_file else None
    if given_scores is not None:
        given_scores.check(source.spec, source.fingerprint)
    if given is not None:
        given.check(source.spec)
    needs_scores = scores and given_scores is None
    if not needs_scores and (given is not None or not options.use_imatrix or not imatrix):
        return Knowledge(given_scores, given if options.use_imatrix else None)
    measured_scores, measured = _measure(source, types, options, given, needs_scores, progress or Progress())
    importance = (given or measured) if options.use_imatrix else None
    return Knowledge(given_scores or measured_scores, importance)


def _measure(
    source: Source,
    types: tuple[QuantType, ...],
    options: CalibrationOptions,
    given: ImportanceMatrix | None,
    needs_scores: bool,
    progress: Progress,
) -> tuple[LayerScores | None, ImportanceMatrix]:
    """Scores, if they are needed, and importance matrix, by a pass or from the cache of passes made before."""
    for note in source.notes_on_scores if needs_scores else ():
        progress.note(note)
    text, dataset = read_calibration_text(options.text_file)
    entry = CacheEntry.of(
        version=__version__,
        model=source.fingerprint,
        tokenizer=source.tokenizer_fingerprint,
        text=hashlib.sha256(text.encode()).hexdigest(),
        dataset=dataset,
        n_tokens=options.n_tokens,
        types=[t.name for t in types] if needs_scores else None,
        importance=None if given is None else given.digest(),
        weighed=options.use_imatrix,
        seed=options.seed if needs_scores else None,
        device=options.device,
        in_float32=options.in_float32,
        removal=options.removal,
        outer_matrices=needs_scores,
    )
    kept = entry.load() if options.use_cache else None
    if kept is not None and (kept[0] is not None) == needs_scores:
        progress.note(f"what an earlier pass learnt of {source.spec.name} is used again; --no-cache measures anew")
        return kept

    ggml.prepare(types if needs_scores else ())
    with ThreadPoolExecutor(1) as pool:
        tokenizing = pool.submit(_tokenize, source, text, dataset, options.n_tokens)
        # The heavy imports wait until a forward pass is certain, and take seconds.
        from lieq_gguf.measure.forward_pass import PassOptions, calibrate
        from lieq_gguf.measure.llama_cpp_pass import calibrate_in_llama_cpp
        from lieq_gguf.scorers import score_layers

        tokens = tokenizing.result()
    if tokens.ids.size < min(_FEW_TOKENS, options.n_tokens):
        progress.warn(f"{dataset} gives only {tokens.ids.size} tokens to calibrate on; some thousands are better")
    wanted = PassOptions(
        measure=needs_scores,
        removal=options.removal,
        error_types=types if needs_scores else (),
        importance=given,
        weigh_errors=options.use_imatrix,
        seed=options.seed,
        device=options.device,
        n_threads=options.n_threads,
        in_float32=options.in_float32,
    )
    run = calibrate if source.has_transformers_model else calibrate_in_llama_cpp
    result = run(source, tokens, wanted, progress)
    if result.importance.n_unseen:
        n_matrices = sum(counts.size for counts in result.importance.counts.values())
        progress.warn(
            f"{result.importance.n_unseen} of {n_matrices} matrices of experts were reached by no calibration token "
            "and get the importance of the others; give more --n-tokens, or a --calibration text nearer to the use"
        )
    scores = None
    if needs_scores:
        scores = LayerScores(
            model=source.spec.name,
            n_tokens=tokens.ids.size,
            dataset=dataset,
            seed=options.seed,
            by_scorer=score_layers(result.measurements),
            type_errors=result.type_errors,
            sensitivities=result.sensitivities,
            fingerprint=source.fingerprint,
            kld_per_block_error=result.kld_per_block_error,
        )
    if options.use_cache:
        entry.save(scores, result.importance)
    return scores, result.importance


def _tokenize(source: Source, text: str, dataset: str, n_tokens: int) -> CalibrationTokens:
    return tokenize(text, dataset, source.load_tokenizer(), n_tokens)


def check_tokenizer(source: Source, file: Path, vocabulary: Vocabulary | None, progress: Progress) -> None:
    """Tokenise a built-in text with the source's tokenizer and with the file in llama.cpp.

    A difference where llama.cpp is known to deviate is a warning, since no file could avoid it.

    Raises:
        TokenizerError: at any other difference.
    """
    differences = tokenizer_differences(source.load_tokenizer(), file)
    if not differences:
        return
    caveat = "" if vocabulary is None else known_deviation(vocabulary, differences)
    if not caveat:
        raise TokenizerError(
            f"llama.cpp tokenises differently from {source.path}: {differences[0]}; "
            "name the right pre-tokenizer with --pre-tokenizer"
        )
    progress.warn(f"{caveat}; for example {differences[0]}")


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

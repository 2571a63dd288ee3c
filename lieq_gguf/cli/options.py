"""The options of all commands, declared once. A group is a typed record; its methods make a part of a request from it.

Defaults come from the request's records, choices from the registries.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, get_args

import typer

from lieq_gguf.allocation.methods import METHODS, Method
from lieq_gguf.allocation.problem import PROFILES, AllocationOptions, Granularity, Profile
from lieq_gguf.cli.parsing import n_threads_or_all, one_type, pin_of, positive, revision_of, scorer_name, types_named
from lieq_gguf.errors import LieqError
from lieq_gguf.progress import Progress
from lieq_gguf.records.options import (
    MTP_CHOICES,
    TUNE_CHOICES,
    ComputeOptions,
    GenerationOptions,
    MeasuringOptions,
    SourceOptions,
    WritingOptions,
)
from lieq_gguf.request import ScoreRequest
from lieq_gguf.scorers import OWN_SCORERS

if TYPE_CHECKING:
    from lieq_gguf.records.bits import BitBudget

    MethodName: TypeAlias = str
    MtpChoice: TypeAlias = str
    ProfileName: TypeAlias = str
    TuneChoice: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]
    MtpChoice = Literal[MTP_CHOICES]
    ProfileName = Literal[tuple(PROFILES)]
    TuneChoice = Literal[TUNE_CHOICES]


debug_is_on = False


def _set_debug(value: bool) -> None:
    global debug_is_on
    debug_is_on = value


def _summaries(registry: Mapping[str, Method] | Mapping[str, Profile]) -> str:
    return "; ".join(f"`{name}`: {entry.summary}" for name, entry in registry.items()) + "."


def _methods_of(granularity: Granularity) -> str:
    names = [name for name, method in METHODS.items() if method.granularity == granularity]
    return f"{granularity} for {', '.join(names)}"


Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a model on the hub.")
]


@dataclass(frozen=True)
class SourceArguments:
    """The model, and how to read it."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Model directory with config.json and safetensors, a model on the Hugging Face hub (owner/name), or a "
            "GGUF file in F16, BF16 or F32.",
            show_default=False,
        ),
    ]
    revision: Revision = SourceOptions.revision
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="Merge a LoRA adapter (PEFT) into the weights as they are read."),
    ] = SourceOptions.adapter
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Accept a GGUF file that is already quantised. The errors add up."),
    ] = SourceOptions.allow_requantize
    mtp: Annotated[
        MtpChoice,
        typer.Option(
            "--mtp",
            help="The head for multi-token prediction that a model directory has: drop it, or keep it in Q8_0 for "
            "speculative decoding.",
        ),
    ] = SourceOptions.mtp

    def options(self) -> SourceOptions:
        """How to read the model."""
        revision = revision_of(self.source, self.revision)
        return SourceOptions(revision, self.adapter, self.allow_requantize, mtp=self.mtp)


@dataclass(frozen=True)
class ComparedSourceArguments:
    """The model that a file should be."""

    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="MODEL",
            help="Model that the file should be: its directory, its GGUF file or its name on the hub.",
        ),
    ] = None
    revision: Revision = SourceOptions.revision
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="LoRA adapter that was merged into the model.")
    ] = SourceOptions.adapter

    def options(self) -> SourceOptions:
        """How to read it."""
        return SourceOptions(self.revision, self.adapter, allow_requantize=True)


@dataclass(frozen=True)
class ScoredSourceArguments(SourceArguments):
    """The model, where its layers are scored."""

    initializer_range: Annotated[
        float | None,
        typer.Option(
            "--initializer-range",
            metavar="STD",
            help="Standard deviation of the initial weights (`initializer_range` in config.json). Needed only for GGUF "
            "files that do not store it.",
            callback=positive,
        ),
    ] = SourceOptions.initializer_range

    def options(self) -> SourceOptions:
        """How to read the model."""
        return replace(super().options(), initializer_range=self.initializer_range)


@dataclass(frozen=True)
class TargetArguments:
    """The bits that the file may use."""

    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Average stored bits per decoder weight, never exceeded.", callback=positive),
    ] = None
    file_bits: Annotated[
        float | None,
        typer.Option("--file-bits", help="Average bits of the whole file per weight of the model.", callback=positive),
    ] = None
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", help="Size of the whole file, never exceeded: 80MB, 0.4GiB, or bytes."),
    ] = None
    nominal: Annotated[
        bool, typer.Option("--nominal", help="Count bits as the papers do, by the digit in a type's name: Q2_K is 2.")
    ] = False

    @property
    def n_given(self) -> int:
        """How many targets are given."""
        return sum(target is not None for target in (self.bits, self.file_bits, self.size))

    def budget(self) -> BitBudget:
        """The target; exactly one must be given."""
        if self.n_given != 1:
            raise typer.BadParameter("give exactly one of --bits, --file-bits and --size", param_hint="--bits")
        if self.nominal and self.bits is None:
            raise typer.BadParameter("goes with --bits: a file has no nominal size", param_hint="--nominal")
        from lieq_gguf.records.bits import BitBudget, parse_size

        if self.bits is not None:
            return BitBudget("nominal" if self.nominal else "bits", self.bits)
        if self.file_bits is not None:
            return BitBudget("file-bits", self.file_bits)
        try:
            return BitBudget("size", parse_size(str(self.size)))
        except LieqError as error:
            raise typer.BadParameter(str(error), param_hint="--size") from None


@dataclass(frozen=True)
class TargetOrPlanArguments(TargetArguments):
    """The bits that the file may use, or a plan."""

    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Use the types of a plan written by 'plan -o'.")
    ] = None

    def target(self) -> BitBudget | Path:
        """The target or the plan; exactly one must be given."""
        if self.n_given + (self.plan is not None) != 1:
            raise typer.BadParameter("give exactly one of --bits, --file-bits, --size and --plan", param_hint="--bits")
        return self.plan or self.budget()


Types = Annotated[
    str | None,
    typer.Option(
        "--types",
        metavar="A,B,…",
        help="Types to choose from, for example Q2_K,Q3_K,Q4_K. A leading plus adds to the default types: +Q2_0.",
    ),
]


@dataclass(frozen=True)
class AllocationArguments:
    """How to divide the bits."""

    method: Annotated[
        MethodName,
        typer.Option("--method", help=_summaries(METHODS)),
    ] = AllocationOptions.method
    layer_score: Annotated[
        str | None,
        typer.Option(
            "--layer-score",
            metavar="NAME",
            callback=scorer_name,
            help=f"Layer score that ranks or weights the layers: {', '.join(OWN_SCORERS)}, or another package's. A "
            "score that costs more than one pass is measured only if you name it (perplexity-drop: one run without "
            "each layer).",
            show_default="the method's own; energy-gain for best",
        ),
    ] = AllocationOptions.scorer
    granularity: Annotated[
        Granularity | None,
        typer.Option(
            "--granularity",
            help="One type per layer or per tensor.",
            show_default="; ".join(_methods_of(granularity) for granularity in get_args(Granularity)),
        ),
    ] = AllocationOptions.granularity
    types: Types = None
    profile: Annotated[
        ProfileName,
        typer.Option("--profile", help=_summaries(PROFILES)),
    ] = AllocationOptions.profile
    min_tokens_per_sec: Annotated[
        float | None,
        typer.Option(
            "--min-tokens-per-sec",
            metavar="N",
            help="Choose types that reach this predicted speed of generation.",
            callback=positive,
        ),
    ] = AllocationOptions.min_tokens_per_sec
    pin: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="REGEX=TYPE",
            help="Use TYPE for every tensor whose name matches REGEX; its bits count in the budget. Repeatable.",
        ),
    ] = None
    embedding_type: Annotated[
        str | None, typer.Option("--embedding-type", metavar="TYPE", help="Type of the embedding.")
    ] = None
    output_type: Annotated[
        str | None, typer.Option("--output-type", metavar="TYPE", help="Type of the output matrix.")
    ] = None

    def options(self) -> AllocationOptions:
        """How to divide the bits."""
        return AllocationOptions(
            method=self.method,
            scorer=self.layer_score,
            granularity=self.granularity,
            types=types_named("--types", self.types),
            embedding_type=one_type("--embedding-type", self.embedding_type),
            output_type=one_type("--output-type", self.output_type),
            pins=tuple(pin_of(text) for text in self.pin or ()),
            profile=self.profile,
            min_tokens_per_sec=self.min_tokens_per_sec,
        )


@dataclass(frozen=True)
class CalibrationArguments:
    """The text on which the model is measured."""

    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text to calibrate on, instead of the shipped one; may be repeated, and 'shipped' names that one.",
        ),
    ] = None
    n_tokens: Annotated[int, typer.Option("--n-tokens", min=16, help="Calibration tokens.")] = MeasuringOptions.n_tokens
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure again, and keep nothing for the next run.")
    ] = not MeasuringOptions.use_cache

    def options(self) -> MeasuringOptions:
        """How to measure the model."""
        return MeasuringOptions(tuple(self.calibration or ()), self.n_tokens, use_cache=not self.no_cache)


@dataclass(frozen=True)
class ScoringArguments(CalibrationArguments):
    """How layers are scored."""

    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", metavar="FILE", help="Importance matrix (GGUF) to use instead of measuring one."),
    ] = MeasuringOptions.imatrix_file
    seed: Annotated[int, typer.Option("--seed", help="Seed of the untrained twin that scores compare with.")] = (
        MeasuringOptions.seed
    )

    def options(self) -> MeasuringOptions:
        """How to measure the model."""
        return replace(super().options(), imatrix_file=self.imatrix, seed=self.seed)


@dataclass(frozen=True)
class MeasuringArguments(ScoringArguments):
    """What to measure, and what to read from files."""

    no_imatrix: Annotated[
        bool,
        typer.Option(
            "--no-imatrix",
            help="Do not use an importance matrix. Rules out IQ1, IQ2 and IQ3_XXS, which need one.",
        ),
    ] = not MeasuringOptions.use_imatrix
    scores_file: Annotated[
        Path | None,
        typer.Option(
            "--scores-file", metavar="FILE", help="Scores written by 'score -o', to use instead of measuring."
        ),
    ] = MeasuringOptions.scores_file

    def options(self) -> MeasuringOptions:
        """How to measure the model."""
        if self.no_imatrix and self.imatrix is not None:
            raise typer.BadParameter("give --imatrix or --no-imatrix, not both", param_hint="--imatrix")
        return replace(super().options(), use_imatrix=not self.no_imatrix, scores_file=self.scores_file)


@dataclass(frozen=True)
class FeedbackArguments:
    """How to write the file."""

    error_feedback: Annotated[
        bool | None,
        typer.Option(
            "--error-feedback/--no-error-feedback",
            help="Correct the error of each column in later columns, in a second pass: same types and size, less "
            "divergence, two to three times the time. Without it, blocks are byte for byte llama-quantize's.",
            show_default="on; off with --no-imatrix",
        ),
    ] = WritingOptions.error_feedback
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if it is not recognised."
        ),
    ] = WritingOptions.pre_tokenizer

    def options(self) -> WritingOptions:
        """How to write the file."""
        return WritingOptions(
            error_feedback=self.error_feedback, pre_tokenizer=self.pre_tokenizer, command_line=command_line()
        )


Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]


@dataclass(frozen=True)
class FileArguments(FeedbackArguments):
    """The file, and how to write it."""

    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default="MODEL-BITSbpw.gguf"),
    ] = WritingOptions.output
    force: Force = WritingOptions.force
    tune: Annotated[
        TuneChoice,
        typer.Option(
            "--tune",
            help="Tune the scales of all blocks, and the norms, so that the whole model's answers diverge less: same "
            "types, codes and size. `model` takes several times as long as the rest; more --n-tokens give more.",
        ),
    ] = WritingOptions.tune
    proof: Annotated[
        bool,
        typer.Option(
            "--proof/--no-proof",
            help="Prove that the file is the model that was read, and keep none that is not. Takes one to two "
            "hundredths of the time of a conversion with defaults.",
        ),
    ] = WritingOptions.proof
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, but write nothing.")] = False

    def options(self) -> WritingOptions:
        """How to write the file."""
        return replace(super().options(), output=self.output, force=self.force, tune=self.tune, proof=self.proof)


def command_line() -> str:
    """The command as the user typed it."""
    return shlex.join(["lieq-gguf", *sys.argv[1:]])


Threads = Annotated[
    int,
    typer.Option("--threads", "-t", min=0, help="Threads.", show_default="all cores", callback=n_threads_or_all),
]


@dataclass(frozen=True)
class ComputeArguments:
    """Device, threads and precision."""

    threads: Threads = 0
    device: Annotated[str, typer.Option("--device", help="Torch device that layers are run on: cpu, cuda, mps.")] = (
        ComputeOptions.device
    )
    float32: Annotated[
        bool,
        typer.Option(
            "--float32", help="Multiply in float32 even if bfloat16 is fast: the same result on every machine."
        ),
    ] = ComputeOptions.in_float32

    def options(self) -> ComputeOptions:
        """Device, threads and precision."""
        return ComputeOptions(self.device, self.threads, self.float32)


@dataclass(frozen=True)
class ScoreArguments:
    """What is scored, and where the scores go."""

    layer_score: Annotated[
        str | None,
        typer.Option(
            "--layer-score",
            metavar="NAME",
            callback=scorer_name,
            help="Score to show first and draw.",
            show_default="lieq; zd where llama.cpp runs the model",
        ),
    ] = ScoreRequest.scorer
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure every score, and show how their orders agree (Spearman).")
    ] = ScoreRequest.measures_all
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write scores and type errors as JSON.")
    ] = None
    types: Types = None
    force: Force = False


PlanFormat = Literal["json", "tensor-type-file"]


@dataclass(frozen=True)
class PlanFileArguments:
    """Where the plan goes."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan as JSON for 'convert --plan'.")
    ] = None
    format_: Annotated[
        PlanFormat,
        typer.Option("--format", help="`json`, or `tensor-type-file` for llama-quantize's option of that name."),
    ] = "json"
    force: Force = False


@dataclass(frozen=True)
class BenchArguments:
    """How a file is run to time it."""

    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", min=1, help="Tokens of the prompt.")] = 512
    n_generate: Annotated[int, typer.Option("--n-generate", "-n", min=1, help="Tokens generated.")] = 128
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Counted runs.")] = 5


@dataclass(frozen=True)
class GenerationArguments:
    """How a file answers."""

    n_generate: Annotated[int, typer.Option("--n-generate", "-n", min=1, help="Largest number of tokens.")] = (
        GenerationOptions.n_generate
    )
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 = always the likeliest token.")] = (
        GenerationOptions.temperature
    )
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text instead of using the chat template.")] = (
        GenerationOptions.raw
    )
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampler.")] = GenerationOptions.seed
    threads: Threads = 0

    def options(self) -> GenerationOptions:
        """How a file answers."""
        return GenerationOptions(self.n_generate, self.temperature, self.raw, self.seed, self.threads)


ThreadCounts = Annotated[
    str | None,
    typer.Option("--threads", "-t", metavar="N,…", help="Numbers of threads to run with.", show_default="all cores"),
]


@dataclass(frozen=True)
class ComparisonArguments:
    """Reference and text of a comparison."""

    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="REF",
            help="What to compare with: an F16 GGUF file, a model directory, or a model on the hub.",
        ),
    ]
    revision: Revision = None
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to compare on. Calibration must not have seen it.",
            show_default="a short one that comes along",
        ),
    ] = None
    n_ctx: Annotated[int, typer.Option("--n-ctx", min=4, help="Tokens of a sequence. Its second half counts.")] = 512
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Sequences to use.", show_default="all of the text")
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="FILE",
            help="Multiple-choice questions to answer by likelihood (JSONL); `demo` for the built-in set.",
        ),
    ] = None
    threads: Threads = 0


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", callback=_set_debug, is_eager=True)]


@dataclass(frozen=True)
class ProgressArguments:
    """Progress."""

    quiet: Quiet = False

    def progress(self) -> Progress:
        """Shows and times the stages."""
        return Progress(silent=self.quiet)


@dataclass(frozen=True)
class QuietArguments(ProgressArguments):
    """Progress and errors."""

    debug: Debug = False


@dataclass(frozen=True)
class JsonArguments:
    """How to print the result."""

    as_json: Json = False
    debug: Debug = False


@dataclass(frozen=True)
class OutputArguments(ProgressArguments):
    """Progress and errors, and how to print the result."""

    as_json: Json = False
    debug: Debug = False

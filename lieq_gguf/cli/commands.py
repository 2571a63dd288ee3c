"""The command line. Thin: every command reads its options, calls one function, and shows the result.

Heavy imports are inside the commands, so that ``--help`` answers at once. stdout is the result, stderr is progress.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lieq_gguf import __version__
from lieq_gguf.errors import LieqError, ScoringError
from lieq_gguf.formats.imatrix_file import save_importance

if TYPE_CHECKING:
    from rich.console import Console

    from lieq_gguf.allocation.allocate import Allocation, Pin
    from lieq_gguf.pipeline import CalibrationOptions, Planned
    from lieq_gguf.progress import Progress
    from lieq_gguf.quant_types import QuantType
    from lieq_gguf.records.bits import BitBudget
    from lieq_gguf.sources.source import Source, SourceOptions

app = typer.Typer(
    name="lieq-gguf",
    help="""Mixed-precision GGUF files for llama.cpp at the average bit width you ask for, never above it.

    Example: `lieq-gguf convert ./SmolLM2-135M --bits 4.5 -o smollm2.gguf`
    """,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False

MethodName = Literal["best", "block-error", "weighted-error", "lieq-ladder", "lieq", "lim", "zd"]
Granularity = Literal["layer", "tensor"]
ProfileName = Literal["cpu", "quality", "edge"]
RefineName = Literal["none", "feedback"]
PlanFormat = Literal["json", "tensor-type-file"]


def main() -> None:
    """Entry point: a LieqError is one line and exit code 1, wrong usage exit code 2, Ctrl-C 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    try:
        app()
    except LieqError as error:
        if _debug:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _set_debug(value: bool) -> None:
    global _debug
    _debug = value


def _finite(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


def _scorer_name(value: str | None) -> str | None:
    from lieq_gguf.scorers import scorers

    if value is not None and value not in scorers():
        raise typer.BadParameter(f"'{value}' is no scorer; the scorers are {', '.join(scorers())}")
    return value


def _n_threads(value: int) -> int:
    """0 stands for the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return value or cores


def _show_version(value: bool) -> None:
    if value:
        print(f"lieq-gguf {__version__}")
        raise typer.Exit


SourceName = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Model directory with config.json and safetensors, a model of the Hugging Face hub as owner/name, or a "
        "GGUF file in F16, BF16 or F32.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a model of the hub."),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="LoRA adapter (PEFT) to merge into the weights as they are read."),
]
AllowRequantize = Annotated[
    bool,
    typer.Option("--allow-requantize", help="Take a GGUF file that is quantised already; the errors of both add up."),
]
InitializerRange = Annotated[
    float | None,
    typer.Option(
        "--initializer-range",
        metavar="STD",
        help="That of config.json, for a GGUF file that does not tell: the untrained twin of the scores has it.",
        callback=_finite,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option("--bits", help="Average stored bits per decoder weight; never exceeded.", callback=_finite),
]
FileBits = Annotated[
    float | None,
    typer.Option("--file-bits", help="Average bits of the whole file per weight of the model.", callback=_finite),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="SIZE", help="Size of the whole file: 80MB, 0.4GiB, or bytes; never exceeded."),
]
ProfileOption = Annotated[
    ProfileName,
    typer.Option(
        "--profile",
        help="`cpu`: tokens as fast as from K types in a file of that size; `quality`: any type, however slow; "
        "`edge`: K and legacy types only.",
    ),
]
MinTokensPerSec = Annotated[
    float | None,
    typer.Option(
        "--min-tokens-per-sec", metavar="N", help="Keep to this predicted speed of generation.", callback=_finite
    ),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="REGEX=TYPE",
        help="Fix the type of the tensors whose name the expression is found in; counted in the budget. Repeatable.",
    ),
]
Nominal = Annotated[
    bool, typer.Option("--nominal", help="Count the digit in a type's name as the papers do, Q2_K as 2.")
]
Method = Annotated[
    MethodName,
    typer.Option(
        "--method",
        help="`best`: block error weighed with LieQ's energy gain, a type per tensor; `block-error`: without "
        "a layer score; `weighted-error`: by the error of the weights alone; `lieq-ladder`: a type per layer; `lieq`, "
        "`lim`, `zd`: the papers' two widths in the order of their score.",
    ),
]
Scorer = Annotated[
    str | None,
    typer.Option(
        "--scorer",
        metavar="NAME",
        callback=_scorer_name,
        help="Layer score that ranks or weighs the layers: lieq, lieq-qkv, energy-gain, lim, zd, block-error, "
        "perplexity-drop (costs a run without each layer), or one of another package.",
        show_default="the method's own; energy-gain for best",
    ),
]
GranularityOption = Annotated[
    Granularity | None,
    typer.Option(
        "--granularity",
        help="One type per layer or per tensor.",
        show_default="tensor for best and block-error, layer for the others",
    ),
]
Types = Annotated[
    str | None,
    typer.Option(
        "--types", metavar="A,B,…", help="Types on offer, for example Q2_K,Q3_K,Q4_K; +Q2_0 adds to the usual ones."
    ),
]
EmbeddingType = Annotated[str | None, typer.Option("--embedding-type", metavar="TYPE", help="Type of the embedding.")]
OutputType = Annotated[str | None, typer.Option("--output-type", metavar="TYPE", help="Type of the output matrix.")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="Text to calibrate on, instead of the shipped one.")
]
NTokens = Annotated[int, typer.Option("--n-tokens", min=16, help="Calibration tokens.")]
Imatrix = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix (GGUF) instead of a measured one.")
]
NoImatrix = Annotated[bool, typer.Option("--no-imatrix", help="Quantise without importance; no IQ1, IQ2, IQ3_XXS.")]
Scores = Annotated[
    Path | None, typer.Option("--scores", metavar="FILE", help="Scores kept by 'score -o' instead of measuring.")
]
Refine = Annotated[
    RefineName | None,
    typer.Option(
        "--refine",
        help="`feedback`: make the error of each column good in later ones, in a second pass; the same types and size, "
        "less divergence, twice the time. `none`: every block by itself, as llama-quantize.",
        show_default="feedback; none with --no-imatrix",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the untrained twin.")]
Threads = Annotated[
    int, typer.Option("--threads", "-t", min=0, help="Threads.", show_default="all cores", callback=_n_threads)
]
ThreadCounts = Annotated[
    str | None,
    typer.Option("--threads", "-t", metavar="N,…", help="Numbers of threads to run with.", show_default="all cores"),
]
Float32 = Annotated[
    bool, typer.Option("--float32", help="Multiply in float32 even where bfloat16 is fast; the same on every machine.")
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Measure anew, and keep nothing; else what a pass learns is used again.")
]
Device = Annotated[str, typer.Option("--device", help="Torch device of the forward pass: cpu, cuda, mps.")]
PreTokenizer = Annotated[
    str | None, typer.Option("--pre-tokenizer", metavar="NAME", help="llama.cpp's pre-tokenizer, if not recognised.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Traceback on errors.", callback=_set_debug, is_eager=True)]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


@app.command()
def convert(
    context: typer.Context,
    source: SourceName,
    revision: Revision = None,
    adapter: Adapter = None,
    bits: Bits = None,
    file_bits: FileBits = None,
    size: Size = None,
    nominal: Nominal = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write. [default: MODEL-BITSbpw.gguf]")
    ] = None,
    method: Method = "best",
    scorer: Scorer = None,
    granularity: GranularityOption = None,
    types: Types = None,
    profile: ProfileOption = "cpu",
    min_tokens_per_sec: MinTokensPerSec = None,
    pin: Pins = None,
    embedding_type: EmbeddingType = None,
    output_type: OutputType = None,
    calibration: CalibrationFile = None,
    n_tokens: NTokens = 16384,
    imatrix: Imatrix = None,
    no_imatrix: NoImatrix = False,
    scores: Scores = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Carry out a plan kept by 'plan -o'.")
    ] = None,
    refine: Refine = None,
    pre_tokenizer: PreTokenizer = None,
    allow_requantize: AllowRequantize = False,
    initializer_range: InitializerRange = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    float32: Float32 = False,
    no_cache: NoCache = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, write nothing.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model to one GGUF at an average bit width.

    Example: `lieq-gguf convert ./SmolLM2-135M --bits 4.5 -o smollm2.gguf`
    """
    del debug
    if sum(target is not None for target in (bits, file_bits, size, plan)) != 1:
        raise typer.BadParameter("give exactly one of --bits, --file-bits, --size and --plan", param_hint="--bits")
    if plan is not None:
        _refuse_given(context, _DECIDED_BY_PLAN, "the plan decides the types; leave this out, or make another plan")
    if imatrix is not None and (scores is not None or plan is not None):
        ignored = _ONLY_FOR_SCORES + (_ONLY_FOR_A_PASS if _is_written_plainly(refine, plan) else ())
        _refuse_given(context, ignored, "with these files nothing is measured; leave this out")
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output

    budget = _budget(bits, file_bits, size, nominal)
    allocation = _allocation(context.params)
    options = _calibration(context.params)
    progress = _progress(quiet)
    target = output or Path(_default_name(source, budget, plan))
    if not dry_run:
        check_output(target, force)  # before a download
    if dry_run:
        planned = pipeline.make_plan(
            _open(source, revision, progress, context.params), budget, allocation, options, progress,
            plan_file=plan, pre_tokenizer=pre_tokenizer, command_line=_command_line(), for_writing=False,
        )  # fmt: skip
        _show_plan(planned, as_json)
        return
    result = pipeline.convert(
        _directory(source, revision, progress), target, budget, allocation, options, progress,
        source_options=_source_options(context.params), plan_file=plan, pre_tokenizer=pre_tokenizer,
        command_line=_command_line(), force=force,
    )  # fmt: skip
    if as_json:
        _print_json(result.to_json())
        return
    _show_plan(result.planned, as_json=False)
    seconds = "  ".join(f"{stage} {s:.1f} s" for stage, s in result.planned.seconds.items())
    _stdout().print(f"{seconds}", style="dim", highlight=False)
    print(f"{target} written and verified")


@app.command()
def score(
    context: typer.Context,
    source: SourceName,
    revision: Revision = None,
    adapter: Adapter = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer",
            metavar="NAME",
            callback=_scorer_name,
            help="Score to show first and draw.",
            show_default="lieq; zd where llama.cpp runs the model",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure every score, and show how their orders agree (Spearman).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Keep scores and type errors as JSON.")
    ] = None,
    types: Types = None,
    allow_requantize: AllowRequantize = False,
    initializer_range: InitializerRange = None,
    calibration: CalibrationFile = None,
    n_tokens: NTokens = 16384,
    imatrix: Imatrix = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    float32: Float32 = False,
    no_cache: NoCache = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score the layers of a model: what training made compact must keep its bits.

    Example: `lieq-gguf score ./SmolLM2-135M -o scores.json`, then `convert --scores scores.json`
    """
    del debug
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output
    from lieq_gguf.scorers import NEEDS_REMOVAL

    if output is not None:
        check_output(output, force)
    options = _calibration(context.params | ({"scorer": NEEDS_REMOVAL} if compare else {}))
    offered, progress = _types("--types", types), _progress(quiet)
    model = _open(source, revision, progress, context.params)
    scorer = pipeline.shown_scorer(model, scorer)
    known = pipeline.learn(model, offered, options, progress)
    assert known.scores is not None
    if scorer not in known.scores.by_scorer:
        raise ScoringError(
            f"llama.cpp does not show what '{scorer}' needs of {model.spec.architecture}; take --scorer zd"
        )
    if output is not None:
        known.scores.save(output, scorer)
    if as_json:
        _print_json(known.scores.to_json(scorer))
    else:
        from lieq_gguf.cli.tables import agreement_table, score_table

        _stdout().print(score_table(known.scores, scorer))
        if compare:
            _stdout().print("", "Spearman correlation of the orders", agreement_table(known.scores), sep="\n")


@app.command()
def imatrix(
    context: typer.Context,
    source: SourceName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    revision: Revision = None,
    adapter: Adapter = None,
    allow_requantize: AllowRequantize = False,
    calibration: CalibrationFile = None,
    n_tokens: NTokens = 16384,
    threads: Threads = 0,
    device: Device = "cpu",
    float32: Float32 = False,
    no_cache: NoCache = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the importance matrix, in the file format of llama-imatrix.

    Example: `lieq-gguf imatrix ./SmolLM2-135M -o imatrix.gguf`
    """
    del debug
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output

    check_output(output, force)
    options, progress = _calibration(context.params), _progress(quiet)
    known = pipeline.learn(_open(source, revision, progress, context.params), (), options, progress, scores=False)
    assert known.importance is not None
    save_importance(known.importance, output)
    matrix = known.importance
    print(f"{output}: {len(matrix.in_sum2)} matrices, {matrix.n_tokens} tokens of {matrix.dataset}")


@app.command()
def plan(
    context: typer.Context,
    source: SourceName,
    revision: Revision = None,
    adapter: Adapter = None,
    bits: Bits = None,
    file_bits: FileBits = None,
    size: Size = None,
    nominal: Nominal = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Keep the plan as JSON for 'convert --plan'.")
    ] = None,
    format_: Annotated[
        PlanFormat,
        typer.Option("--format", help="`json`, or `tensor-type-file` for llama-quantize's option of that name."),
    ] = "json",
    method: Method = "best",
    scorer: Scorer = None,
    granularity: GranularityOption = None,
    types: Types = None,
    profile: ProfileOption = "cpu",
    min_tokens_per_sec: MinTokensPerSec = None,
    pin: Pins = None,
    embedding_type: EmbeddingType = None,
    output_type: OutputType = None,
    calibration: CalibrationFile = None,
    n_tokens: NTokens = 16384,
    imatrix: Imatrix = None,
    no_imatrix: NoImatrix = False,
    scores: Scores = None,
    refine: Refine = None,
    pre_tokenizer: PreTokenizer = None,
    allow_requantize: AllowRequantize = False,
    initializer_range: InitializerRange = None,
    seed: Seed = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    float32: Float32 = False,
    no_cache: NoCache = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose the types without writing a model.

    Example: `lieq-gguf plan ./SmolLM2-135M --bits 4.5 --scores scores.json -o plan.json`
    """
    del debug
    if sum(target is not None for target in (bits, file_bits, size)) != 1:
        raise typer.BadParameter("give exactly one of --bits, --file-bits and --size", param_hint="--bits")
    if format_ != "json" and as_json and output is None:
        raise typer.BadParameter("stdout is the recipe; give it a file with -o beside --json", param_hint="--json")
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output, replaced_when_complete

    if output is not None:
        check_output(output, force)
    budget, allocation = _budget(bits, file_bits, size, nominal), _allocation(context.params)
    options, progress = _calibration(context.params), _progress(quiet)
    planned = pipeline.make_plan(
        _open(source, revision, progress, context.params),
        budget,
        allocation,
        options,
        progress,
        pre_tokenizer=pre_tokenizer,
        command_line=_command_line(),
        for_writing=False,
    )
    if format_ == "tensor-type-file":
        lines = planned.plan.tensor_type_lines(planned.spec)
        if output is None:
            print(lines, end="")
            return
        with replaced_when_complete(output) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    elif output is not None:
        planned.plan.save(output, planned.header.meter.to_json())
    _show_plan(planned, as_json)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the types of a GGUF file, layer by layer, with the bit meter.

    Example: `lieq-gguf inspect smollm2.gguf`
    """
    del debug
    from lieq_gguf.evaluation import inspection

    report = inspection.inspect(file)
    if as_json:
        _print_json(report.to_json())
    else:
        from lieq_gguf.cli.tables import show_inspection

        show_inspection(report, _stdout())


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Plan to compare with.")] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every tensor back and run the file in llama.cpp.

    Example: `lieq-gguf verify smollm2.gguf --plan plan.json`
    """
    del debug
    from lieq_gguf.evaluation import health
    from lieq_gguf.formats.gguf_file import GgufFile
    from lieq_gguf.records.files import SCHEMA_VERSION
    from lieq_gguf.records.plan import QuantPlan
    from lieq_gguf.writing import verification

    types = None if plan is None else QuantPlan.load(plan).types
    n_weights = sum(t.spec.n_weights for t in GgufFile(file).tensors)
    with _progress(quiet).stage("verify", "Verifying", n_weights) as advance:
        result = verification.verify(file, types, n_threads=threads, advance=advance)
    spoken = health.check_file(file, threads)
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "file": str(file), "ok": True, **vars(result)}
        _print_json(document | {"health": spoken.to_json()})
    else:
        against = "" if plan is None else f", types as in {plan}"
        print(f"{file}: {result.n_tensors} tensors read back, all finite{against}; llama.cpp loads and runs it")
        print(f"{spoken.n_prompts} short continuations: {spoken.verdict}")


@app.command(name="eval")
def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="GGUF files.", show_default=False)],
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="REF",
            help="What to compare with: an F16 GGUF, a model directory, or a model of the hub.",
        ),
    ],
    revision: Revision = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to compare on; not the one calibration has seen.",
            show_default="a short one that comes along",
        ),
    ] = None,
    n_ctx: Annotated[int, typer.Option("--n-ctx", min=4, help="Tokens of a sequence; its second half counts.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Sequences to use.", show_default="all of the text")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="FILE",
            help="Multiple-choice questions to answer by likelihood, JSONL; `demo` for the set that comes along.",
        ),
    ] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far files are from their model: perplexity, KL divergence, same first choice, loops.

    Example: `lieq-gguf eval smollm2-4.5bpw.gguf --reference smollm2-f16.gguf --text wiki.test.raw --chunks 20`
    """
    del debug
    from lieq_gguf.cli.tables import evaluation_table
    from lieq_gguf.evaluation import divergence
    from lieq_gguf.evaluation.tasks import load_questions

    content = divergence.read_text(text)
    questions = () if tasks is None else load_questions(None if tasks == "demo" else Path(tasks))
    total = divergence.count_chunks(files[0], content, n_ctx, chunks) + len(questions)
    progress = _progress(quiet)
    path = _directory(reference, revision, progress)
    with progress.stage("eval", "Comparing", total) as advance:
        results = divergence.evaluate(files, path, content, n_ctx, chunks, threads, advance, questions)
    if as_json:
        documents = [r.to_json() for r in results]
        _print_json(documents[0] if len(documents) == 1 else documents)
    else:
        _stdout().print(evaluation_table(results))


@app.command()
def bench(
    context: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE…]", help="GGUF files.", show_default=False)
    ] = None,
    types: Annotated[
        bool,
        typer.Option(
            "--types",
            help="Measure what decoding costs by type on this machine, and keep it for plans; some minutes, no file.",
        ),
    ] = False,
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", min=1, help="Tokens of the prompt.")] = 512,
    n_generate: Annotated[int, typer.Option("--n-generate", "-n", min=1, help="Tokens generated.")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Counted runs.")] = 5,
    threads: ThreadCounts = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure speed and memory in llama.cpp, and estimate other devices from it.

    Example: `lieq-gguf bench smollm2-4.5bpw.gguf smollm2-5.5bpw.gguf`
    """
    del debug
    from lieq_gguf.cli.tables import bench_table, estimate_lines
    from lieq_gguf.evaluation import benchmark

    counts = _thread_counts(threads)
    if types:
        if files or len(counts) > 1:
            raise typer.BadParameter("takes no file and one number of threads", param_hint="--types")
        _refuse_given(context, ("n_prompt", "n_generate", "repetitions"), "--types has runs of its own; leave this out")
        _bench_types(counts[0], quiet, as_json)
        return
    if not files:
        raise typer.BadParameter("give a file, or --types to measure the tensor types", param_hint="FILE")
    with _progress(quiet).stage("bench", "Running", 2 * repetitions * len(files) * len(counts)) as advance:
        results = [r for f in files for r in benchmark.bench(f, n_prompt, n_generate, repetitions, counts, advance)]
    if as_json:
        _print_json([r.to_json() for r in results])
    else:
        _stdout().print(bench_table(results), "", *estimate_lines(results), sep="\n")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="What to say; read from stdin if left out.", show_default=False),
    ] = None,
    n_generate: Annotated[int, typer.Option("--n-generate", "-n", min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 = always the likeliest token.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text instead of using the chat template.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampler.")] = 0,
    threads: Threads = 0,
    debug: Debug = False,
) -> None:
    """Let a file answer a prompt, to see it alive.

    Example: `lieq-gguf run smollm2.gguf "What is a llama?"`
    """
    del debug
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
        prompt = sys.stdin.read()
    from lieq_gguf.evaluation import generation

    for piece in generation.stream(file, prompt, n_generate, temperature, raw, seed, threads):
        print(piece, end="", flush=True)
    print()


def _bench_types(n_threads: int, quiet: bool, as_json: bool) -> None:
    from lieq_gguf.cli.tables import costs_table
    from lieq_gguf.evaluation.bench_types import measure_decode_costs
    from lieq_gguf.quant_types import DEFAULT_LADDER, QUANT_TYPES

    types = (*DEFAULT_LADDER, QUANT_TYPES["Q2_0"])
    with _progress(quiet).stage("bench", "Running", len(types)) as advance:
        costs = measure_decode_costs(types, n_threads, advance)
    kept = costs.save()
    if as_json:
        _print_json(costs.to_json())
        return
    _stdout().print(costs_table(costs))
    print(f"kept in {kept}; plans for this machine use it from now on")


_WIDTH_WITHOUT_TERMINAL = 160  # a pipe or a file has no width; tables in it should not be folded

_DECIDED_BY_PLAN = (
    "nominal", "method", "scorer", "granularity", "types", "profile", "min_tokens_per_sec", "pin", "embedding_type",
    "output_type", "scores",
)  # fmt: skip


_ONLY_FOR_SCORES = ("seed", "no_cache")
_ONLY_FOR_A_PASS = ("calibration", "n_tokens", "device", "float32")  # also of the one that feedback makes


def _is_written_plainly(refine: str | None, plan_file: Path | None) -> bool:
    """Whether there is no second pass: asked for, or by the plan."""
    if refine is not None or plan_file is None:
        return refine == "none"
    from lieq_gguf.records.plan import QuantPlan

    return QuantPlan.load(plan_file).refine == "none"


def _refuse_given(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """An option that would be ignored is an error, not a surprise."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")


def _thread_counts(text: str | None) -> tuple[int, ...]:
    """Numbers of threads, separated by commas; all cores if none is given."""
    if text is None:
        return (_n_threads(0),)
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise typer.BadParameter(f"'{text}' are no numbers of threads; expected for example 1,2,4", param_hint="-t")
    return tuple(dict.fromkeys(counts))


def _budget(bits: float | None, file_bits: float | None, size: str | None, nominal: bool) -> BitBudget | None:
    from lieq_gguf.records.bits import BitBudget, parse_size

    if nominal and (file_bits is not None or size is not None):
        raise typer.BadParameter("goes with --bits: a file has no nominal size", param_hint="--nominal")
    if size is not None:
        try:
            return BitBudget("size", parse_size(size))
        except LieqError as error:
            raise typer.BadParameter(str(error), param_hint="--size") from None
    if file_bits is not None:
        return BitBudget("file-bits", file_bits)
    return None if bits is None else BitBudget("nominal" if nominal else "bits", bits)


def _allocation(given: Mapping[str, Any]) -> Allocation:
    """How to divide the bits, by the options of a command."""
    from lieq_gguf.allocation.allocate import Allocation
    from lieq_gguf.allocation.decode_costs import decode_costs

    def one_type(name: str) -> QuantType | None:
        return None if given[name] is None else _one_type(f"--{name.replace('_', '-')}", given[name])

    return Allocation(
        method=given["method"],
        scorer=given["scorer"],
        granularity=given["granularity"],
        types=_types("--types", given["types"]),
        embedding_type=one_type("embedding_type"),
        output_type=one_type("output_type"),
        pins=tuple(_pin(text) for text in given["pin"] or ()),
        profile=given["profile"],
        min_tokens_per_sec=given["min_tokens_per_sec"],
        costs=decode_costs(),
    )


def _pin(text: str) -> Pin:
    """A type fixed by hand, ``REGEX=TYPE``."""
    from lieq_gguf.allocation.allocate import Pin

    pattern, _, name = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(f"'{pattern}' is no regular expression ({error})", param_hint="--pin") from None
    if not pattern:
        raise typer.BadParameter(f"'{text}' is no pin; expected for example 'ffn_down=Q4_K'", param_hint="--pin")
    return Pin(pattern, _one_type("--pin", name))


def _one_type(option: str, name: str) -> QuantType:
    """A type by name; several are wrong usage."""
    found = _types(option, name)
    if len(found) > 1:
        raise typer.BadParameter(f"'{name}' are {len(found)} types; expected one", param_hint=option)
    return found[0]


def _types(option: str, names: str | None) -> tuple[QuantType, ...]:
    """Types by name, separated by commas, behind a plus beside the usual ones; a name that is none is wrong usage."""
    from lieq_gguf.quant_types import DEFAULT_LADDER, parse_types

    if names is None:
        return DEFAULT_LADDER
    usual = DEFAULT_LADDER if names.startswith("+") else ()
    try:
        return tuple(dict.fromkeys([*usual, *parse_types(names.removeprefix("+").split(","))]))
    except LieqError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _calibration(given: Mapping[str, Any]) -> CalibrationOptions:
    """How to learn about the model, by the options of a command; each command has some of them."""
    from lieq_gguf.pipeline import CalibrationOptions
    from lieq_gguf.scorers import NEEDS_REMOVAL

    no_imatrix = given.get("no_imatrix", False)
    if no_imatrix and given["imatrix"] is not None:
        raise typer.BadParameter("give --imatrix or --no-imatrix, not both", param_hint="--imatrix")
    return CalibrationOptions(
        text_file=given["calibration"],
        n_tokens=given["n_tokens"],
        imatrix_file=given.get("imatrix"),
        use_imatrix=not no_imatrix,
        scores_file=given.get("scores"),
        seed=given.get("seed", 0),
        n_threads=given["threads"],
        device=given["device"],
        in_float32=given["float32"],
        removal=given.get("scorer") == NEEDS_REMOVAL,
        use_cache=not given["no_cache"],
        refine=given.get("refine"),
    )


_TARGET_NAMES = {"bits": "bpw", "nominal": "-nominal", "file-bits": "bpw-file"}


def _directory(source: str, revision: str | None, progress: Progress) -> Path:
    """Where a source is, downloaded if it is the name of a model on the hub."""
    from lieq_gguf.sources.hub import fetch, is_hub_name

    if is_hub_name(source):
        return fetch(source, revision, progress)
    if revision is not None:
        raise typer.BadParameter(f"'{source}' is no model of the hub; leave this out", param_hint="--revision")
    return Path(source)


def _source_options(given: Mapping[str, Any]) -> SourceOptions:
    """How to take the model, by the options of a command; each command has some of them."""
    from lieq_gguf.sources.source import SourceOptions

    return SourceOptions(given["adapter"], given["allow_requantize"], given.get("initializer_range"))


def _open(source: str, revision: str | None, progress: Progress, given: Mapping[str, Any]) -> Source:
    from lieq_gguf.pipeline import open_with_warnings

    return open_with_warnings(_directory(source, revision, progress), progress, _source_options(given))


def _default_name(source: str, budget: BitBudget | None, plan_file: Path | None) -> str:
    from lieq_gguf.sources import model_name

    if budget is None:
        target = plan_file.stem if plan_file is not None else "gguf"
    elif budget.kind == "size":
        target = f"{budget.value / 1e6:g}MB"
    else:
        target = f"{budget.value:g}{_TARGET_NAMES[budget.kind]}"
    return f"{model_name(Path(source))}-{target}.gguf"


def _command_line() -> str:
    return shlex.join(["lieq-gguf", *sys.argv[1:]])


def _progress(quiet: bool) -> Progress:
    from lieq_gguf.progress import Progress

    return Progress(silent=quiet)


def _stdout() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1))


def _show_plan(planned: Planned, as_json: bool) -> None:
    if as_json:
        _print_json(planned.to_json())
        return
    from lieq_gguf.cli.tables import forecast_line, layer_map, meter_lines, outer_types

    out, made, tensors = _stdout(), planned.plan, planned.spec.tensors
    out.print(layer_map(tensors, made.types, made.layer_scores))
    out.print(outer_types(tensors, made.types))
    target = "" if made.budget.covers_file else f" (target {made.budget.value:g})"
    out.print(meter_lines(planned.header.meter, target))
    out.print(forecast_line(made.expected_kld, planned.tokens_per_sec, planned.costs))

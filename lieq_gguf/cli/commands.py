"""The command line. Thin: every command reads its options, calls one function, and shows the result.

Heavy imports are inside the commands, so that ``--help`` answers at once. stdout is the result, stderr is progress.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lieq_gguf import __version__
from lieq_gguf.cli import options
from lieq_gguf.cli.grouping import Given, grouped
from lieq_gguf.cli.old_spellings import with_new_spellings
from lieq_gguf.errors import LieqError
from lieq_gguf.request import ImatrixRequest, Request, ScoreRequest

if TYPE_CHECKING:
    from rich.console import Console

    from lieq_gguf.pipeline import PreparedFile

app = typer.Typer(
    name="lieq-gguf",
    help="""Mixed-precision GGUF files for llama.cpp at the average bit width you ask for, never above it.

    Example: `lieq-gguf convert ./SmolLM2-135M --bits 2.7 -o smollm2.gguf`
    """,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PlanFormat = Literal["json", "tensor-type-file"]


def main() -> None:
    """Entry point: a LieqError is one line and exit code 1, wrong usage exit code 2, Ctrl-C 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    try:
        app(args=with_new_spellings(sys.argv[1:]))
    except LieqError as error:
        if options.debug_is_on:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_version(value: bool) -> None:
    if value:
        print(f"lieq-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


@app.command()
@grouped
def convert(
    source: options.ScoredSourceArguments,
    target: options.TargetOrPlanArguments,
    writing: options.FileArguments,
    allocation: options.AllocationArguments,
    measuring: options.MeasuringArguments,
    compute: options.ComputeArguments,
    out: options.OutputArguments,
    given: Given,
) -> None:
    """Convert a model to one GGUF file at an average bit width.

    Example: `lieq-gguf convert ./SmolLM2-135M --bits 2.7 -o smollm2.gguf`
    """
    _refuse_ignored(given, target, writing, measuring)
    request = Request(
        source.source, target.target(), source.options(), allocation.options(), measuring.options(),
        writing.options(), compute.options(),
    )  # fmt: skip
    from lieq_gguf import pipeline

    if writing.dry_run:
        _show_plan(pipeline.plan(request, out.progress()), out.as_json)
        return
    result = pipeline.convert(request, out.progress())
    if out.as_json:
        _print_json(result.to_json())
        return
    _show_plan(result.prepared, as_json=False)
    seconds = "  ".join(f"{stage} {s:.1f} s" for stage, s in result.seconds.items())
    _stdout().print(f"{seconds}", style="dim", highlight=False)
    print(f"{result.output} written and verified")


@app.command()
@grouped
def score(
    source: options.ScoredSourceArguments,
    layer_score: Annotated[
        str | None,
        typer.Option(
            "--layer-score",
            metavar="NAME",
            callback=options.scorer_name,
            help="Score to show first and draw.",
            show_default="lieq; zd where llama.cpp runs the model",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure every score, and show how their orders agree (Spearman).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write scores and type errors as JSON.")
    ] = None,
    types: options.Types = None,
    force: options.Force = False,
    *,
    measuring: options.ScoringArguments,
    compute: options.ComputeArguments,
    out: options.OutputArguments,
) -> None:
    """Score the layers of a model: layers that training made compact must keep their bits.

    Example: `lieq-gguf score ./SmolLM2-135M -o scores.json`, then `convert --scores-file scores.json`
    """
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output

    if output is not None:
        check_output(output, force)
    request = ScoreRequest(
        source.source, source.options(), measuring.options(), compute.options(), options.types_named("--types", types),
        layer_score, measures_all=compare,
    )  # fmt: skip
    result = pipeline.score(request, out.progress())
    if output is not None:
        result.scores.save(output, result.scorer)
    if out.as_json:
        _print_json(result.scores.to_json(result.scorer))
        return
    from lieq_gguf.cli.tables import agreement_table, score_table

    _stdout().print(score_table(result.scores, result.scorer))
    if compare:
        _stdout().print("", "Spearman correlation of the orders", agreement_table(result.scores), sep="\n")


@app.command()
@grouped
def imatrix(
    source: options.SourceArguments,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    force: options.Force = False,
    *,
    measuring: options.CalibrationArguments,
    compute: options.ComputeArguments,
    out: options.QuietArguments,
) -> None:
    """Measure the importance matrix, in the file format of llama-imatrix.

    Example: `lieq-gguf imatrix ./SmolLM2-135M -o imatrix.gguf`
    """
    from lieq_gguf import pipeline
    from lieq_gguf.formats.imatrix_file import save_importance
    from lieq_gguf.records.files import check_output

    check_output(output, force)
    request = ImatrixRequest(source.source, source.options(), measuring.options(), compute.options())
    matrix = pipeline.imatrix(request, out.progress())
    save_importance(matrix, output)
    print(f"{output}: {len(matrix.in_sum2)} matrices, {matrix.n_tokens} tokens of {matrix.dataset}")


@app.command()
@grouped
def plan(
    source: options.ScoredSourceArguments,
    target: options.TargetArguments,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan as JSON for 'convert --plan'.")
    ] = None,
    format_: Annotated[
        PlanFormat,
        typer.Option("--format", help="`json`, or `tensor-type-file` for llama-quantize's option of that name."),
    ] = "json",
    force: options.Force = False,
    *,
    allocation: options.AllocationArguments,
    measuring: options.MeasuringArguments,
    writing: options.FeedbackArguments,
    compute: options.ComputeArguments,
    out: options.OutputArguments,
) -> None:
    """Choose the types without writing a model.

    Example: `lieq-gguf plan ./SmolLM2-135M --bits 2.7 --scores-file scores.json -o plan.json`
    """
    request = Request(
        source.source, target.budget(), source.options(), allocation.options(), measuring.options(),
        writing.options(), compute.options(),
    )  # fmt: skip
    if format_ != "json" and out.as_json and output is None:
        raise typer.BadParameter("stdout is the recipe; write it to a file with -o beside --json", param_hint="--json")
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output

    if output is not None:
        check_output(output, force)
    prepared = pipeline.plan(request, out.progress())
    if format_ == "tensor-type-file" and output is None:
        print(prepared.plan.tensor_type_lines(prepared.job.source.spec), end="")
        return
    if output is not None:
        _save_plan(prepared, output, format_)
    _show_plan(prepared, out.as_json)


@app.command()
@grouped
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    *,
    out: options.JsonArguments,
) -> None:
    """Show the types of a GGUF file, layer by layer, with the bit meter.

    Example: `lieq-gguf inspect smollm2.gguf`
    """
    from lieq_gguf.cli.tables import show_inspection
    from lieq_gguf.evaluation import inspection

    report = inspection.inspect(file)
    if out.as_json:
        _print_json(report.to_json())
    else:
        show_inspection(report, _stdout())


@app.command()
@grouped
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Plan to compare with.")] = None,
    threads: options.Threads = 0,
    *,
    out: options.OutputArguments,
) -> None:
    """Read every tensor back and run the file in llama.cpp.

    Example: `lieq-gguf verify smollm2.gguf --plan plan.json`
    """
    from lieq_gguf.evaluation import health
    from lieq_gguf.formats.gguf_file import GgufFile
    from lieq_gguf.records.files import SCHEMA_VERSION
    from lieq_gguf.records.plan import QuantPlan
    from lieq_gguf.writing import verification

    types = None if plan is None else QuantPlan.load(plan).types
    n_weights = sum(t.spec.n_weights for t in GgufFile(file).tensors)
    with out.progress().stage("verify", "Verifying", n_weights) as advance:
        result = verification.verify(file, types, n_threads=threads, advance=advance)
    answers = health.check_file(file, threads)
    if out.as_json:
        document = {"schema_version": SCHEMA_VERSION, "file": str(file), "ok": True, **vars(result)}
        _print_json(document | {"health": answers.to_json()})
    else:
        against = "" if plan is None else f", types as in {plan}"
        print(f"{file}: {result.n_tensors} tensors read back, all finite{against}; llama.cpp loads and runs it")
        print(f"{answers.n_prompts} short continuations: {answers.verdict}")


@app.command(name="eval")
@grouped
def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="GGUF files.", show_default=False)],
    comparison: options.ComparisonArguments,
    threads: options.Threads = 0,
    *,
    out: options.OutputArguments,
) -> None:
    """Measure how far files are from their model: perplexity, KL divergence, same first choice, loops.

    Example: `lieq-gguf eval smollm2-2.7bpw.gguf --reference smollm2-f16.gguf --text wiki.test.raw --chunks 20`
    """
    from lieq_gguf.cli.tables import evaluation_table
    from lieq_gguf.evaluation import divergence
    from lieq_gguf.evaluation.tasks import load_questions
    from lieq_gguf.sources import find_model

    text, n_ctx, chunks, tasks = comparison.text, comparison.n_ctx, comparison.chunks, comparison.tasks
    content = divergence.read_text(text)
    questions = () if tasks is None else load_questions(None if tasks == "demo" else Path(tasks))
    total = divergence.count_chunks(files[0], content, n_ctx, chunks) + len(questions)
    progress = out.progress()
    reference = find_model(comparison.reference, comparison.revision, progress)
    with progress.stage("eval", "Comparing", total) as advance:
        results = divergence.evaluate(files, reference, content, n_ctx, chunks, threads, advance, questions)
    if out.as_json:
        documents = [r.to_json() for r in results]
        _print_json(documents[0] if len(documents) == 1 else documents)
    else:
        _stdout().print(evaluation_table(results))


@app.command()
@grouped
def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE…]", help="GGUF files.", show_default=False)
    ] = None,
    types: Annotated[
        bool,
        typer.Option(
            "--types",
            help="Measure what decoding costs by type on this machine, and keep it for plans. Takes minutes, no file.",
        ),
    ] = False,
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", min=1, help="Tokens of the prompt.")] = 512,
    n_generate: Annotated[int, typer.Option("--n-generate", "-n", min=1, help="Tokens generated.")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Counted runs.")] = 5,
    threads: options.ThreadCounts = None,
    *,
    out: options.OutputArguments,
    given: Given,
) -> None:
    """Measure speed and memory in llama.cpp, and estimate other devices from it.

    Example: `lieq-gguf bench smollm2-2.7bpw.gguf smollm2-4.5bpw.gguf`
    """
    from lieq_gguf.cli.tables import bench_table, estimate_lines
    from lieq_gguf.evaluation import benchmark

    counts = options.thread_counts(threads)
    if types:
        _bench_types(files or (), counts, out, given)
        return
    if not files:
        raise typer.BadParameter("give a file, or --types to measure the tensor types", param_hint="FILE")
    with out.progress().stage("bench", "Running", 2 * repetitions * len(files) * len(counts)) as advance:
        results = [r for f in files for r in benchmark.bench(f, n_prompt, n_generate, repetitions, counts, advance)]
    if out.as_json:
        _print_json([r.to_json() for r in results])
    else:
        _stdout().print(bench_table(results), "", *estimate_lines(results), sep="\n")


@app.command()
@grouped
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
    threads: options.Threads = 0,
    debug: options.Debug = False,
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


def _bench_types(files: Sequence[Path], counts: Sequence[int], out: options.OutputArguments, given: Given) -> None:
    if files or len(counts) > 1:
        raise typer.BadParameter("takes no file and one number of threads", param_hint="--types")
    options.refuse_given(
        given, ("n_prompt", "n_generate", "repetitions"), "--types has runs of its own; leave this out"
    )
    from lieq_gguf.cli.tables import costs_table
    from lieq_gguf.evaluation.bench_types import measure_decode_costs
    from lieq_gguf.quant_types import DEFAULT_LADDER, QUANT_TYPES

    types = (*DEFAULT_LADDER, QUANT_TYPES["Q2_0"])
    with out.progress().stage("bench", "Running", len(types)) as advance:
        costs = measure_decode_costs(types, counts[0], advance)
    kept = costs.save()
    if out.as_json:
        _print_json(costs.to_json())
        return
    _stdout().print(costs_table(costs))
    print(f"kept in {kept}; plans for this machine use it from now on")


_WIDTH_WITHOUT_TERMINAL = 160  # a pipe or a file has no width; tables in it should not be folded

_DECIDED_BY_PLAN = (
    "nominal", "method", "layer_score", "granularity", "types", "profile", "min_tokens_per_sec", "pin",
    "embedding_type", "output_type", "scores_file",
)  # fmt: skip
_ONLY_FOR_SCORES = ("seed", "no_cache")
_ONLY_FOR_A_PASS = ("calibration", "n_tokens", "device", "float32")  # also of the one that feedback makes


def _refuse_ignored(
    given: Given,
    target: options.TargetOrPlanArguments,
    writing: options.FileArguments,
    measuring: options.MeasuringArguments,
) -> None:
    """Refuse options that a plan, or scores and importance from files, leave without effect."""
    if target.plan is not None:
        why = "the plan decides the types; leave this out, or make another plan"
        options.refuse_given(given, _DECIDED_BY_PLAN, why)
    if measuring.imatrix is not None and (measuring.scores_file is not None or target.plan is not None):
        has_pass = _has_feedback_pass(writing.error_feedback, target.plan)
        ignored = _ONLY_FOR_SCORES + (() if has_pass else _ONLY_FOR_A_PASS)
        options.refuse_given(given, ignored, "with these files nothing is measured; leave this out")


def _has_feedback_pass(error_feedback: bool | None, plan_file: Path | None) -> bool:
    if error_feedback is not None or plan_file is None:
        return error_feedback is not False
    from lieq_gguf.records.plan import QuantPlan

    return QuantPlan.load(plan_file).error_feedback


def _stdout() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1))


def _save_plan(prepared: PreparedFile, output: Path, format_: PlanFormat) -> None:
    from lieq_gguf.records.files import replaced_when_complete

    if format_ == "json":
        prepared.plan.save(output, prepared.header.meter.to_json())
        return
    with replaced_when_complete(output) as temporary:
        temporary.write_text(prepared.plan.tensor_type_lines(prepared.job.source.spec), encoding="utf-8")


def _show_plan(prepared: PreparedFile, as_json: bool) -> None:
    if as_json:
        _print_json(prepared.to_json())
        return
    from lieq_gguf.cli.tables import forecast_line, layer_map, meter_lines, outer_types

    out, made, tensors = _stdout(), prepared.plan, prepared.job.source.spec.tensors
    out.print(layer_map(tensors, made.types, made.layer_scores))
    out.print(outer_types(tensors, made.types))
    target = "" if made.budget.covers_file else f" (target {made.budget.value:g})"
    out.print(meter_lines(prepared.header.meter, target))
    out.print(forecast_line(made.expected_kld, prepared.tokens_per_sec, prepared.job.costs))

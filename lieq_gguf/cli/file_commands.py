"""Commands that take files: inspect, verify, eval, bench, run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lieq_gguf.cli import options
from lieq_gguf.cli.grouping import Given
from lieq_gguf.cli.output import print_json, stdout
from lieq_gguf.cli.parsing import refuse_given, revision_of, thread_counts

if TYPE_CHECKING:
    from lieq_gguf.writing.differences import Equality


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    *,
    out: options.JsonArguments,
) -> None:
    """Show the types of a GGUF file, layer by layer, with the bit meter.

    Example: `lieq-gguf inspect llama.gguf`
    """
    from lieq_gguf.cli.tables import show_inspection
    from lieq_gguf.evaluation import inspection

    report = inspection.inspect(file)
    if out.as_json:
        print_json(report.to_json())
    else:
        show_inspection(report, stdout())


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Plan to compare with.")] = None,
    threads: options.Threads = 0,
    *,
    of: options.ComparedSourceArguments,
    out: options.OutputArguments,
    given: Given,
) -> None:
    """Read every tensor back, run the file in llama.cpp, and compare it with its model.

    Example: `lieq-gguf verify llama.gguf --source ./Llama-3.2-1B`
    """
    from lieq_gguf.errors import VerificationError
    from lieq_gguf.evaluation import health
    from lieq_gguf.formats.gguf_file import GgufFile
    from lieq_gguf.job import open_model
    from lieq_gguf.pipeline import compare
    from lieq_gguf.records.files import SCHEMA_VERSION
    from lieq_gguf.records.options import ComputeOptions
    from lieq_gguf.records.plan import QuantPlan
    from lieq_gguf.sources.model_directory import ModelDirectory
    from lieq_gguf.writing import verification

    if of.source is None:
        refuse_given(given, ("revision", "adapter"), "says how to read a model; name the model with --source")
    progress = out.progress()
    types = None if plan is None else QuantPlan.load(plan).types
    content = GgufFile(file)
    model = None if of.source is None else open_model(of.source, of.options(), progress)
    if isinstance(model, ModelDirectory) and any(".nextn." in name for name in content.types):
        if not (model.has_mtp and model.family.keeps_mtp):
            raise VerificationError(
                f"{file} has a head for multi-token prediction, and {model.path} none that it can be compared with; "
                "compare a file without it"
            )
        model = ModelDirectory(model.path, of.adapter, keeps_mtp=True)
    n_weights = sum(t.spec.n_weights for t in content.tensors)
    with progress.stage("verify", "Verifying", n_weights) as advance:
        result = verification.verify(file, types, n_threads=threads, advance=advance)
    equality = None if model is None else compare(model, file, ComputeOptions(n_threads=threads), progress)
    answers = health.check_file(file, threads)
    if out.as_json:
        document = {"schema_version": SCHEMA_VERSION, "file": str(file), "ok": True, **vars(result)}
        compared = {} if equality is None else {"equality": equality.to_json()}
        print_json(document | compared | {"health": answers.to_json()})
    else:
        against = "" if plan is None else f", types as in {plan}"
        print(f"{file}: {result.n_tensors} tensors read back, all finite{against}; llama.cpp loads and runs it")
        if equality is not None:
            print(f"it is the model of {of.source}: {_how_equal(equality)}")
        print(f"{answers.n_prompts} short continuations: {answers.verdict}")


def _how_equal(equality: Equality) -> str:
    left_out = ", ".join(str(token_id) for token_id in equality.tokens_left_out)
    if not equality.layer_errors:  # llama.cpp's graph shows none
        return f"its logits are {equality.head_error:.2g} deviations off those of {equality.reference}, by rounding"
    return (
        f"from the same input, layers in llama.cpp are at most {max(equality.layer_errors):.1%} off those of "
        f"{equality.reference}, which rounding explains"
        + (f"; of several tokens before a text without a chat template, it leaves out {left_out}" if left_out else "")
    )


def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="GGUF files.", show_default=False)],
    comparison: options.ComparisonArguments,
    out: options.OutputArguments,
) -> None:
    """Measure how far files are from their model: perplexity, KL divergence, same top token, loops.

    Example: `lieq-gguf eval llama-2.7bpw.gguf --reference llama-f16.gguf --text wiki.test.raw --chunks 20`
    """
    from lieq_gguf.cli.tables import evaluation_table
    from lieq_gguf.evaluation import divergence
    from lieq_gguf.evaluation.tasks import load_questions
    from lieq_gguf.sources import find_model

    n_ctx, chunks, tasks = comparison.n_ctx, comparison.chunks, comparison.tasks
    revision = revision_of(comparison.reference, comparison.revision)
    content = divergence.read_text(comparison.text)
    questions = () if tasks is None else load_questions(None if tasks == "demo" else Path(tasks))
    total = divergence.count_chunks(files[0], content, n_ctx, chunks) + len(questions)
    progress = out.progress()
    reference = find_model(comparison.reference, revision, progress)
    comparing = divergence.ComparisonOptions(n_ctx, chunks, comparison.threads, questions)
    with progress.stage("eval", "Comparing", total) as advance:
        results = divergence.evaluate(files, reference, content, comparing, advance)
    if out.as_json:
        documents = [r.to_json() for r in results]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        stdout().print(evaluation_table(results))


def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE…]", help="GGUF files.", show_default=False)
    ] = None,
    types: Annotated[
        bool,
        typer.Option(
            "--types",
            help="Measure the decoding time of each type on this machine, and save it for plans. Takes minutes and no "
            "file.",
        ),
    ] = False,
    threads: options.ThreadCounts = None,
    *,
    runs: options.BenchArguments,
    out: options.OutputArguments,
    given: Given,
) -> None:
    """Measure speed and memory in llama.cpp, and estimate other devices from it.

    Example: `lieq-gguf bench llama-2.7bpw.gguf llama-4.5bpw.gguf`
    """
    from lieq_gguf.cli.tables import bench_table, estimate_lines
    from lieq_gguf.evaluation import benchmark

    counts = thread_counts(threads)
    if types:
        _bench_types(files or (), counts, out, given)
        return
    if not files:
        raise typer.BadParameter("give a file, or --types to measure the tensor types", param_hint="FILE")
    n_prompt, n_generate, repetitions = runs.n_prompt, runs.n_generate, runs.repetitions
    with out.progress().stage("bench", "Running", 2 * repetitions * len(files) * len(counts)) as advance:
        results = [r for f in files for r in benchmark.bench(f, n_prompt, n_generate, repetitions, counts, advance)]
    if out.as_json:
        print_json([r.to_json() for r in results])
    else:
        stdout().print(bench_table(results), "", *estimate_lines(results), sep="\n")


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="The prompt; read from stdin if left out.", show_default=False),
    ] = None,
    debug: options.Debug = False,
    *,
    answering: options.GenerationArguments,
) -> None:
    """Let a file answer a prompt, to see that it works.

    Example: `lieq-gguf run llama.gguf "What is a llama?"`
    """
    del debug
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
        prompt = sys.stdin.read()
    from lieq_gguf.evaluation import generation

    for piece in generation.stream(file, prompt, answering.options()):
        print(piece, end="", flush=True)
    print()


def _bench_types(files: Sequence[Path], counts: Sequence[int], out: options.OutputArguments, given: Given) -> None:
    if files or len(counts) > 1:
        raise typer.BadParameter("expected no file and one number of threads", param_hint="--types")
    refuse_given(given, ("n_prompt", "n_generate", "repetitions"), "has no effect with --types; leave this out")
    from lieq_gguf.allocation.decode_costs import place_to_save
    from lieq_gguf.cli.tables import costs_table
    from lieq_gguf.evaluation.bench_types import measure_decode_costs
    from lieq_gguf.quant_types import DEFAULT_LADDER, QUANT_TYPES

    place_to_save()  # refused now, not after minutes
    types = (*DEFAULT_LADDER, QUANT_TYPES["Q2_0"])
    with out.progress().stage("bench", "Running", len(types)) as advance:
        costs = measure_decode_costs(types, counts[0], advance)
    file = costs.save()
    if out.as_json:
        print_json(costs.to_json())
        return
    stdout().print(costs_table(costs))
    print(f"saved in {file}; plans on this machine will use it")

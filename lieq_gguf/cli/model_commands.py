"""Commands that take a model: convert, score, imatrix, plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lieq_gguf.cli import options
from lieq_gguf.cli.grouping import Given
from lieq_gguf.cli.output import print_json, stdout
from lieq_gguf.cli.parsing import refuse_given, types_named
from lieq_gguf.request import ImatrixRequest, Request, ScoreRequest

if TYPE_CHECKING:
    from lieq_gguf.pipeline import PreparedFile


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

    Example: `lieq-gguf convert ./Llama-3.2-1B --bits 2.7 -o llama.gguf`
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
        print_json(result.to_json())
        return
    _show_plan(result.prepared, as_json=False)
    seconds = "  ".join(f"{stage} {s:.1f} s" for stage, s in result.seconds.items())
    stdout().print(f"{seconds}", style="dim", highlight=False)
    print(f"{result.output} written and verified")


def score(
    source: options.ScoredSourceArguments,
    what: options.ScoreArguments,
    measuring: options.ScoringArguments,
    compute: options.ComputeArguments,
    out: options.OutputArguments,
) -> None:
    """Score the layers of a model: layers that training made compact must keep their bits.

    Example: `lieq-gguf score ./Llama-3.2-1B -o scores.json`, then `convert --scores-file scores.json`
    """
    from lieq_gguf import pipeline
    from lieq_gguf.cli.tables import agreement_table, score_table
    from lieq_gguf.records.files import check_output

    if what.output is not None:
        check_output(what.output, what.force)
    request = ScoreRequest(
        source.source, source.options(), measuring.options(), compute.options(), types_named("--types", what.types),
        what.layer_score, what.compare,
    )  # fmt: skip
    result = pipeline.score(request, out.progress())
    if what.output is not None:
        result.scores.save(what.output, result.scorer)
    if out.as_json:
        print_json(result.scores.to_json(result.scorer))
        return
    stdout().print(score_table(result.scores, result.scorer))
    if what.compare:
        stdout().print("", "Spearman correlation of the orders", agreement_table(result.scores), sep="\n")


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

    Example: `lieq-gguf imatrix ./Llama-3.2-1B -o imatrix.gguf`
    """
    from lieq_gguf import pipeline
    from lieq_gguf.formats.imatrix_file import save_importance
    from lieq_gguf.records.files import check_output

    check_output(output, force)
    request = ImatrixRequest(source.source, source.options(), measuring.options(), compute.options())
    matrix = pipeline.imatrix(request, out.progress())
    save_importance(matrix, output)
    print(f"{output}: {len(matrix.in_sum2)} matrices, {matrix.n_tokens} tokens of {matrix.dataset}")


def plan(
    source: options.ScoredSourceArguments,
    target: options.TargetArguments,
    file: options.PlanFileArguments,
    allocation: options.AllocationArguments,
    measuring: options.MeasuringArguments,
    writing: options.FeedbackArguments,
    compute: options.ComputeArguments,
    out: options.OutputArguments,
) -> None:
    """Choose the types without writing a model.

    Example: `lieq-gguf plan ./Llama-3.2-1B --bits 2.7 --scores-file scores.json -o plan.json`
    """
    request = Request(
        source.source, target.budget(), source.options(), allocation.options(), measuring.options(),
        writing.options(), compute.options(),
    )  # fmt: skip
    if file.format_ != "json" and out.as_json and file.output is None:
        raise typer.BadParameter(
            "both would print to stdout; write the tensor types to a file with -o", param_hint="--json"
        )
    from lieq_gguf import pipeline
    from lieq_gguf.records.files import check_output

    if file.output is not None:
        check_output(file.output, file.force)
    prepared = pipeline.plan(request, out.progress())
    if file.format_ == "tensor-type-file" and file.output is None:
        print(prepared.plan.tensor_type_lines(prepared.job.source.spec), end="")
        return
    if file.output is not None:
        _save_plan(prepared, file.output, file.format_)
    _show_plan(prepared, out.as_json)


_DECIDED_BY_PLAN = (
    "nominal", "method", "layer_score", "granularity", "types", "profile", "min_tokens_per_sec", "pin",
    "embedding_type", "output_type", "scores_file",
)  # fmt: skip
_ONLY_FOR_SCORES = ("seed", "no_cache")
_ONLY_FOR_A_PASS = ("calibration", "n_tokens", "device", "float32")  # also for the pass of error feedback


def _refuse_ignored(
    given: Given,
    target: options.TargetOrPlanArguments,
    writing: options.FileArguments,
    measuring: options.MeasuringArguments,
) -> None:
    """Refuse options that have no effect with a plan, or with scores and importance from files."""
    if target.plan is not None:
        why = "the plan decides the types; leave this out, or make another plan"
        refuse_given(given, _DECIDED_BY_PLAN, why)
    if measuring.imatrix is not None and (measuring.scores_file is not None or target.plan is not None):
        has_pass = writing.tune != "none" or _has_feedback_pass(writing.error_feedback, target.plan)
        ignored = _ONLY_FOR_SCORES + (() if has_pass else _ONLY_FOR_A_PASS)
        refuse_given(given, ignored, "nothing is measured with these files; leave this out")


def _has_feedback_pass(error_feedback: bool | None, plan_file: Path | None) -> bool:
    if error_feedback is not None or plan_file is None:
        return error_feedback is not False
    from lieq_gguf.records.plan import QuantPlan

    return QuantPlan.load(plan_file).error_feedback


def _save_plan(prepared: PreparedFile, output: Path, format_: options.PlanFormat) -> None:
    from lieq_gguf.records.files import replaced_when_complete

    if format_ == "json":
        prepared.plan.save(output, prepared.header.meter.to_json())
        return
    with replaced_when_complete(output) as temporary:
        temporary.write_text(prepared.plan.tensor_type_lines(prepared.job.source.spec), encoding="utf-8")


def _show_plan(prepared: PreparedFile, as_json: bool) -> None:
    if as_json:
        print_json(prepared.to_json())
        return
    from lieq_gguf.cli.tables import layer_map, meter_lines, outer_types, prediction_line

    out, chosen, tensors = stdout(), prepared.plan, prepared.job.source.spec.tensors
    out.print(layer_map(tensors, chosen.types, chosen.layer_scores))
    out.print(outer_types(tensors, chosen.types))
    target = "" if chosen.budget.covers_file else f" (target {chosen.budget.value:g})"
    out.print(meter_lines(prepared.header.meter, target))
    out.print(prediction_line(chosen.expected_kld, prepared.tokens_per_sec, prepared.job.costs))

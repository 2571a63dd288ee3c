"""Chooses a type for every tensor, so that the target is met and never exceeded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import Group, Problem
from lieq_gguf.allocation.time_limit import check_speed
from lieq_gguf.allocation.way_out import way_out
from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.records.plan import QuantPlan, quantizes_layers
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec

_LONGER_COMMAND_LINE = 64  # bytes


def check_reachable(problem: Problem) -> None:
    """Refuse a target that cannot be met. Needs only headers, so it comes before any work.

    Raises:
        BudgetError: if the target is outside the range of the types, naming the range and what would widen it; if the
            method has no two widths for it; or if no choice is fast enough.
    """
    options = problem.options
    if not problem.is_within_range:
        raise BudgetError(
            f"{problem.budget} is out of reach: {problem.spec.name} can have {_shown_range(problem)}; "
            f"{way_out(problem)}"
        )
    method = METHODS[options.method]
    method.check(problem)
    if options.min_tokens_per_sec is not None and not method.considers_speed:
        raise BudgetError(f"--method {options.method} does not consider speed; leave out --min-tokens-per-sec")
    check_speed(problem)


def allocate(problem: Problem, scores: LayerScores | None) -> QuantPlan:
    """Give every tensor a type; the result never exceeds the target.

    Args:
        problem: The choices and limits.
        scores: Layer scores and type errors of this model; None if there is a single choice.

    Raises:
        BudgetError: if the target is out of reach.
        FormatError: if the scores lack a type or the scorer.
    """
    check_reachable(problem)
    spec, options = problem.spec, problem.options
    if scores is not None and problem.error_feedback:
        scores = scores.with_feedback(spec)
    if scores is None:
        chosen = tuple(g.choices[0] for g in problem.groups)
    else:
        _check_scores(scores, problem.groups, problem.scorer)
        chosen = METHODS[options.method].solve(problem, scores)
    types = problem.types(chosen)
    return QuantPlan(
        model=spec.name,
        method=options.method,
        scorer=problem.scorer if scores is not None else "none",
        budget=problem.budget,
        reachable_bpw=problem.layer_bpw_range,
        types=types,
        layer_scores=tuple(scores.by_scorer[problem.scorer]) if scores is not None else (),
        profile=options.profile if METHODS[options.method].considers_speed else "quality",
        error_feedback=problem.error_feedback and quantizes_layers(types, spec),
        expected_kld=None if scores is None else expected_kld(spec, types, scores),
    )


def expected_kld(spec: ModelSpec, types: Mapping[str, str], scores: LayerScores) -> float | None:
    """Divergence of the logits in nats, predicted from the block errors of all matrices; None if one is missing."""
    matrices = [t.name for t in spec.tensors if t.is_matrix]
    are_measured = all(types[n] in scores.type_errors.get(n, {}) and n in scores.sensitivities for n in matrices)
    if scores.kld_per_block_error is None or not are_measured:
        return None
    total = sum(scores.sensitivities[name] * scores.type_errors[name][types[name]] for name in matrices)
    return scores.kld_per_block_error * total


def _shown_range(problem: Problem) -> str:
    """The range, rounded inwards, so that the printed limits can be reached.

    A file keeps the command line, which is longer with another target.
    """
    (low, high), kind = problem.range(), problem.budget.kind
    if problem.budget.covers_file:
        low = problem.amount(problem.least + 8 * _LONGER_COMMAND_LINE)
    if kind == "size":
        limits, unit = (f"{math.ceil(low):,}", f"{math.floor(high):,}"), "bytes"
    else:
        limits = f"{math.ceil(low * 1e4 - 1e-6) / 1e4:.4f}", f"{math.floor(high * 1e4 + 1e-6) / 1e4:.4f}"
        unit = "bits of file per weight" if kind == "file-bits" else "bits per weight"
    return f"only {limits[0]} {unit}" if low >= high else f"{' to '.join(limits)} {unit}"


def _check_scores(scores: LayerScores, groups: Sequence[Group], scorer: str) -> None:
    if scorer not in scores.by_scorer:
        raise FormatError(
            f"the scores have no '{scorer}'; they have {', '.join(scores.by_scorer)}: "
            "name one of these with --layer-score"
        )
    for group in groups:
        for tensor in group.tensors:
            errors = scores.type_errors.get(tensor.name, {})
            missing = [q.name for q in group.choices if q.name not in errors]
            if not errors:
                raise FormatError(
                    f"the scores were made by an older version and have no errors of {tensor.name}; score again"
                )
            if missing:
                names = [*errors, *missing]
                raise FormatError(
                    f"the scores have no errors for {missing[0]}; score again with --types {','.join(names)}, "
                    "or leave those types out here"
                )

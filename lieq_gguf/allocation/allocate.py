"""Chooses a type for every tensor, so that the target is met and never exceeded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import Group, Problem
from lieq_gguf.allocation.time_limit import check_speed
from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.plan import QuantPlan, quantizes_layers
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec


def check_reachable(problem: Problem) -> None:
    """Refuse a target that cannot be met. Needs only headers, so it comes before any work.

    Raises:
        BudgetError: if the target is outside the range of the types, naming the range and what would widen it; if the
            method has no two widths for it; or if no choice is fast enough.
    """
    budget, options = problem.budget, problem.options
    low, high = problem.range()
    # A target above the largest type is a mistake of the user; the factor allows for rounding of the decimal.
    if problem.least > problem.limit or budget.value > high * 1.0001:
        raise BudgetError(
            f"{budget} is out of reach: {problem.spec.name} can have {_shown_range(budget, low, high)}; "
            f"{_advice(problem, low)}"
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


def _shown_range(budget: BitBudget, low: float, high: float) -> str:
    """The range, rounded inwards, so that the printed limits can be reached."""
    if budget.kind == "size":
        return f"{math.ceil(low):,} to {math.floor(high):,} bytes"
    unit = "bits of file per weight" if budget.kind == "file-bits" else "bits per weight"
    return f"{math.ceil(low * 1e4 - 1e-6) / 1e4:.4f} to {math.floor(high * 1e4 + 1e-6) / 1e4:.4f} {unit}"


def _advice(problem: Problem, low: float) -> str:
    """Why a target is outside the range, and what would widen the range."""
    budget, options, spec = problem.budget, problem.options, problem.spec
    is_small = budget.value < low
    hints = []
    if budget.covers_file and is_small:
        outer = [t for t in spec.outer_matrices if t.name in problem.fixed]
        share = sum(t.n_weights for t in spec.outer_matrices) / spec.n_weights
        names = ", ".join(dict.fromkeys(problem.fixed[t.name].name for t in outer))
        given = f", in {names}: --embedding-type and --output-type can be smaller" if outer else ""
        hints.append(f"embedding and output are {share:.0%} of the weights{given}")
    n_pinned = sum(t.name in problem.fixed for layer in spec.layer_matrices for t in layer)
    if n_pinned:
        hints.append(f"{n_pinned} matrices of the layers are pinned")
    if is_small and options.profile == "edge":
        hints.append("--profile quality or cpu has smaller types")
    widths = sorted({t.shape[-1] for g in problem.groups for t in g.tensors if t.shape[-1] % 256})
    if is_small and widths:
        rows = " and ".join(str(w) for w in widths)
        hints.append(f"rows of {rows} weights do not fit the 256-weight blocks of the smaller types")
        fitting = [q for q in QUANT_TYPES.values() if all(q.fits(width) for width in widths)]
        smallest = min(fitting, key=lambda q: q.bits_per_weight)
        if problem.granularity == "layer":
            hints[-1] += "; --granularity tensor uses those where they fit"
        elif smallest not in problem.offered_types:
            hints[-1] += f"; --types +{smallest.name} allows a type of {smallest.bits_per_weight:g} bits that fits them"
        return "; ".join(hints)

    def bits(quant_type: QuantType) -> float:
        return quant_type.nominal_bits if budget.kind == "nominal" else quant_type.bits_per_weight

    others = sorted((q for q in QUANT_TYPES.values() if q not in problem.offered_types), key=bits)
    offered = [bits(q) for q in problem.offered_types]
    if is_small:
        nearest = [q for q in reversed(others) if bits(q) < min(offered)]
    else:
        nearest = [q for q in others if bits(q) > max(offered)]
    if budget.bits_per_weight is not None and not budget.covers_file:  # name a type that reaches the target
        reaching = [q for q in nearest if (bits(q) <= budget.value if is_small else bits(q) >= budget.value)]
        nearest = reaching
    if nearest and problem.groups and not (is_small and options.profile == "edge"):
        size = "smaller" if is_small else "larger"
        hints.append(f"--types allows {size} types, for example {nearest[0].name}")
    return "; ".join(hints or ["choose a target inside this range"])


def _check_scores(scores: LayerScores, groups: Sequence[Group], scorer: str) -> None:
    if scorer not in scores.by_scorer:
        raise FormatError(f"the scores have no '{scorer}'; they have {', '.join(scores.by_scorer)}")
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

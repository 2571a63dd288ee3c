"""One type for every tensor, so that the target is met and never exceeded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import Allocation, Group, Pin, Problem, offered_types, pose
from lieq_gguf.allocation.time_limit import check_speed
from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec

__all__ = [
    "METHODS",
    "Allocation",
    "Pin",
    "allocate",
    "check_reachable",
    "is_decided",
    "make_problem",
    "offered_types",
    "scorer_of",
]


def scorer_of(allocation: Allocation) -> str:
    """Name of the layer score: the one asked for, or the one the method is made for."""
    return allocation.scorer or METHODS[allocation.method].scorer


def make_problem(spec: ModelSpec, budget: BitBudget, allocation: Allocation, header_bytes: int = 0) -> Problem:
    """The problem as the method sees it; arguments as for ``allocate``.

    Raises:
        BudgetError: if no type fits a group, or a type asked for does not fit.
    """
    method = METHODS[allocation.method]
    return pose(
        spec,
        budget,
        allocation,
        header_bytes,
        scorer=scorer_of(allocation),
        by_layer=(allocation.granularity or method.granularity) == "layer",
        weighs_outer=method.weighs_outer,
    )


def check_reachable(
    spec: ModelSpec, budget: BitBudget, allocation: Allocation, header_bytes: int = 0
) -> tuple[float, float]:
    """The least and largest average in stored bits that the types reach, and whether the target can be met at all.

    Headers are enough to know, so this comes before any work.

    Raises:
        BudgetError: if the target is outside, with the range and what would widen it; if the method has no two
            widths for it; or if a tensor cannot have the type asked for.
    """
    problem = make_problem(spec, budget, allocation, header_bytes)
    low, high = problem.range()
    # A target above the largest type is a mistake, not a wish for a smaller file; allow for rounding of the decimal.
    if problem.least > problem.limit or budget.value > high * 1.0001:
        raise BudgetError(
            f"{budget} is out of reach: {spec.name} can have {_shown_range(budget, low, high)}; {_advice(problem, low)}"
        )
    method = METHODS[allocation.method]
    method.check(problem)
    if allocation.min_tokens_per_sec is not None and not method.minds_speed:
        raise BudgetError(f"--method {allocation.method} takes no account of speed; leave out --min-tokens-per-sec")
    check_speed(problem)
    return make_problem(spec, BitBudget("bits", 1.0), allocation).range()


def is_decided(spec: ModelSpec, allocation: Allocation, budget: BitBudget) -> bool:
    """Whether the types on offer leave no choice, so that no score is needed."""
    return all(len(g.choices) == 1 for g in make_problem(spec, budget, allocation).groups)


def allocate(
    spec: ModelSpec, budget: BitBudget, scores: LayerScores | None, allocation: Allocation, header_bytes: int = 0
) -> QuantPlan:
    """Give every tensor a type.

    Args:
        spec: The model.
        budget: The target; met from below.
        scores: Layer scores and type errors of this model; None if the types leave no choice.
        allocation: Method and choices.
        header_bytes: What comes before the first tensor of the file.

    Raises:
        BudgetError: if the target is out of reach.
        FormatError: if the scores lack a type or the scorer.
    """
    reachable = check_reachable(spec, budget, allocation, header_bytes)
    problem = make_problem(spec, budget, allocation, header_bytes)
    if scores is None:
        chosen = tuple(g.choices[0] for g in problem.groups)
    else:
        _check_scores(scores, problem.groups, problem.scorer)
        chosen = METHODS[allocation.method].solve(problem, scores)
    types = problem.types(chosen)
    return QuantPlan(
        model=spec.name,
        method=allocation.method,
        scorer=problem.scorer if scores is not None else "none",
        budget=budget,
        reachable_bpw=reachable,
        types=types,
        layer_scores=tuple(scores.by_scorer[problem.scorer]) if scores is not None else (),
        profile=allocation.profile if METHODS[allocation.method].minds_speed else "quality",
        expected_kld=None if scores is None else expected_kld(spec, types, scores),
    )


def expected_kld(spec: ModelSpec, types: Mapping[str, str], scores: LayerScores) -> float | None:
    """Divergence of the logits in nats: what the block errors of all matrices come to; None if they are not known."""
    matrices = [t.name for t in spec.tensors if t.is_matrix]
    known = all(types[n] in scores.type_errors.get(n, {}) and n in scores.sensitivities for n in matrices)
    if scores.kld_per_block_error is None or not known:
        return None
    total = sum(scores.sensitivities[name] * scores.type_errors[name][types[name]] for name in matrices)
    return scores.kld_per_block_error * total


def _shown_range(budget: BitBudget, low: float, high: float) -> str:
    """The range, rounded inwards, so that what is printed can be had."""
    if budget.kind == "size":
        return f"{math.ceil(low):,} to {math.floor(high):,} bytes"
    unit = "bits of file per weight" if budget.kind == "file-bits" else "bits per weight"
    return f"{math.ceil(low * 1e4 - 1e-6) / 1e4:.4f} to {math.floor(high * 1e4 + 1e-6) / 1e4:.4f} {unit}"


def _advice(problem: Problem, low: float) -> str:
    """What pushes the range away from a target outside of it, and what would widen it."""
    budget, allocation, spec = problem.budget, problem.allocation, problem.spec
    is_small = budget.value < low
    parts = []
    if budget.covers_file and is_small:
        outer = [t for t in spec.other_matrices if t.name in problem.fixed]
        share = sum(t.n_weights for t in spec.other_matrices) / spec.n_weights
        names = ", ".join(dict.fromkeys(problem.fixed[t.name].name for t in outer))
        given = f", in {names}: --embedding-type and --output-type can be smaller" if outer else ""
        parts.append(f"embedding and output are {share:.0%} of the weights{given}")
    n_pinned = sum(t.name in problem.fixed for layer in spec.layer_matrices for t in layer)
    if n_pinned:
        parts.append(f"{n_pinned} matrices of the layers are pinned")
    if is_small and allocation.profile == "edge":
        parts.append("--profile quality or cpu has smaller types")
    widths = sorted({t.shape[-1] for g in problem.groups for t in g.tensors if t.shape[-1] % 256})
    if is_small and widths:
        rows = " and ".join(str(w) for w in widths)
        parts.append(f"rows of {rows} weights do not fit the 256-weight blocks of the smaller types")
        fitting = [q for q in QUANT_TYPES.values() if all(q.fits(width) for width in widths)]
        smallest = min(fitting, key=lambda q: q.bits_per_weight)
        if (allocation.granularity or METHODS[allocation.method].granularity) == "layer":
            parts[-1] += "; --granularity tensor uses those where they fit"
        elif smallest not in allocation.types:
            parts[-1] += f"; --types +{smallest.name} allows one of {smallest.bits_per_weight:g} bits that they fit"
        return "; ".join(parts)

    def bits(quant_type: QuantType) -> float:
        return quant_type.nominal_bits if budget.kind == "nominal" else quant_type.bits_per_weight

    others = sorted((q for q in QUANT_TYPES.values() if q not in allocation.types), key=bits)
    offered = [bits(q) for q in allocation.types]
    if is_small:
        nearest = [q for q in reversed(others) if bits(q) < min(offered)]
    else:
        nearest = [q for q in others if bits(q) > max(offered)]
    if budget.bits_per_weight is not None and not budget.covers_file:  # name one that does reach it
        reaching = [q for q in nearest if (bits(q) <= budget.value if is_small else bits(q) >= budget.value)]
        nearest = reaching
    if nearest and problem.groups and not (is_small and allocation.profile == "edge"):
        size = "smaller" if is_small else "larger"
        parts.append(f"{size} types can be allowed with --types, for example {nearest[0].name}")
    return "; ".join(parts or ["choose a target inside this range"])


def _check_scores(scores: LayerScores, groups: Sequence[Group], scorer: str) -> None:
    if scorer not in scores.by_scorer:
        raise FormatError(f"the scores have no '{scorer}'; they have {', '.join(scores.by_scorer)}")
    for group in groups:
        for tensor in group.tensors:
            known = scores.type_errors.get(tensor.name, {})
            missing = [q.name for q in group.choices if q.name not in known]
            if not known:
                raise FormatError(f"the scores have no errors of {tensor.name}, made by an older version; score again")
            if missing:
                kept = [*known, *missing]
                raise FormatError(
                    f"the scores have no errors for {missing[0]}; score again with --types {','.join(kept)}, "
                    "or leave those types out here"
                )

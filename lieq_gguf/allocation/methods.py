"""The named ways to divide bits, each with its own objective.

The full ladder is an exact problem (a multiple-choice knapsack): choose one type per group so that the sum of weight ×
error is least, the sum of bits stays within the budget, and the time per token within the profile's limit. The papers'
rule, two widths in the order of a layer score, is also available.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

from lieq_gguf.allocation.problem import Granularity, Group, Problem
from lieq_gguf.allocation.time_limit import least_damage, seconds_allowed
from lieq_gguf.errors import BudgetError
from lieq_gguf.quant_types import QuantType

if TYPE_CHECKING:
    from lieq_gguf.records.scores import LayerScores

Error: TypeAlias = "Callable[[Group, LayerScores, QuantType], float]"

_WIDTH_PAIRS = ((1, 2), (2, 4), (4, 8), (8, 16))


def two_levels(problem: Problem, scores: LayerScores) -> tuple[QuantType, ...]:
    """The paper's rule: the ``m`` highest-scored layers at the high width, the others at half of it.

    ``m`` is as large as possible. Several llama.cpp types have the same width; of all pairs that use at least 99 % of
    the budget, the one with the least weighted error wins.

    Source: LieQ, arXiv 2508.03332v2, allocation; order and move as in arXiv 2406.17415.
    """
    groups, budget, limit = problem.groups, problem.budget, problem.limit
    layer_scores = scores.by_scorer[problem.scorer]
    order = sorted(range(len(groups)), key=lambda i: (-layer_scores[groups[i].layer or 0], i))

    def assign(low: QuantType, high: QuantType) -> tuple[QuantType, ...]:
        left = limit - sum(g.cost(budget, low) for g in groups)
        result = [low] * len(groups)
        for i in order:
            left -= groups[i].cost(budget, high) - groups[i].cost(budget, low)
            if left < 0:
                break
            result[i] = high
        return tuple(result)

    def order_of_merit(plan: tuple[QuantType, ...]) -> tuple[bool, float]:
        used = sum(g.cost(budget, q) for g, q in zip(groups, plan, strict=True))
        return used < 0.99 * limit, sum(g.weighted_error(scores, q) for g, q in zip(groups, plan, strict=True))

    return min((assign(*pair) for pair in _level_pairs(problem)), key=order_of_merit)


def _level_pairs(problem: Problem) -> list[tuple[QuantType, QuantType]]:
    """Pairs of types, of a width and its double, that fit every group, the low one within the budget.

    If only two types fit every group, they are the pair, whatever their widths.
    """
    groups, budget = problem.groups, problem.budget
    if not groups:
        return []
    common = [q for q in groups[0].choices if all(q in g.choices for g in groups)]
    pairs = [
        (low, high)
        for low, high in product(common, common)
        if low.bits_per_weight < high.bits_per_weight
        and ((low.nominal_bits, high.nominal_bits) in _WIDTH_PAIRS or len(common) == 2)
        and sum(g.cost(budget, low) for g in groups) <= problem.limit
    ]
    if not pairs:
        names, two = ", ".join(q.name for q in common) or "none", _two_around(problem, common)
        raise BudgetError(
            f"{budget} cannot be met with two widths of one type per layer; types that fit all layers: {names}; "
            f"use --method best" + (f", or two of these: --types {','.join(q.name for q in two)}" if two else "")
        )
    return pairs


def _two_around(problem: Problem, types: Sequence[QuantType]) -> tuple[QuantType, ...]:
    """Two types, one of which is within the budget and the other, if possible, above it; empty if there are none."""
    ascending = sorted(types, key=lambda q: q.bits_per_weight)
    affordable = [sum(g.cost(problem.budget, q) for g in problem.groups) <= problem.limit for q in ascending]
    n_low = min(sum(affordable), len(ascending) - 1)
    return tuple(ascending[n_low - 1 : n_low + 1]) if n_low > 0 else ()


def full_ladder(
    problem: Problem, scores: LayerScores, *, error: Error = Group.weighted_error, has_weights: bool = True
) -> tuple[QuantType, ...]:
    """The choice of one type per group with the least ``Σ weight · error``, within size and time.

    The weight of a layer is one plus its score, scaled to [0, 1] over the model, so that the score decides between
    similar layers but cannot override the measured error. Without ``has_weights`` it is one. Embedding and output get
    the layers' mean weight.
    """
    weights = _layer_weights(scores.by_scorer[problem.scorer]) if has_weights else [1.0]
    mean = sum(weights) / len(weights)

    def damage(group: Group, quant_type: QuantType) -> float:
        weight = weights[group.layer] if has_weights and group.layer is not None else mean
        return weight * error(group, scores, quant_type)

    return least_damage(problem, damage, seconds_allowed(problem, damage))


def _layer_weights(layer_scores: Sequence[float]) -> list[float]:
    low, high = min(layer_scores), max(layer_scores)
    return [1.0 + ((s - low) / (high - low) if high > low else 0.0) for s in layer_scores]


@dataclass(frozen=True)
class Method:
    """A named way to divide bits.

    Attributes:
        summary: What it does, in one line.
        solve: Function from problem and scores to one type per group.
        granularity: Its default groups.
        scorer: Its default layer score. For ``best`` the winner of the table in docs/experiments.md.
        check: Raises BudgetError if a problem has no solution.
        weighs_outer: Whether it can choose the types of embedding and output; otherwise a rule does.
        considers_speed: Whether it obeys a limit on the time per token.
        needs_block_errors: Whether its objective is how far the output of a layer moves.
    """

    summary: str
    solve: Callable[[Problem, LayerScores], tuple[QuantType, ...]]
    granularity: Granularity
    scorer: str
    check: Callable[[Problem], object] = lambda _problem: None
    weighs_outer: bool = False
    considers_speed: bool = True
    needs_block_errors: bool = False


_BLOCK_ERROR = partial(full_ladder, error=Group.block_error)


def weighted_error(problem: Problem, scores: LayerScores) -> tuple[QuantType, ...]:
    """``full_ladder`` by the weighted error of the weights alone, unless the user names a score as weight."""
    return full_ladder(problem, scores, has_weights=problem.options.scorer is not None)


METHODS = {
    "best": Method(
        "a type per tensor by block error, weighted with LieQ's energy gain",
        _BLOCK_ERROR, "tensor", "energy-gain", weighs_outer=True, needs_block_errors=True,
    ),
    "block-error": Method(
        "the same without a layer score",
        partial(_BLOCK_ERROR, has_weights=False), "tensor", "block-error", weighs_outer=True, needs_block_errors=True,
    ),
    "weighted-error": Method("a type per tensor by the error of the weights alone", weighted_error, "tensor", "zd"),
    "lieq-ladder": Method("a type per layer by error and LieQ's score", full_ladder, "layer", "lieq"),
    "lieq": Method("LieQ's two widths per layer", two_levels, "layer", "lieq", _level_pairs, considers_speed=False),
    "lim": Method("two widths in the order of LIM", two_levels, "layer", "lim", _level_pairs, considers_speed=False),
    "zd": Method("two widths in the order of ZD", two_levels, "layer", "zd", _level_pairs, considers_speed=False),
}  # fmt: skip

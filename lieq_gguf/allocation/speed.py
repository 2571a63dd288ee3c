"""How long a token may take: the second limit on the choice of types, since types differ in more than bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lieq_gguf.allocation.problem import Group, Problem
from lieq_gguf.decode_costs import DecodeCosts
from lieq_gguf.errors import BudgetError
from lieq_gguf.knapsack import Option, solve
from lieq_gguf.quant_types import F16, QUANT_TYPES, QuantType
from lieq_gguf.records.spec import TensorSpec

# K types, smallest first, each with what llama-quantize takes where its blocks do not fit
_K_TYPES = (("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q8_0",))
_OF_OUTPUT = ("Q6_K", "Q8_0")
_TIME_SLACK = 1.05  # where no K-type file is small enough, the fastest file that is may be slowed down by this much


def options(problem: Problem, damage: Callable[[Group, QuantType], float]) -> list[list[Option]]:
    """The choices of each group with their damage, bits and seconds."""
    return [
        [Option(damage(g, q), g.cost(problem.budget, q), problem.seconds(g, q)) for q in g.choices]
        for g in problem.groups
    ]


def seconds_allowed(problem: Problem) -> float:
    """Seconds of a token that the groups may take together; infinity if speed does not matter."""
    costs, allocation = problem.allocation.costs, problem.allocation
    if costs is None or (allocation.profile != "cpu" and allocation.min_tokens_per_sec is None):
        return float("inf")
    taken = costs.seconds(problem.spec.tensors, {name: q.name for name, q in problem.fixed.items()})
    if allocation.min_tokens_per_sec is not None:
        return 1 / allocation.min_tokens_per_sec - taken
    of_groups = problem.budget.limit(problem.spec, problem.header_bytes)
    allowed = _k_file_seconds(problem, costs, of_groups) - taken
    if not problem.groups:
        return allowed
    least = sum(problem.seconds(g, q) for g, q in zip(problem.groups, fastest(problem), strict=True))
    return max(allowed, _TIME_SLACK * least)


def _k_file_seconds(problem: Problem, costs: DecodeCosts, limit: int) -> float:
    """Seconds of a token with K types in a file of the size allowed: between files of one K type (or Q8_0) each.

    Infinite where the file may be larger than with Q8_0. As llama-quantize does, the output matrix is in Q6_K where the
    file is counted; otherwise in the type it has here.
    """
    spec, budget = problem.spec, problem.budget
    points = []
    for names in _K_TYPES:
        types = {t.name: _k_type(t, names).name for layer in spec.layer_matrices for t in layer}
        for tensor in spec.other_matrices:
            types[tensor.name] = (
                _k_type(tensor, _OF_OUTPUT).name if budget.covers_file else problem.fixed[tensor.name].name
            )
        size = sum(budget.cost(QUANT_TYPES[types[t.name]], t) for t in spec.tensors if t.name in types)
        points.append((size, costs.seconds(spec.tensors, types)))
    sizes, seconds = zip(*sorted(points), strict=True)
    return float(np.interp(limit, sizes, seconds, right=np.inf))


def _k_type(tensor: TensorSpec, names: tuple[str, ...]) -> QuantType:
    """The first type that fits."""
    return next((QUANT_TYPES[n] for n in names if QUANT_TYPES[n].fits(tensor.shape[1])), F16)


def fastest(problem: Problem) -> tuple[QuantType, ...]:
    """The types within the budget that decode fastest."""
    chosen = solve(options(problem, problem.seconds), problem.limit)
    return tuple(g.choices[k] for g, k in zip(problem.groups, chosen, strict=True))


def seconds(problem: Problem, chosen: Sequence[QuantType]) -> float:
    """Seconds of a token."""
    assert problem.allocation.costs is not None
    return problem.allocation.costs.seconds(problem.spec.tensors, problem.types(chosen))


def check_speed(problem: Problem) -> None:
    """Refuse a speed that no choice of types has.

    Raises:
        BudgetError: naming the speed that can be had.
    """
    wanted, costs = problem.allocation.min_tokens_per_sec, problem.allocation.costs
    if wanted is None:
        return
    if costs is None:
        raise BudgetError(f"--min-tokens-per-sec {wanted:g} needs decode costs; measure them with bench --types")
    least = seconds(problem, fastest(problem))
    if least > 1 / wanted:
        raise BudgetError(
            f"--min-tokens-per-sec {wanted:g} is out of reach with {problem.budget}: {problem.spec.name} can have "
            f"{1 / least:.1f} tokens/s ({costs.machine}); a smaller budget is faster"
        )

"""The limit on the time per token, the second limit on the choice of types, which differ in more than bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from lieq_gguf.allocation.problem import PROFILES, Group, Problem
from lieq_gguf.errors import BudgetError
from lieq_gguf.quant_types import DEFAULT_LADDER, QuantType

if TYPE_CHECKING:
    from lieq_gguf.allocation.knapsack import Option

Damage: TypeAlias = Callable[[Group, QuantType], float]

_ABOVE_K = ("Q8_0", "F16")
_TIME_SLACK = 1.05  # if no file of K types is small enough: factor on the time of the fastest file that is


def least_damage(problem: Problem, damage: Damage, time_limit: float = math.inf) -> tuple[QuantType, ...]:
    """One type for each group with the least total damage, within the budget and a limit on seconds per token."""
    from lieq_gguf.allocation.knapsack import solve  # late, since numpy takes a while to load

    chosen = solve(options(problem, damage), problem.limit, time_limit)
    return tuple(g.choices[k] for g, k in zip(problem.groups, chosen, strict=True))


def options(problem: Problem, damage: Damage) -> list[list[Option]]:
    """The choices of each group with their damage, bits and seconds."""
    from lieq_gguf.allocation.knapsack import Option

    return [
        [Option(damage(g, q), g.cost(problem.budget, q), problem.seconds(g, q)) for q in g.choices]
        for g in problem.groups
    ]


def seconds_allowed(problem: Problem, damage: Damage) -> float:
    """Seconds per token that all groups together may take; infinity if speed does not matter.

    For the profile ``cpu``, the time of the best file of K types within the budget. So that file is always a possible
    choice, and any other choice has less damage and is no slower.
    """
    costs, min_tokens_per_sec = problem.costs, problem.options.min_tokens_per_sec
    if costs is None or not (PROFILES[problem.options.profile].limits_time or min_tokens_per_sec is not None):
        return math.inf
    if min_tokens_per_sec is not None:
        fixed = {name: q.name for name, q in problem.fixed.items()}
        return 1 / min_tokens_per_sec - costs.seconds(problem.spec.tensors, fixed)
    of_k_types = replace(problem, groups=tuple(replace(g, choices=_k_types(g)) for g in problem.groups))
    if of_k_types.least > problem.limit:  # no file of K types is that small
        return _TIME_SLACK * _of_groups(problem, fastest(problem))
    return _of_groups(of_k_types, least_damage(of_k_types, damage))


def _k_types(group: Group) -> tuple[QuantType, ...]:
    """The K types that a group can have, and above them Q8_0 and F16; legacy types if no K type fits."""
    usual = [q for q in group.choices if q in DEFAULT_LADDER]
    k_types = tuple(q for q in usual if q.family == "K" or q.name in _ABOVE_K)
    legacy = tuple(q for q in usual if q.family == "legacy" and q not in k_types)
    fits_k = any(q.family == "K" for q in k_types)
    return (k_types if fits_k else legacy + k_types) or group.choices


def _of_groups(problem: Problem, chosen: Sequence[QuantType]) -> float:
    """Seconds per token of the groups alone."""
    return sum(problem.seconds(g, q) for g, q in zip(problem.groups, chosen, strict=True))


def fastest(problem: Problem) -> tuple[QuantType, ...]:
    """The fastest types within the budget."""
    return least_damage(problem, problem.seconds)


def seconds(problem: Problem, chosen: Sequence[QuantType]) -> float:
    """Seconds per token of the whole model."""
    assert problem.costs is not None
    return problem.costs.seconds(problem.spec.tensors, problem.types(chosen))


def check_speed(problem: Problem) -> None:
    """Refuse a speed that no choice of types reaches.

    Raises:
        BudgetError: naming the speed that can be reached.
    """
    required, costs = problem.options.min_tokens_per_sec, problem.costs
    if required is None:
        return
    if costs is None:
        raise BudgetError(f"--min-tokens-per-sec {required:g} needs decode costs; measure them with bench --types")
    least = seconds(problem, fastest(problem))
    if least > 1 / required:
        most = math.floor(10 / least) / 10  # rounded down, so that it can be reached
        raise BudgetError(
            f"--min-tokens-per-sec {required:g} is out of reach with {problem.budget}: {problem.spec.name} can have "
            f"{most:.1f} tokens/s ({costs.machine}); name no more than that"
        )

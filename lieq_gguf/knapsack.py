"""The multiple-choice knapsack: one option per group, least damage, within a size and, if asked, a time.

Solved exactly, up to a gap, by HiGHS. Sizes are integers and the limit on them holds to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lieq_gguf.errors import BudgetError
from lieq_gguf.native_output import silenced_native_stdout

GAP = 1e-3
"""Share of the damage by which a solution may miss the best one; damages are known to some per cent."""

_SECONDS = 60.0


@dataclass(frozen=True)
class Option:
    """What a group may be given.

    Attributes:
        damage: What is to be least in sum.
        size: Bits.
        time: Anything, as long as the limit is in the same unit.
    """

    damage: float
    size: int
    time: float = 0.0


def solve(groups: Sequence[Sequence[Option]], size_limit: int, time_limit: float = np.inf) -> tuple[int, ...]:
    """The best option of each group, by index.

    Args:
        groups: Options of each group; at least one.
        size_limit: What the sizes may come to.
        time_limit: What the times may come to.

    Returns:
        An index into each group. The same for the same input.

    Raises:
        BudgetError: if no choice is within both limits, or none is found in a minute.
    """
    timed = bool(np.isfinite(time_limit))
    kept = [(i, k) for i, options in enumerate(groups) for k in _undominated(options, timed)]
    scale = max((groups[i][k].damage for i, k in kept), default=0.0)
    while True:
        chosen = _solve(groups, kept, size_limit, time_limit, max(scale, 1e-300))
        damage = sum(g[k].damage for g, k in zip(groups, chosen, strict=True))
        # HiGHS stops at 10⁻⁶ of the scale as well: where that is more than the gap, ask again on the scale of what was
        # found. An option that does more damage than the whole is no part of anything better.
        if damage >= 1e-6 / GAP * scale or damage == 0:
            return chosen
        scale = damage
        kept = [(i, k) for i, k in kept if groups[i][k].damage <= damage]


def _solve(
    groups: Sequence[Sequence[Option]],
    kept: Sequence[tuple[int, int]],
    size_limit: int,
    time_limit: float,
    scale: float,
) -> tuple[int, ...]:
    """The best of the options ``kept`` (group, index), with damages as multiples of ``scale``."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not groups:
        return ()
    sizes = np.array([groups[i][k].size for i, k in kept], dtype=np.int64)
    damage = np.array([groups[i][k].damage for i, k in kept])
    unit = max(1, int(np.gcd.reduce(sizes)))
    members = csr_array((np.ones(len(kept)), ([i for i, _ in kept], range(len(kept)))), shape=(len(groups), len(kept)))
    constraints = [
        LinearConstraint(members, 1, 1),
        LinearConstraint((sizes // unit)[None, :].astype(float), -np.inf, size_limit // unit),
    ]
    times = np.array([groups[i][k].time for i, k in kept])
    if np.isfinite(time_limit) and times.any():
        slowest = times.max()
        constraints.append(LinearConstraint(times[None, :] / slowest, -np.inf, time_limit / slowest))
    with silenced_native_stdout():  # HiGHS prints now and then, even when told to be silent
        solution = milp(
            damage / scale,
            integrality=np.ones(len(kept)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
        )
    if solution.status == 1:
        raise BudgetError(f"no plan was found in {_SECONDS:.0f} s; offer fewer types, or choose --granularity layer")
    if solution.x is None:
        raise BudgetError(f"no choice of types is within the limits: {solution.message}")
    chosen = [pair for pair, x in zip(kept, solution.x, strict=True) if x > 0.5]
    if [i for i, _ in chosen] != list(range(len(groups))) or sum(groups[i][k].size for i, k in chosen) > size_limit:
        raise BudgetError(f"the solver broke the limits ({solution.message}); please report this")
    return tuple(k for _, k in chosen)


def _undominated(options: Sequence[Option], timed: bool) -> list[int]:
    """Indices of the options that no other beats in everything; of equals, the first."""

    def key(option: Option) -> tuple[float, ...]:
        return (option.size, option.damage, option.time) if timed else (option.size, option.damage)

    kept: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (key(options[k]), k)):
        if not any(all(a <= b for a, b in zip(key(options[j]), key(options[k]), strict=True)) for j in kept):
            kept.append(k)
    return kept

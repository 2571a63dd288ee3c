"""Plain ways to the knapsack that the exact solver is held against: greedy, by a price on size, one integer program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lieq_gguf.allocation import knapsack
from lieq_gguf.allocation.knapsack import GAP, Option

Groups = Sequence[Sequence[Option]]


def totals(groups: Groups, chosen: Sequence[int]) -> tuple[float, int, float]:
    """Damage, size and time of a choice."""
    options = [g[k] for g, k in zip(groups, chosen, strict=True)]
    return sum(o.damage for o in options), sum(o.size for o in options), sum(o.time for o in options)


def greedy(groups: Groups, limit: int) -> tuple[int, ...]:
    """Smallest options first, then the step that saves most damage per bit, as long as one fits."""
    chosen = [min(range(len(g)), key=lambda k: (g[k].size, g[k].damage)) for g in groups]
    left = limit - totals(groups, chosen)[1]
    while True:
        steps = [
            ((g[chosen[i]].damage - o.damage) / max(o.size - g[chosen[i]].size, 1e-9), i, k)
            for i, g in enumerate(groups)
            for k, o in enumerate(g)
            if o.size - g[chosen[i]].size <= left and o.damage < g[chosen[i]].damage
        ]
        if not steps:
            return tuple(chosen)
        _, i, k = max(steps)
        left -= groups[i][k].size - groups[i][chosen[i]].size
        chosen[i] = k


def lagrangian(groups: Groups, limit: int) -> tuple[int, ...]:
    """Least damage plus price times size in each group; the lowest price that fits, by bisection."""

    def at(price: float) -> tuple[int, ...]:
        return tuple(min(range(len(g)), key=lambda k: g[k].damage + price * g[k].size) for g in groups)

    low, high = 0.0, 1.0
    while totals(groups, at(high))[1] > limit:
        high *= 10
    for _ in range(100):
        price = (low + high) / 2
        low, high = (price, high) if totals(groups, at(price))[1] > limit else (low, price)
    return at(high)


def one_program(groups: Groups, limit: int, time_limit: float = np.inf) -> tuple[int, ...]:
    """All in one integer program to the same gap, without the relaxation that rules options out beforehand."""
    timed = bool(np.isfinite(time_limit))
    kept = [(i, k) for i, options in enumerate(groups) for k in knapsack._undominated(options, timed)]
    scale = max(groups[i][k].damage for i, k in kept)
    while True:  # as in knapsack.solve: HiGHS also stops at a millionth of the scale
        program = knapsack._program(groups, kept, limit, time_limit, scale)
        chosen = knapsack._checked(groups, program, knapsack._integers(program), limit)
        damage = totals(groups, chosen)[0]
        if damage >= 1e-6 / GAP * scale or damage == 0:
            return chosen
        scale = damage
        kept = [(i, k) for i, k in kept if groups[i][k].damage <= damage]

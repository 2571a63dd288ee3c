from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from support.plain_solvers import greedy, lagrangian, totals

from lieq_gguf.allocation.knapsack import GAP, Option, solve
from lieq_gguf.errors import BudgetError


def random_groups(seed: int, n_groups: int, n_options: int) -> list[list[Option]]:
    numbers = np.random.default_rng(seed)
    return [
        [
            Option(float(numbers.random()), int(numbers.integers(1, 50)), float(numbers.random()))
            for _ in range(n_options)
        ]
        for _ in range(n_groups)
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("timed", [False, True])
def test_as_good_as_trying_everything(seed: int, timed: bool) -> None:
    groups = random_groups(seed, 5, 5)
    time_limit = 2.5 if timed else np.inf
    every = [totals(groups, c) for c in product(range(5), repeat=5)]
    allowed = [damage for damage, size, time in every if size <= 100 and time <= time_limit]
    if not allowed:
        with pytest.raises(BudgetError):
            solve(groups, 100, time_limit)
        return
    damage, size, time = totals(groups, solve(groups, 100, time_limit))
    assert size <= 100
    assert time <= time_limit * (1 + 1e-6)
    assert damage <= min(allowed) * (1 + 2 * GAP) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_greedy_and_lagrangian(seed: int) -> None:
    groups = random_groups(seed, 60, 8)
    limit = 60 * 20
    best, size, _ = totals(groups, solve(groups, limit))
    assert size <= limit
    assert best <= totals(groups, greedy(groups, limit))[0] * (1 + 2 * GAP)
    assert best <= totals(groups, lagrangian(groups, limit))[0] * (1 + 2 * GAP)


@pytest.mark.parametrize("seed", range(5))
def test_small_damage_beside_options_of_large_damage_is_told_apart(seed: int) -> None:
    """With nearly enough room for the best of everything, what is left is far below the worst options."""
    groups = [
        [Option(o.damage * 1e-6, 30 + o.size, o.time) for o in g] + [Option(10.0, 1)]
        for g in random_groups(seed, 30, 6)
    ]
    limit = 30 * 55
    best = totals(groups, solve(groups, limit))[0]
    assert best < 1e-3
    assert best <= totals(groups, greedy(groups, limit))[0] * (1 + 2 * GAP)
    assert best <= totals(groups, lagrangian(groups, limit))[0] * (1 + 2 * GAP)


def test_same_input_same_choice_and_the_first_of_equals() -> None:
    groups = random_groups(0, 40, 6)
    assert solve(groups, 900) == solve(groups, 900)
    assert solve([[Option(1, 5), Option(1, 5)]] * 3, 15) == (0, 0, 0)


def test_no_choice_within_the_limits_is_refused() -> None:
    with pytest.raises(BudgetError, match="within the limits"):
        solve([[Option(1, 5)], [Option(1, 6)]], 10)
    with pytest.raises(BudgetError, match="within the limits"):
        solve([[Option(1, 5, 2.0)]], 10, 1.0)


def test_nothing_to_choose() -> None:
    assert solve([], 0) == ()

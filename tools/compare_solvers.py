#!/usr/bin/env python3
"""Compares the exact solver with plain ones on a real model, and with one integer program on large problems.

Usage: compare_solvers.py MODEL_DIR SCORES.json      SCORES of 'lieq-gguf score -o'
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from lieq_gguf.allocation.build import build_problem
from lieq_gguf.allocation.knapsack import Option, solve
from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.allocation.time_limit import options
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.sources.model_directory import ModelDirectory

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.plain_solvers import greedy, lagrangian, one_program, totals

N_LAYERS, N_MATRICES, N_TYPES = 80, 7, 14


def main() -> None:
    """Print the tables."""
    spec, scores = ModelDirectory(Path(sys.argv[1])).spec, LayerScores.load(Path(sys.argv[2]))
    low, high = build_problem(spec, BitBudget("file-bits", 4.0), AllocationOptions("block-error")).range()
    print("| bits of the file | exact | greedy | Lagrangian | exact, seconds |\n|---|---|---|---|---|")
    problems = large_problems()
    for share in (0.05, 0.1, 0.2, 0.3, 0.4):
        bits = round(low + share * (high - low), 3)
        problem = build_problem(spec, BitBudget("file-bits", bits), AllocationOptions("block-error"))
        groups = options(problem, lambda group, quant_type: group.block_error(scores, quant_type))
        problems[f"{spec.name}, {bits} bits"] = groups, problem.limit, float("inf")
        start = time.perf_counter()
        damage = {"exact": totals(groups, solve(groups, problem.limit))[0]}
        seconds = time.perf_counter() - start
        for solver in (greedy, lagrangian):
            damage[solver.__name__] = totals(groups, solver(groups, problem.limit))[0]
        print(f"| {bits} | " + " | ".join(f"{d:.4g}" for d in damage.values()) + f" | {seconds:.2f} |")

    print("\n| problem | seconds | one program, seconds | its damage | groups of another type |\n|---|---|---|---|---|")
    for name, (groups, limit, time_limit) in problems.items():
        print(f"| {name} | {compared_with_one_program(groups, limit, time_limit)} |", flush=True)


def compared_with_one_program(groups: list[list[Option]], limit: int, time_limit: float) -> str:
    """Each solves the same problem twice, taking turns: least processor time, and how the choices differ."""
    seconds: list[list[float]] = [[], []]
    choices: list[tuple[int, ...]] = [(), ()]
    for _ in range(2):
        for i, solver in enumerate((solve, one_program)):
            start = time.process_time()
            choices[i] = solver(groups, limit, time_limit)
            seconds[i].append(time.process_time() - start)
    ours, theirs = (totals(groups, chosen)[0] for chosen in choices)
    n_differing = sum(a != b for a, b in zip(*choices, strict=True))
    return f"{min(seconds[0]):.2f} | {min(seconds[1]):.2f} | {theirs / ours - 1:+.3%} | {n_differing}"


def large_problems() -> dict[str, tuple[list[list[Option]], int, float]]:
    """Three models at several budgets, each without and with a limit on time."""
    problems = {}
    for seed in range(3):
        groups = large_problem(seed)
        n_weights = sum(g[0].size / 2.0625 for g in groups)
        times = 0.9 * float(sum(np.mean([o.time for o in g]) for g in groups))
        for bits in (2.7, 3.3, 4.5, 6.0):
            name = f"{N_LAYERS * N_MATRICES} groups of {N_TYPES}, seed {seed}, {bits} bits"
            problems[name] = groups, int(bits * n_weights), float("inf")
            problems[f"{name}, time limit"] = groups, int(bits * n_weights), times
    return problems


def large_problem(seed: int) -> list[list[Option]]:
    """A problem whose errors shrink by about a factor of four per bit, like real ones; times within a factor of two."""
    numbers = np.random.default_rng(seed)
    bits = np.sort(np.append(2.0625, numbers.uniform(2.1, 8.5, N_TYPES - 1)))
    costs = numbers.uniform(0.7, 1.4, N_TYPES) * bits**0.5
    groups = []
    for _ in range(N_LAYERS):
        for n_weights in (8192**2, 8192 * 1024, 8192 * 1024, 8192**2, 8192 * 28672, 8192 * 28672, 8192 * 28672):
            hardness = n_weights * numbers.lognormal(0, 1)
            groups.append(
                [
                    Option(hardness * 4**-b * numbers.lognormal(0, 0.1), int(n_weights * b), n_weights * c)
                    for b, c in zip(bits, costs, strict=True)
                ]
            )
    return groups


if __name__ == "__main__":
    main()

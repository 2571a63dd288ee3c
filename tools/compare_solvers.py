#!/usr/bin/env python3
"""The exact solver against a greedy and a Lagrangian one on a real model, and its time on a large one.

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
from support.plain_solvers import greedy, lagrangian, totals

N_LAYERS, N_MATRICES, N_TYPES = 80, 7, 14


def main() -> None:
    """Print both tables."""
    spec, scores = ModelDirectory(Path(sys.argv[1])).spec, LayerScores.load(Path(sys.argv[2]))
    low, high = build_problem(spec, BitBudget("file-bits", 4.0), AllocationOptions("block-error")).range()
    print("| bits of the file | exact | greedy | Lagrangian | exact, seconds |\n|---|---|---|---|---|")
    for share in (0.05, 0.1, 0.2, 0.3, 0.4):
        bits = round(low + share * (high - low), 3)
        problem = build_problem(spec, BitBudget("file-bits", bits), AllocationOptions("block-error"))
        groups = options(problem, lambda group, quant_type: group.block_error(scores, quant_type))
        start = time.perf_counter()
        damage = {"exact": totals(groups, solve(groups, problem.limit))[0]}
        seconds = time.perf_counter() - start
        for solver in (greedy, lagrangian):
            damage[solver.__name__] = totals(groups, solver(groups, problem.limit))[0]
        print(f"| {bits} | " + " | ".join(f"{d:.4g}" for d in damage.values()) + f" | {seconds:.2f} |")

    print(f"\n{N_LAYERS} layers, {N_MATRICES} matrices, {N_TYPES} types; without and with a limit on time")
    for seed in range(3):
        groups = large_problem(seed)
        limit = int(3.3 * sum(g[0].size / 2.0625 for g in groups))
        times = sum(np.mean([o.time for o in g]) for g in groups)
        for time_limit in (np.inf, 0.9 * float(times)):
            start = time.perf_counter()
            solve(groups, limit, time_limit)
            print(f"  {time.perf_counter() - start:.2f} s")


def large_problem(seed: int) -> list[list[Option]]:
    """Errors that fall by about four per bit, as real ones do, times within a factor of two."""
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

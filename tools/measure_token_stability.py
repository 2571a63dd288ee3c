#!/usr/bin/env python3
"""Measures how the order of layers and matrices depends on the number of tokens and on the seed of the twin.

Usage: measure_token_stability.py MODEL_DIR TEXT

Prints Spearman's rank correlations: of layer scores with those from the most tokens, between seeds of the untrained
twin, and of the matrices' block errors with those from the most tokens. Eight sequences of 512 tokens of TEXT pass the
model.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import CHUNK_SIZE, CalibrationTokens, read_calibration_texts, tokenize
from lieq_gguf.records.measurement import measured
from lieq_gguf.scorers import score_layers
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import load_source_tokenizer

N_CHUNKS = 8
SCORE_TOKENS = (64, 128, 256, 512, 1024)
DAMAGE_TOKENS = (128, 256, 512, 1024, 2048)
SEEDS = (0, 1, 2)
SCORES = ("lieq", "energy-gain")


def main() -> None:
    """Run the pass with each setting and print three tables."""
    path = Path(sys.argv[1])
    text = read_calibration_texts([Path(sys.argv[2])])
    source = ModelDirectory(path)
    tokens = tokenize(text, load_source_tokenizer(path), N_CHUNKS * CHUNK_SIZE)
    by_count = [run(source, tokens, *counts) for counts in zip(SCORE_TOKENS, DAMAGE_TOKENS, strict=True)]
    by_seed = [run(source, tokens, PassOptions.n_score_tokens, DAMAGE_TOKENS[0], seed) for seed in SEEDS]

    header = " | ".join(SCORES)
    print(f"| tokens of the spectra | {header} |\n|---|{'---|' * len(SCORES)}")
    for count, result in zip(SCORE_TOKENS, by_count, strict=True):
        print(f"| {count} | {agreement(result, by_count[-1])} |")
    print(f"\n| seeds | {header} |\n|---|{'---|' * len(SCORES)}")
    for (a, first), (b, second) in combinations(zip(SEEDS, by_seed, strict=True), 2):
        print(f"| {a} and {b} | {agreement(first, second)} |")
    print("\n| tokens of the block errors | all matrices | matrices of a role, mean |\n|---|---|---|")
    reference = block_errors(by_count[-1])
    for count, result in zip(DAMAGE_TOKENS, by_count, strict=True):
        errors = block_errors(result)
        of_roles = [spearmanr(errors[:, role], reference[:, role]).statistic for role in range(reference.shape[1])]
        whole = spearmanr(errors.ravel(), reference.ravel()).statistic
        print(f"| {count} | {whole:.3f} | {np.mean(of_roles):.3f} |")


def run(
    source: ModelDirectory, tokens: CalibrationTokens, n_score_tokens: int, n_damage_tokens: int, seed: int = 0
) -> PassResult:
    """Run one pass, and name it on stderr."""
    print(f"{n_score_tokens} and {n_damage_tokens} tokens, seed {seed}", file=sys.stderr, flush=True)
    options = PassOptions(n_score_tokens=n_score_tokens, n_damage_tokens=n_damage_tokens, seed=seed)
    return run_pass(source, tokens, options)


def agreement(result: PassResult, other: PassResult) -> str:
    """Cells of a table row: the correlation of each score."""
    scores, other_scores = score_layers(result.measurements), score_layers(other.measurements)
    return " | ".join(f"{spearmanr(scores[name], other_scores[name]).statistic:.3f}" for name in SCORES)


def block_errors(result: PassResult) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``[n_layers, n_roles]``."""
    return np.array([list(measured(m.block_errors).values()) for m in result.measurements])


if __name__ == "__main__":
    main()

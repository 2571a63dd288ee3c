#!/usr/bin/env python3
"""Convert a model at several budgets from one calibration pass, and time each file in llama.cpp.

Usage: bench_budgets.py MODEL_DIR BITS…
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def lieq(*arguments: str | Path) -> None:
    """Run a command of lieq-gguf."""
    subprocess.run([sys.executable, "-m", "lieq_gguf", *map(str, arguments)], check=True)


def main() -> None:
    """Score once, convert to each budget, bench all."""
    model, budgets = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        scores, imatrix = folder / "scores.json", folder / "imatrix.gguf"
        lieq("imatrix", model, "-o", imatrix)
        lieq("score", model, "--imatrix", imatrix, "-o", scores)
        files = [folder / f"{model.name}-{bits}.gguf" for bits in budgets]
        for bits, file in zip(budgets, files, strict=True):
            lieq("convert", model, "--bits", bits, "--scores-file", scores, "--imatrix", imatrix, "-o", file, "--quiet")
        lieq("bench", *files)


if __name__ == "__main__":
    main()

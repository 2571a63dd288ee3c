#!/usr/bin/env python3
"""Compares our importance matrix with llama-imatrix's, on the same tokens and the same F16 weights.

Usage: compare_imatrix.py LLAMA_CPP TEXT [FAMILY|MODEL_DIR …]      (all tiny models of tests/support/families.py)

LLAMA_CPP has bin/llama-imatrix. The difference of a matrix is the sum over columns of the absolute difference, over the
sum; experts count by their tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.families import TINY_MODELS
from support.requests import convert_plainly

from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.passes import PassOptions
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.sources.gguf_source import GgufSource

N_TOKENS, CHUNK_SIZE = 2048, 512
_CHARACTERS = 20_000  # a token is a byte at least


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="*", default=list(TINY_MODELS), metavar="FAMILY|MODEL_DIR")
    arguments = parser.parse_args()
    print("| model | matrices | also in llama-imatrix's | median | largest | of |\n|---|---|---|---|---|---|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder, tiny = Path(scratch), TINY_MODELS.get(name)
            model = Path(name) if tiny is None else tiny.write(folder / name, torch.float16)
            theirs, ours = both(model, arguments.text, arguments.llama_cpp, folder)
        differences = {matrix: difference(ours, theirs, matrix) for matrix in ours.in_sum2 if matrix in theirs.in_sum2}
        largest = max(differences, key=lambda matrix: differences[matrix])
        figures = f"{np.median(list(differences.values())):.3%} | {differences[largest]:.3%} | {largest}"
        print(f"| {model.name} | {len(ours.in_sum2)} | {len(differences)} | {figures} |", flush=True)


def both(model: Path, text: Path, llama_cpp: Path, folder: Path) -> tuple[ImportanceMatrix, ImportanceMatrix]:
    """The importance matrices of llama-imatrix and ours, on the first tokens of a text."""
    f16, theirs = convert_plainly(model, folder / "f16.gguf"), folder / "theirs.gguf"
    beginning = folder / "beginning.txt"
    beginning.write_text(text.read_text(encoding="utf-8")[:_CHARACTERS], encoding="utf-8")
    run(llama_cpp / "bin" / "llama-imatrix", "-m", f16, "-f", beginning, "-c", CHUNK_SIZE, "-b", CHUNK_SIZE,
        "--chunks", N_TOKENS // CHUNK_SIZE, "-o", theirs, "--no-ppl")  # fmt: skip
    options = PassOptions(statistics=frozenset(), compute=ComputeOptions(n_threads=2, in_float32=True))
    ours = run_pass(GgufSource(f16), tokens_of(beginning, f16), options).importance
    return load_importance(theirs), ours


def tokens_of(text: Path, file: Path) -> CalibrationTokens:
    """The tokens that llama-imatrix runs: the token that begins a text takes the place of the first of a sequence."""
    with open_model(file, vocab_only=True) as model:
        ids = np.array(model.tokenize(text.read_text(encoding="utf-8"), True)[:N_TOKENS])
        ids = ids.reshape(-1, CHUNK_SIZE)
        if model.bos_token is not None:
            ids[:, 0] = model.bos_token
    return CalibrationTokens(ids, text.name)


def run(*command: object) -> None:
    """Run a program without its output, unless it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")


def difference(ours: ImportanceMatrix, theirs: ImportanceMatrix, matrix: str) -> float:
    """Summed difference of the columns' mean squares over their sum; an expert weighs as many tokens as it saw."""
    a, b = (some.in_sum2[matrix] / some.n_tokens for some in (ours, theirs))
    return float(np.abs(a - b).sum() / b.sum())


if __name__ == "__main__":
    main()

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
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.families import TINY_MODELS
from support.gguf_files import rewrite
from support.requests import convert_plainly

from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.sources import open_source
from lieq_gguf.tokenizers import SourceTokenizer

N_TOKENS, CHUNK_SIZE = 2048, 512


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
    """The importance matrices of llama-imatrix and ours, on the first tokens of a text.

    Nothing is added to them: llama-imatrix puts its first token in place of one of the text, and we put it before.
    """
    f16, prefix = folder / "f16.gguf", folder / "prefix.txt"
    rewrite(convert_plainly(model, folder / "whole.gguf"), f16, without_added_tokens)
    prefix.write_text(
        shortest_prefix(text.read_text(encoding="utf-8"), open_source(f16).load_tokenizer(), N_TOKENS), encoding="utf-8"
    )
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    run(llama_cpp / "bin" / "llama-imatrix", "-m", f16, "-f", prefix, "-c", CHUNK_SIZE, "-b", CHUNK_SIZE,
        "--chunks", N_TOKENS // CHUNK_SIZE, "-o", theirs, "--no-ppl")  # fmt: skip
    run(sys.executable, "-m", "lieq_gguf", "imatrix", f16, "--calibration", prefix, "--n-tokens", N_TOKENS,
        "--float32", "--no-cache", "-q", "-o", ours)  # fmt: skip
    return load_importance(theirs), load_importance(ours)


def without_added_tokens(values: dict[str, Any]) -> None:
    """Switch off what is added before and after a text."""
    values["tokenizer.ggml.add_bos_token"] = values["tokenizer.ggml.add_eos_token"] = False


def run(*command: object) -> None:
    """Run a program without its output, unless it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")


def shortest_prefix(text: str, tokenizer: SourceTokenizer, n_tokens: int) -> str:
    """The beginning of a text that has more tokens than these by as few as possible."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        enough = len(tokenizer.encode(text[:middle], add_special_tokens=False)) > n_tokens
        low, high = (low, middle) if enough else (middle + 1, high)
    return text[:low]


def difference(ours: ImportanceMatrix, theirs: ImportanceMatrix, matrix: str) -> float:
    """Summed difference of the columns' mean squares over their sum; an expert weighs as many tokens as it saw."""
    a, b = (some.in_sum2[matrix] / some.n_tokens for some in (ours, theirs))
    return float(np.abs(a - b).sum() / b.sum())


if __name__ == "__main__":
    main()

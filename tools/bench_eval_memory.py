#!/usr/bin/env python3
"""How much memory eval needs beyond its two models when the vocabulary is large. Makes the models itself.

Usage: bench_eval_memory.py [N_VOCAB]      (150,000 if left out)
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from random_models import write_random_model


def lieq(*arguments: object) -> str:
    """Run a command of lieq-gguf; returns what it prints."""
    command = [sys.executable, "-m", "lieq_gguf", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Make two files, compare them, print the memory."""
    n_vocab = int(sys.argv[1]) if len(sys.argv) > 1 else 150_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, f16, quantised = folder / "model", folder / "f16.gguf", folder / "q4.gguf"
        write_random_model(model, n_vocab)
        for file, quant_type, bits in ((f16, "F16", 16), (quantised, "Q4_K", 4.5)):
            lieq("convert", model, "--types", quant_type, "--bits", bits, "--no-imatrix", "-o", file, "--quiet")
        # getrusage has the largest child so far; the conversion of a small model is smaller than eval
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        document = json.loads(lieq("eval", quantised, "--reference", f16, "--chunks", 3, "--json", "--quiet"))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        sizes = f16.stat().st_size + quantised.stat().st_size
    print(f"vocabulary {n_vocab:,}, {document['n_tokens']} tokens scored; children before eval: {before / 1e6:.0f} MB")
    print(f"peak {peak / 1e6:.0f} MB, files {sizes / 1e6:.0f} MB, beyond them {(peak - sizes) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

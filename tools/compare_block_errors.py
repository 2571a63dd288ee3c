#!/usr/bin/env python3
"""Errors of the layers of a file with error feedback over those of a file without: same types, unseen text.

Usage: compare_block_errors.py TEXT [--bits 3] [--n-tokens 16384] [FAMILY|MODEL_DIR …]

FAMILY is a name in tests/support/families.py, for which a tiny model is made; the default is all families. A block
error is the change of a layer's output, both on the states that quantised layers have made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.text import read_calibration_texts, tokenize
from lieq_gguf.records.options import ComputeOptions, SourceOptions
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.families import TINY_MODELS

N_TOKENS, N_THREADS = 2048, 2


def main() -> None:
    """Make both files of each model, and print a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="*", default=list(TINY_MODELS), metavar="FAMILY|MODEL_DIR")
    parser.add_argument("--bits", default="3")
    parser.add_argument("--n-tokens", default="16384")
    arguments = parser.parse_intermixed_args()
    header = ("model", "bits", "mean block error without", "with", "ratio", "layers that gain")
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = TINY_MODELS[name].write(folder / name) if name in TINY_MODELS else Path(name)
            bits = str(max(float(arguments.bits), least_bits(model)))
            files = [convert(model, folder, bits, arguments.n_tokens, feedback) for feedback in (False, True)]
            errors = [block_errors(model, file, arguments.text) for file in files]
            without, with_feedback = errors
            cells = f"{without.mean():.4f} | {with_feedback.mean():.4f} | {with_feedback.mean() / without.mean():.3f}"
            n_better = int((with_feedback < without).sum())
            print(f"| {model.name} | {bits} | {cells} | {n_better} of {len(without)} |", flush=True)


def least_bits(model: Path) -> float:
    """Enough for rows that fit no 256-weight block."""
    widths = {t.shape[-1] for layer in ModelDirectory(model).spec.layer_matrices for t in layer}
    return 0.0 if all(width % 256 == 0 for width in widths) else 4.5


def convert(model: Path, folder: Path, bits: str, n_tokens: str, feedback: bool) -> Path:
    """A file of default options, but for the number of calibration tokens."""
    file, switch = folder / f"{feedback}.gguf", "--error-feedback" if feedback else "--no-error-feedback"
    subprocess.run(
        [sys.executable, "-m", "lieq_gguf", "convert", model, "--bits", bits, switch, "-o", file, "--no-cache", "-q",
         "--threads", str(N_THREADS), "--json", "--n-tokens", n_tokens],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return file


@torch.inference_mode()
def block_errors(model: Path, file: Path, text: Path) -> npt.NDArray[np.float64]:
    """One per layer."""
    source, written = ModelDirectory(model), GgufSource(file, SourceOptions(allow_requantize=True))
    ids = tokenize(read_calibration_texts([text]), source.load_tokenizer(), N_TOKENS).ids
    layer = LayerModel.of(source, ComputeOptions(n_threads=N_THREADS, in_float32=True))
    states = layer.embed(written, ids)
    errors = []
    for index in range(source.spec.n_layers):
        layer.load(source, index)
        intact = layer.forward(states)
        layer.load(written, index)
        states = layer.forward(states)
        errors.append(layer.relative_change(intact, states))
    return np.array(errors)


if __name__ == "__main__":
    main()

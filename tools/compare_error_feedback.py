#!/usr/bin/env python3
"""Measures the gain of error feedback: KL divergence with and without it, same types, several texts, as Markdown.

Usage: compare_error_feedback.py MODEL_DIR CALIBRATION FOLDER TEXT… [--rows Q2_K,IQ2_XXS,2.7] [--chunks N]

A row is a type for all matrices of the layers, or a number of bits for --method best --profile quality. Both files of a
row have the same importance matrix, measured on CALIBRATION; TEXTs should be other texts. Files stay in FOLDER and are
not made again: use a new folder after a change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compare_presets import geometric_mean, lieq, measured_files, measured_options

from lieq_gguf.quant_types import QUANT_TYPES

ROWS = "Q2_K,Q3_K,Q4_K,IQ2_XXS,IQ3_XXS,2.1,2.7,3.5"
FEEDBACK = (False, True)


def main() -> None:
    """Make the files, and print a table for each text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    folder, threads = arguments.folder, ["-t", arguments.threads, "-q"]
    f16, scores, _ = measured_files(arguments)
    rows = arguments.rows.split(",")
    files = {(row, fed): folder / f"{row}-{'feedback' if fed else 'none'}.gguf" for row in rows for fed in FEEDBACK}
    seconds: dict[bool, list[float]] = {fed: [] for fed in FEEDBACK}
    for (row, fed), file in files.items():
        if file.exists():
            continue
        is_type = row in QUANT_TYPES
        bits = QUANT_TYPES[row].bits_per_weight if is_type else float(row)
        types = ["--types", row] if is_type else ["--profile", "quality"]
        options = [*types, *measured_options(arguments.calibration, scores, fed), "-o", file, *threads]
        conversion = lieq("convert", arguments.model, "--bits", bits, *options)
        seconds[fed].append(conversion["seconds"]["write"])
    for text in arguments.texts:
        options = ["--reference", f16, "--text", text, "--chunks", arguments.chunks, *threads]
        evaluations = lieq("eval", *files.values(), *options)
        kld = {key: e["kld"]["mean"] for key, e in zip(files, evaluations, strict=True)}
        print(f"\n{text.name}\n\n| | KLD without | with feedback | ratio |\n|---|---|---|---|")
        for row in rows:
            without, with_feedback = (kld[row, fed] for fed in FEEDBACK)
            print(f"| {row} | {without:.4f} | {with_feedback:.4f} | {with_feedback / without:.2f} |")
        mean = geometric_mean([kld[row, True] / kld[row, False] for row in rows])
        print(f"| geometric mean | | | {mean:.3f} |", flush=True)
    for fed, taken in seconds.items():
        print(f"seconds to write, {'with' if fed else 'without'}: {', '.join(f'{s:.0f}' for s in taken)}")


if __name__ == "__main__":
    main()

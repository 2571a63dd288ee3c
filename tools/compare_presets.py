#!/usr/bin/env python3
"""Compares our files with llama.cpp's presets at the same sizes: KL divergence and speed, as Markdown tables.

Usage: compare_presets.py MODEL_DIR CALIBRATION TEXT FOLDER [--presets A,B] [--profiles quality,cpu,edge]
       [--no-error-feedback]

Both sides quantise with importance measured on CALIBRATION, and are compared on TEXT. The installed library makes the
presets, with the importance of the layers' matrices, which is what llama-imatrix measures. Our files get --size with
the bytes of the preset; the column "embedding as preset" fixes the embedding's type too, which separates the two
effects. Speeds come from alternating runs of all files of a row and the K preset nearest in size. Files and evaluations
stay in FOLDER and are not made again: use a new folder for another text or after a change.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from make_preset import quantize

from lieq_gguf.evaluation.inspection import inspect
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.native.llama_cpp import open_model

PRESETS = ("Q4_K_M", "Q3_K_M", "Q3_K_S", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")
K_PRESETS = ("Q4_K_M", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S")
FIXED = "embedding as preset"
N_ROUNDS, N_TOKENS = 9, 24


def lieq(*arguments: object) -> Any:
    """Run a command of lieq-gguf; returns the JSON document it prints."""
    command = [sys.executable, "-m", "lieq_gguf", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measured_files(arguments: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The model in F16, its scores and its importance matrix, made unless the folder has them."""
    folder, threads = arguments.folder, ["-t", arguments.threads, "-q"]
    folder.mkdir(parents=True, exist_ok=True)
    f16, scores, imatrix = folder / "F16.gguf", folder / "scores.json", folder / "imatrix.gguf"
    calibration = ["--calibration", arguments.calibration]
    if not f16.exists():
        lieq("convert", arguments.model, "--bits", 16, "--types", "F16", "-o", f16, *threads)
    if not scores.exists():
        lieq("score", arguments.model, *calibration, "-o", scores, *threads)
    if not imatrix.exists():
        command = ["imatrix", arguments.model, *calibration, "-o", imatrix, *threads]
        subprocess.run([sys.executable, "-m", "lieq_gguf", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return f16, scores, imatrix


def measured_options(calibration: Path, scores: Path, feedback: bool) -> list[object]:
    """Options for a conversion that does not score the model again."""
    option = "--error-feedback" if feedback else "--no-error-feedback"
    return ["--scores-file", scores, "--calibration", calibration, option]


def make_files(arguments: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """Preset to column to file."""
    folder, threads = arguments.folder, ["-t", arguments.threads, "-q"]
    f16, scores, imatrix = measured_files(arguments)
    measured = load_importance(imatrix)
    importance = replace(measured, in_sum2={n: s for n, s in measured.in_sum2.items() if n.startswith("blk.")})
    files: dict[str, dict[str, Path]] = {}
    presets = arguments.presets.split(",")
    for preset in dict.fromkeys([*presets, *K_PRESETS]):
        if not (folder / f"{preset}.gguf").exists():
            quantize(f16, folder / f"{preset}.gguf", preset, importance)
    for preset in presets:
        theirs = folder / f"{preset}.gguf"
        files[preset] = {"preset": theirs}
        size = theirs.stat().st_size
        embedding = inspect(theirs).types["token_embd.weight"]
        columns = {p: ["--profile", p] for p in arguments.profiles.split(",")}
        if arguments.fixed:
            columns[FIXED] = ["--profile", "quality", "--embedding-type", embedding]
        for name, options in columns.items():
            ours = folder / f"{preset}-{name.replace(' ', '-')}.gguf"
            if not ours.exists():
                options = [*options, *measured_options(arguments.calibration, scores, arguments.feedback)]
                lieq("convert", arguments.model, "--size", size, *options, "-o", ours, *threads)
            assert ours.stat().st_size <= size
            files[preset][name] = ours
    return files


def divergences(arguments: argparse.Namespace, files: list[Path]) -> dict[Path, float]:
    """Mean KLD of each file."""
    store = arguments.folder / f"kld-{arguments.text.stem}-{arguments.chunks}.json"
    stored = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    missing = [f for f in files if stored.get(f.name, {}).get("written") != f.stat().st_mtime_ns]
    if missing:
        options = ["--reference", arguments.folder / "F16.gguf", "--text", arguments.text, "--chunks", arguments.chunks]
        document = lieq("eval", *missing, *options, "-t", arguments.threads, "-q")
        for file, result in zip(missing, document if isinstance(document, list) else [document], strict=True):
            stored[file.name] = {"written": file.stat().st_mtime_ns, "kld": result["kld"]["mean"]}
        store.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    return {f: stored[f.name]["kld"] for f in files}


def speeds(files: list[Path], n_threads: int) -> dict[Path, float]:
    """Tokens per second of generation; the files take turns."""
    seconds: dict[Path, list[float]] = {file: [] for file in files}
    with ExitStack() as stack:
        models = {file: stack.enter_context(open_model(file, n_ctx=64, n_threads=n_threads)) for file in files}
        for round_ in range(N_ROUNDS + 1):
            for file, model in models.items():
                model.clear()
                start = time.perf_counter()
                for token in range(N_TOKENS):
                    model.decode([token + 10])
                if round_:  # the first round only warms up
                    seconds[file].append((time.perf_counter() - start) / N_TOKENS)
    return {file: 1 / statistics.median(times) for file, times in seconds.items()}


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "text", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--profiles", default="quality,cpu,edge")
    parser.add_argument(
        "--no-error-feedback",
        dest="feedback",
        action="store_false",
        help="encode every block independently, like the presets",
    )
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-fixed", dest="fixed", action="store_false", help="leave out the embedding as preset")
    parser.add_argument("--no-bench", dest="bench", action="store_false")
    arguments = parser.parse_args()
    files = make_files(arguments)
    kld = divergences(arguments, [f for row in files.values() for f in row.values()])
    columns = list(next(iter(files.values())))
    print("| size of | bytes | KLD " + " | KLD ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for preset, row in files.items():
        values = [kld[row[c]] for c in columns]
        cells = [f"{v:.4f}" + (f" ({v / values[0]:.2f})" if i else "") for i, v in enumerate(values)]
        print(f"| {preset} | {row['preset'].stat().st_size:,} | " + " | ".join(cells) + " |")
    means = [geometric_mean([kld[row[c]] / kld[row["preset"]] for row in files.values()]) for c in columns[1:]]
    print("| geometric mean | | | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    if not arguments.bench:
        return
    k_files = [arguments.folder / f"{p}.gguf" for p in K_PRESETS]
    print("\n| size of | nearest K preset | its tok/s | tok/s " + " | tok/s ".join(columns) + " |")
    print("|---" * (len(columns) + 3) + "|")
    for preset, row in files.items():
        size = row["preset"].stat().st_size
        k_file = min(k_files, key=lambda f: abs(f.stat().st_size - size))
        rates = speeds(list(dict.fromkeys([k_file, *row.values()])), arguments.threads)
        cells = [f"{rates[row[c]]:.1f} ({rates[row[c]] / rates[k_file]:.2f})" for c in columns]
        print(f"| {preset} | {k_file.stem} | {rates[k_file]:.1f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time and memory of a whole conversion, against llama.cpp's converter, llama-imatrix and llama-quantize (same types).

Usage: bench_conversion.py MODEL_DIR TEXT LLAMA_CPP [--bits 2.7] [--repetitions 1]

LLAMA_CPP is a folder with bin/llama-imatrix, bin/llama-quantize and src/convert_hf_to_gguf.py, built from the source of
the installed llama-cpp-python. Both sides use 16,384 tokens of TEXT and two threads; runs alternate. Error feedback,
which the other tools do not have, is timed separately.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.sources.model_directory import ModelDirectory

N_TOKENS, CHUNK_SIZE, N_THREADS = 16384, 512, 2


def timed(
    name: str, command: list[object], environment: dict[str, str] | None = None, printed: Path = Path(os.devnull)
) -> float:
    """Run a command and print its time and largest memory; returns the seconds."""
    start = time.perf_counter()
    with printed.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=out, stderr=subprocess.DEVNULL, env=os.environ | (environment or {})
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{name} failed: {' '.join(str(word) for word in command)}")
    print(f"  {name:<20} {seconds:7.1f} s {usage.ru_maxrss * 1024 / 1e6:7.0f} MB", flush=True)
    return seconds


def main() -> None:
    """Run both sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--bits", default="2.7")
    parser.add_argument("--repetitions", type=int, default=1)
    arguments = parser.parse_args()
    lieq = [sys.executable, "-m", "lieq_gguf"]
    pass_options = ["--calibration", arguments.text, "--n-tokens", N_TOKENS, "--threads", N_THREADS, "--no-cache", "-q"]
    source = arguments.llama_cpp / "src"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan, ours_imatrix, theirs_imatrix = folder / "plan.json", folder / "ours.gguf", folder / "theirs.gguf"
        f16, recipe = folder / "f16.gguf", folder / "types.txt"
        subprocess.run(
            [*lieq, "plan", arguments.model, "--bits", arguments.bits, *map(str, pass_options), "-o", plan],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lines = QuantPlan.load(plan).tensor_type_lines(ModelDirectory(arguments.model).spec)
        recipe.write_text(lines, encoding="utf-8")
        for repetition in range(arguments.repetitions):
            print(f"run {repetition + 1}")
            command = [*lieq, "convert", arguments.model, "--bits", arguments.bits, *pass_options, "-f"]
            ours = timed("lieq-gguf convert", [*command, "--no-error-feedback", "-o", folder / "ours"])
            with_feedback = timed("with error feedback", [*command, "-o", folder / "with-feedback"])
            theirs = timed("converter", [
                sys.executable, source / "convert_hf_to_gguf.py", arguments.model, "--outtype", "f16", "--outfile", f16,
            ], {"PYTHONPATH": str(source / "gguf-py")})  # fmt: skip
            theirs += timed("llama-imatrix", [
                arguments.llama_cpp / "bin" / "llama-imatrix", "-m", f16, "-f", arguments.text, "-c", CHUNK_SIZE,
                "--chunks", N_TOKENS // CHUNK_SIZE, "-t", N_THREADS, "-o", theirs_imatrix, "--no-ppl",
            ])  # fmt: skip
            quantize = timed("llama-quantize", [
                arguments.llama_cpp / "bin" / "llama-quantize", "--imatrix", theirs_imatrix,
                "--tensor-type-file", recipe, f16, folder / "theirs", "Q2_K", N_THREADS,
            ])  # fmt: skip
            written = timed("convert --plan", [
                *lieq, "convert", arguments.model, "--plan", plan, "--imatrix", theirs_imatrix, "-o", folder / "w",
                "-f", "--threads", N_THREADS, "--no-error-feedback", "-q", "--json",
            ], printed=folder / "written.json")  # fmt: skip
            stages = json.loads((folder / "written.json").read_text())["seconds"]
            print(f"  whole: {ours:.1f} / {theirs + quantize:.1f} s = {ours / (theirs + quantize):.2f}")
            print(f"  with error feedback / without: {with_feedback / ours:.2f}")
            print(f"  reading, quantising and writing tensors / llama-quantize: {stages['write'] / quantize:.2f}")
            print(f"  the whole of convert --plan, verified / llama-quantize: {written / quantize:.2f}")
        compare_importance(arguments.model, arguments.text, theirs_imatrix, ours_imatrix, lieq)
    print(f"largest child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6:.0f} MB")


def compare_importance(model: Path, text: Path, theirs_file: Path, ours_file: Path, lieq: list[str]) -> None:
    """Relative difference of the entries on the same tokens: the first of the text, which llama-imatrix uses."""
    characters = text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        from lieq_gguf.tokenizers import load_source_tokenizer

        tokenizer = load_source_tokenizer(ModelDirectory(model).path)
        low, high = 0, len(characters)
        while low < high:  # the shortest prefix with all the tokens
            middle = (low + high) // 2
            enough = len(tokenizer.encode(characters[:middle], add_special_tokens=False)) > N_TOKENS
            low, high = (low, middle) if enough else (middle + 1, high)
        prefix = Path(scratch) / "prefix.txt"
        prefix.write_text(characters[:low], encoding="utf-8")
        command = [*lieq, "imatrix", model, "--calibration", prefix, "--n-tokens", N_TOKENS, "--no-cache", "-q"]
        subprocess.run([*map(str, command), "-o", str(ours_file)], check=True, stdout=subprocess.DEVNULL)
    ours, theirs = load_importance(ours_file), load_importance(theirs_file)
    differences = []
    for name in ours.in_sum2:
        a, b = ours.mean(name), theirs.mean(name)
        assert a is not None
        assert b is not None
        differences.append(np.abs(a[b > 0] / b[b > 0] - 1))
    pooled = np.concatenate(differences)
    print(f"importance against llama-imatrix: median {np.median(pooled):.4%}, 99 % {np.quantile(pooled, 0.99):.3%}")


if __name__ == "__main__":
    main()

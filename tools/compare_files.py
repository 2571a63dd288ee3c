#!/usr/bin/env python3
"""One table of many files: size, bits, divergence from the reference, speed. Markdown, for docs/experiments.md.

Usage: compare_files.py --reference F16.gguf --text FILE [--chunks N] [--threads N] [--no-bench] FILE…
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def lieq(*arguments: object) -> Any:
    """Run a command of lieq-gguf; returns the JSON document it prints."""
    command = [sys.executable, "-m", "lieq_gguf", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """One row per file, the smallest file first."""
    text = ["--text", arguments.text] if arguments.text else []
    chunks = ["--chunks", arguments.chunks] if arguments.chunks else []
    tasks = ["--tasks", arguments.tasks] if arguments.tasks else []
    files = arguments.files
    threads = ["--threads", arguments.threads] if arguments.threads else []
    document = lieq("eval", *files, "--reference", arguments.reference, *text, *chunks, *tasks, *threads)
    evaluations = document if isinstance(document, list) else [document]
    speeds = [] if arguments.no_bench else lieq("bench", *files, *threads, "-r", 3)
    print(
        f"{evaluations[0]['n_tokens']} tokens, reference perplexity {estimate(evaluations[0], 'reference_perplexity')}"
    )
    result = []
    for i, (file, e) in enumerate(zip(files, evaluations, strict=True)):
        row = {
            "file": file.stem,
            "bytes": f"{e['file_bytes']:,}",
            "bits per decoder weight": f"{lieq('inspect', file)['layer_bpw']:.3f}",
            "perplexity": estimate(e, "perplexity"),
            "KLD": f"{e['kld']['mean']:.4f}" + ("" if e["kld"]["stderr"] is None else f" ± {e['kld']['stderr']:.4f}"),
            "same top": f"{e['same_top']['value']:.1%}",
            "loops": f"{e['health']['n_looping']} of {e['health']['n_prompts']}",
        }
        if "tasks" in e:
            row["right answers"] = f"{e['tasks']['accuracy']['value']:.1%}"
        if speeds:
            row["prompt tok/s"] = f"{speeds[i]['prompt_tokens_per_sec']:.0f}"
            row["generate tok/s"] = f"{speeds[i]['generation_tokens_per_sec']:.1f}"
        result.append(row)
    return [row for _, row in sorted(zip(files, result, strict=True), key=lambda pair: pair[0].stat().st_size)]


def estimate(document: dict[str, Any], key: str) -> str:
    """A value with its error."""
    value, error = document[key]["value"], document[key]["stderr"]
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--reference", required=True, type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tasks")
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-bench", action="store_true")
    table = rows(parser.parse_args())
    print("\n| " + " | ".join(table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for row in table:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()

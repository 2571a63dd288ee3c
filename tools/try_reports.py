#!/usr/bin/env python3
"""Make every condition that people report of conversions, convert it, and print what was expected and what was found.

A right file is within 0.01 standard deviations of transformers' logits, and tokenises alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.reports import CONDITIONS, PLAIN, Condition, difference

_LIMIT = 0.01  # standard deviations of the logits


def main() -> None:
    """Try all conditions, or those whose name begins with the argument."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("condition", nargs="?", default="", help="beginning of a name, such as C5")
    wanted = parser.parse_args().condition
    table = Table("", "condition", "reported in", "expected", "found", "")
    n_wrong = 0
    for name, condition in CONDITIONS.items():
        if name.startswith(wanted):
            found, is_right = _try(condition)
            n_wrong += not is_right
            expected = f"refused: {condition.refusal}" if condition.refusal else f"right file {condition.says}"
            table.add_row(name, condition.what, condition.reported, expected, found, "ok" if is_right else "WRONG")
    Console(width=200).print(table)
    sys.exit(bool(n_wrong))


def _try(condition: Condition) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        path, file = condition.write(Path(folder) / "model"), Path(folder) / "out.gguf"
        command = [sys.executable, "-m", "lieq_gguf", "convert", *map(str, (path, *PLAIN, "-o", file))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            [*_, line] = done.stderr.splitlines()
            return line, bool(condition.refusal) and condition.refusal in line
        distances, same_tokens = difference(condition, path, file)
        is_mixture = condition.model == "qwen3moe"  # a token may take another expert after the least rounding
        largest = float(np.quantile(distances, 0.8) if is_mixture else distances.max())
        is_right = not condition.refusal and largest < _LIMIT and same_tokens and condition.says in done.stderr
        return f"{largest:.4f} standard deviations{'' if same_tokens else ', other tokens'}", is_right


if __name__ == "__main__":
    main()

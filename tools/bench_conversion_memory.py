#!/usr/bin/env python3
"""Largest memory of a conversion of a 1.2-billion-parameter Llama of random weights, and of one with fewer layers.

Usage: bench_conversion_memory.py [N_LAYERS…] [--no-error-feedback]      (16 and 4 layers, with error feedback)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
N_VOCAB = 128_256


def main() -> None:
    """Make and convert each model, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("n_layers", type=int, nargs="*")
    parser.add_argument("--no-error-feedback", dest="feedback", action="store_false")
    arguments = parser.parse_args()
    for n_layers in arguments.n_layers or (16, 4):
        with tempfile.TemporaryDirectory() as scratch:
            model, log = Path(scratch) / "model", Path(scratch) / "log.json"
            # in a separate process, so that its memory is not counted here
            subprocess.run(
                [sys.executable, Path(__file__).with_name("random_models.py"), model, str(N_VOCAB),
                 json.dumps(WIDTH | {"num_hidden_layers": n_layers})],
                check=True,
            )  # fmt: skip
            n_bytes = sum(f.stat().st_size for f in model.glob("*.safetensors"))
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lieq_gguf", "convert", model, "--bits", "2.7",
                     "--error-feedback" if arguments.feedback else "--no-error-feedback", "-o",
                     Path(scratch) / "o.gguf", "--no-cache", "--quiet", "--json"],
                    stdout=out,
                )  # fmt: skip
                _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise SystemExit("the conversion failed")
            seconds = json.loads(log.read_text(encoding="utf-8"))["seconds"]
            peak = usage.ru_maxrss * 1024
            print(
                f"{n_layers} layers: model {n_bytes / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, seconds {seconds}",
                flush=True,
            )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares our F16 file with the file of llama.cpp's convert_hf_to_gguf.py, and with the model in transformers.

Compares every tensor, every metadata key, and the logits of some random tokens.

Usage: compare_with_converter.py FAMILY|MODEL_DIR …

FAMILY is a name in tests/support/families.py, for which a tiny model is made; the default is all families. The
converter comes from the source distribution of the installed llama-cpp-python, or from the folder in LLAMA_CPP_SOURCE.
It recognises only the pre-tokenizers of published vocabularies, by a hash, so it gets the name that we recognised.
Exits with 1 if anything differs that should not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.converter import CACHE, Job, compare_files, compare_logits, run_converter
from support.families import ON_PURPOSE, TINY_MODELS
from support.llama_cpp_source import llama_cpp_source
from support.requests import convert_plainly


def main() -> None:
    """Print a table, and exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=list(TINY_MODELS), metavar="FAMILY|MODEL_DIR")
    source = llama_cpp_source(CACHE)
    all_equal = True
    header = (
        "model", "equal tensors", "others", "equal keys", "others", "top-1", "largest difference of a logit",
        "of the converter's file",
    )  # fmt: skip
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in parser.parse_args().models:
            tiny = TINY_MODELS.get(name)
            model = Path(name) if tiny is None else tiny.write(Path(scratch) / name)
            told = () if tiny is None else (tiny.converter_options, tiny.without_defaults)
            ours = convert_plainly(model, Path(scratch) / f"{model.name}-ours.gguf")
            job = Job(model, ours, Path(scratch) / f"{model.name}-theirs.gguf", *told)
            run_converter([job], source)
            result = compare_files(ours, job.theirs)
            top_1, logit_difference = compare_logits(model, ours)
            _, difference_of_theirs = compare_logits(model, job.theirs)
            cells = result.n_tensors, len(result.tensors), result.n_keys, len(result.keys)
            figures = f"{top_1:.1%} | {logit_difference:.4f} deviations | {difference_of_theirs:.4f}"
            print(f"| {model.name} | {' | '.join(str(n) for n in cells)} | {figures} |", flush=True)
            for key, difference in (result.tensors | result.keys).items():
                print(f"{model.name}: {key}: {difference}", file=sys.stderr)
            all_equal = all_equal and not result.tensors and result.keys.keys() <= ON_PURPOSE.get(name, {}).keys()
    sys.exit(not all_equal)


if __name__ == "__main__":
    main()

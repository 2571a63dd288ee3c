#!/usr/bin/env python3
"""Write docs/models.md from the list that the tests run over, or with ``--check`` fail if it is out of date."""

from __future__ import annotations

import inspect
import sys
from itertools import groupby
from pathlib import Path

from lieq_gguf.architectures import FAMILIES, Decoder
from lieq_gguf.tokenizers.pre_tokenizers import TABLE

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.families import TINY_MODELS, TinyModel

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
HEAD = """<!-- Made by tools/make_models_docs.py from tests/support/families.py; after changes run `make docs`. -->

# Models

These families are read from a model directory, or by their name on the hub, with all scores and error feedback. A GGUF
file of any other architecture that llama.cpp knows is taken too ([formats.md](formats.md#from-a-gguf-file)). To add a
family, see [CONTRIBUTING.md](../CONTRIBUTING.md#a-model-family).

| in llama.cpp | `architectures` in `config.json` | what is different | tiny models of the tests: what they stand for |
|---|---|---|---|
"""
TESTED = """
Each of the tiny models has random weights, rows that K types fit, and a tokenizer with the structure of the real one,
trained on the tests' texts. For each one, `tests/test_families.py` shows four things:
* The streamed pass, layer by layer, gives the logits of transformers' whole model.
* Our F16 file in llama.cpp gives them too, but for rounding, on 128 tokens, longer than the windows that llama.cpp
  computes.
* A conversion to 2.7 bits per weight with scores and error feedback loads and runs.
* llama.cpp's own converter makes the same F16 file: every tensor is equal in name, shape, type and bytes, and every
  metadata key but for `lieq.*`; of `GlmForCausalLM` it reads the keys of an older form, so that some of its numbers are
  not transformers'. The converter recognises pre-tokenizers of published vocabularies only, so it is told
  the name that we have recognised.

`tools/compare_with_converter.py` prints these figures for them, or for a model directory of your own. Those of one day
are in [experiments.md](experiments.md). The weights and tokenizers of the real models were not at hand, but for
SmolLM2-135M.

What llama.cpp's graph of a family cannot express (another activation, rotary scaling, order of sliding windows, …) is
refused before any work, in one line.

## Pre-tokenizers
Byte-level BPE is recognised by the steps in `tokenizer.json`: """


def render() -> str:
    """The page."""
    rows = []
    for family in FAMILIES:
        about = (inspect.getdoc(inspect.getmodule(type(family))) or "").partition("\n")[0].partition(": ")[2]
        classes = ", ".join(f"`{name}`" for name in family.source_classes)
        models = [f"`{name}`: {m.stands_for}" for name, m in TINY_MODELS.items() if _family_of(m) is family]
        rows.append(f"| `{family.gguf_name}` | {classes} | {about.rstrip('.')} | {'; '.join(models)} |\n")
    names = ", ".join(f"`{name}`" for name, _ in groupby(sorted(row.name for row in TABLE)))
    return HEAD + "".join(rows) + TESTED + names + ". For others say `--pre-tokenizer NAME`.\n"


def _family_of(model: TinyModel) -> Decoder:
    """Of the families with one name in llama.cpp, that of transformers' name, or the first."""
    named = [family for family in FAMILIES if family.gguf_name == model.family]
    return next((family for family in named if family.model_type == model.model_type), named[0])


def main() -> None:
    """Write or compare."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE} is out of date; run `make docs` and commit it")


if __name__ == "__main__":
    main()

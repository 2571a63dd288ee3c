#!/usr/bin/env python3
"""Write docs/models.md from the list that the tests run over, or with ``--check`` fail if it is out of date."""

from __future__ import annotations

import inspect
import sys
from itertools import groupby
from pathlib import Path

from lieq_gguf.architectures import FAMILIES, Decoder, language_model_config
from lieq_gguf.tokenizers.pre_tokenizers import TABLE

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.families import TEXT_PARTS, TINY_MODELS, TinyModel

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
HEAD = """<!-- Made by tools/make_models_docs.py from tests/support/families.py; after changes run `make docs`. -->

# Models

These families are read from a model directory, or by their name on the hub, with all scores and error feedback. A GGUF
file of any other architecture that llama.cpp knows is taken too ([formats.md](formats.md#from-a-gguf-file)). To add a
family, see [CONTRIBUTING.md](../CONTRIBUTING.md#a-model-family).

| in llama.cpp | `architectures` in `config.json` | what is different | tiny models: what they stand for | lines |
|---|---|---|---|---|
"""
SMALL = """
The last column counts the lines of the family's module, all that it takes beside a tiny model of the tests and a place
in the list.

## Small models of today

| model | `architectures` | what is done with it |
|---|---|---|
"""
# names that people look for, and the class in their config.json
MODELS = (
    ("Qwen3.5 0.8B to 9B", "Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    ("Qwen3.5 35B-A3B", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    ("Gemma 4 E2B, E4B, 26B-A4B, 31B", "Gemma4ForConditionalGeneration", "gemma4_text"),
    ("Gemma 3 270M, 1B", "Gemma3ForCausalLM", ""),
    ("Gemma 3 4B, 12B", "Gemma3ForConditionalGeneration", "gemma3_text"),
    ("Gemma 3n E2B, E4B", "Gemma3nForConditionalGeneration", "gemma3n_text"),
    ("Qwen3 0.6B to 8B", "Qwen3ForCausalLM", ""),
    ("Qwen3-VL 2B to 8B", "Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    ("Qwen2.5 0.5B to 7B, DeepSeek-R1-Distill-Qwen", "Qwen2ForCausalLM", ""),
    ("Llama 3.2 1B, 3B, Llama 3.1 8B, TinyLlama, SmolLM2", "LlamaForCausalLM", ""),
    ("Ministral 3 3B to 14B", "Mistral3ForConditionalGeneration", "ministral3"),
    ("Mistral 7B, Nemo", "MistralForCausalLM", ""),
    ("LFM2 and LFM2.5 350M to 2.6B", "Lfm2ForCausalLM", ""),
    ("LFM2-VL", "Lfm2VlForConditionalGeneration", "lfm2"),
    ("LFM2-8B-A1B", "Lfm2MoeForCausalLM", ""),
    ("Phi-3, Phi-4-mini, Phi-4", "Phi3ForCausalLM", ""),
    ("SmolLM3 3B", "SmolLM3ForCausalLM", ""),
    ("Granite 3 2B, 8B", "GraniteForCausalLM", ""),
    ("Granite 4 350M to H-Tiny", "GraniteMoeHybridForCausalLM", ""),
    ("Falcon-H1 0.5B to 7B", "FalconH1ForCausalLM", ""),
    ("Nemotron-H, Nemotron 3 Nano", "NemotronHForCausalLM", ""),
    ("EXAONE 4 1.2B", "Exaone4ForCausalLM", ""),
    ("ERNIE 4.5 0.3B", "Ernie4_5ForCausalLM", ""),
    ("Hunyuan 0.5B to 7B", "HunYuanDenseV1ForCausalLM", ""),
    ("OLMo 2 1B, 7B", "Olmo2ForCausalLM", ""),
    ("Olmo 3 7B", "Olmo3ForCausalLM", ""),
    ("AFM 4.5B", "ArceeForCausalLM", ""),
    ("GLM-4-0414 9B", "Glm4ForCausalLM", ""),
    ("Apertus 8B", "ApertusForCausalLM", ""),
    ("MiniCPM 4 0.5B, 8B", "MiniCPMForCausalLM", ""),
    ("gpt-oss 20B", "GptOssForCausalLM", ""),
)
MATRICES = """
## What counts as a layer's matrix
Scores, importance and error feedback see every matrix of a layer that llama-quantize would quantise. In a plain decoder
that is query, key, value and output of attention, gate, up and down of the feed-forward network. Others have:

"""
TWIN = """
The untrained twin, against which LieQ measures what training did, is drawn layer by layer by the initialiser of
transformers' own class, whatever the layer is made of. What a token gives to all layers of Gemma 4 is drawn once for
each kind of layer. Matrices of experts take part in all but LieQ's spectra and error feedback, since each sees few
tokens.
"""
USUAL = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
TESTED = """
Each of the tiny models has random weights, rows that K types fit, and a tokenizer with the structure of the real one,
trained on the tests' texts. For each one, `tests/test_families.py` shows four things:
* The streamed pass, layer by layer, gives the logits of transformers' whole model.
* Our F16 file in llama.cpp gives them too, but for rounding, on 128 tokens, longer than the windows that llama.cpp
  computes. Of `GptOssForCausalLM` transformers is told to round the range of YaRN as llama.cpp does; the published
  models have `truncate` off, and a warning says what that means.
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
    rows, tiny = [], {**TINY_MODELS, **TEXT_PARTS}
    for family in FAMILIES:
        about = (inspect.getdoc(inspect.getmodule(type(family))) or "").partition("\n")[0].partition(": ")[2]
        classes = ", ".join(f"`{name}`" for name in family.source_classes)
        models = [f"`{name}`: {m.stands_for}" for name, m in tiny.items() if _family_of(m) is family]
        n_lines = len(inspect.getsource(inspect.getmodule(type(family))).splitlines())  # type: ignore[arg-type]
        cells = (f"`{family.gguf_name}`", classes, about.rstrip("."), "; ".join(models), str(n_lines))
        rows.append(f"| {' | '.join(cells)} |\n")
    names = ", ".join(f"`{name}`" for name, _ in groupby(sorted(row.name for row in TABLE)))
    small = "".join(f"| {name} | `{kind}` | {treatment(kind, text)} |\n" for name, kind, text in MODELS)
    page = HEAD + "".join(rows) + SMALL + small + MATRICES + unusual_matrices() + TWIN + TESTED
    return page + names + ". For others say `--pre-tokenizer NAME`.\n"


def treatment(kind: str, text: str) -> str:
    """What is done with a model, by its class and the type of its text part."""
    config = {"architectures": [kind]} | ({"text_config": {"model_type": text}} if text else {})
    classes = language_model_config(config)["architectures"]
    names = dict.fromkeys(family.gguf_name for family in FAMILIES if classes[0] in family.source_classes)
    if not names:
        return "from an F16 GGUF of llama.cpp's converter; types by the weighted error of the weights"
    inside = "its language model, " if text else ""
    return f"{inside}from the directory, with all scores and error feedback (`{'`, `'.join(names)}`)"


def unusual_matrices() -> str:
    """A line for every family that has other matrices in its layers than a plain decoder."""
    lines = []
    for family in FAMILIES:
        roles = dict.fromkeys(m.role for m in family.modules if len(m.shape) > 1 and not m.is_fixed)
        others = ", ".join(f"`{role}`" for role in roles if role not in USUAL)
        if others:
            lines.append(f"* `{family.gguf_name}`: {others}\n")
    return "".join(lines)


def _family_of(model: TinyModel) -> Decoder:
    """Of the families with one name in llama.cpp, that of transformers' name and settings, or the first."""
    named = [family for family in FAMILIES if family.gguf_name == model.family]
    fitting = (f for f in named if f.model_type == model.model_type and f.has_model(model.settings))
    return next(fitting, named[0])


def main() -> None:
    """Write or compare."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE} is out of date; run `make docs` and commit it")


if __name__ == "__main__":
    main()

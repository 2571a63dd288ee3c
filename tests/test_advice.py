"""The advice of refusals works: each one is made on the command line, and then what it says is done.

A row is a command that is refused, what the message says, and the commands that follow its advice, which must succeed.
Left out is what cannot be followed here: to download a file again, to log in, to free space, to reinstall a package,
to convert with llama.cpp's converter, to report a mistake of this program, to wait until the machine is idle, and to
name another model. The hub's refusals are tested in test_hub.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from support import tokenizer_fixtures
from support.command import CliResult, RunCli, assert_refused
from support.families import TINY_MODELS
from support.gguf_files import as_architecture, rewrite, split
from support.models import write_model
from support.published import Published, fp8, write_both
from support.reports import Change, edit_json, edit_weights
from support.requests import convert_plainly, measured, on_text
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import lieq_gguf
from lieq_gguf.allocation.allocate import allocate
from lieq_gguf.allocation.build import build_problem
from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.cli.commands import app
from lieq_gguf.evaluation import bench_types
from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.quant_types import parse_types
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.sources.model_directory import ModelDirectory

QUICKLY = dict.fromkeys(("convert", "plan", "score", "imatrix"), ("-q", "--n-tokens", 64)) | {"run": (), "inspect": ()}
PLAIN = "--types Q4_K --bits 4.5 --no-imatrix"
TEXT = "The quick brown fox jumps over the lazy dog. Numbers: 1 2 3 5 8 13 21.\n" * 60
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
UP = "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class Row:
    """A refusal and its advice.

    Attributes:
        refused: The command, with names of ``MAKERS`` in braces; ``{model}`` is a copy of its own, ``{out}`` a folder.
        found: What the message says of what was found.
        advice: What it says to do, word for word.
        followed: Commands that do it, each of which must succeed.
        of: What the copy is made of.
        change: Makes the copy one that is refused.
        mend: What the advice has people do to the copy.
        exit_code: 2 for wrong usage.
    """

    refused: str
    found: str
    advice: str
    followed: tuple[str, ...]
    of: str = "tiny"
    change: Change = lambda _path: None
    mend: Change = lambda _path: None
    exit_code: int = 1


def usage(refused: str, found: str, advice: str, *followed: str) -> Row:
    """A command that is wrong usage."""
    return Row(refused, found, advice, followed, exit_code=2)


class Models(dict[str, Path]):
    """Models and files by name, each made when it is first asked for; read-only."""

    def __init__(self, folder: Path) -> None:
        """Make them in a folder."""
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = MAKERS[name](self, self.folder / name)
        return self[name]


def llama(**settings: object) -> Callable[[Models, Path], Path]:
    """A tiny Llama."""
    return lambda _models, path: write_model(path, **settings)  # type: ignore[arg-type]


def tokenized(write: Callable[[Path], int]) -> Callable[[Models, Path], Path]:
    """A tiny Llama with another tokenizer."""
    return lambda _models, path: write_model(path, write_tokenizer=write)


def plain_file(models: Models, path: Path) -> Path:
    return convert_plainly(models["f16-model"], path.with_suffix(".gguf"))


def quantised_file(models: Models, path: Path) -> Path:
    return convert_plainly(models["tiny"], path.with_suffix(".gguf"), "Q4_K")


def gemma_file(models: Models, path: Path) -> Path:
    """An architecture that is none of ours: the first Gemma."""
    return rewrite(models["f16"], path.with_suffix(".gguf"), as_architecture("gemma"))


def parts(models: Models, path: Path) -> Path:
    """A folder with a file in two parts."""
    path.mkdir()
    split(models["f16"], path, 2)
    return path


def published(models: Models, path: Path) -> Path:
    """A model whose weights are published in FP8."""
    return write_both(models["tiny"], Published(FP8, fp8((128, 128))), path)[0]


def failing_template(models: Models, path: Path) -> Path:
    """A file whose chat template refuses every conversation."""
    template = {"tokenizer.chat_template": "{{ raise_exception('no system message') }}"}
    return rewrite(models["f16"], path.with_suffix(".gguf"), lambda values: values.update(template))


def adapter(_models: Models, path: Path) -> Path:
    path.mkdir()
    module = f"base_model.model.{UP}"
    lora = {f"{module}.lora_A.weight": torch.randn(4, 256), f"{module}.lora_B.weight": torch.randn(512, 4) / 10}
    save_file(lora, path / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json("adapter_config.json", peft_type="LORA", r=4, lora_alpha=8, base_model_name_or_path="tiny")(path)
    return path


def records(models: Models, path: Path) -> Path:
    """A folder with scores, an importance matrix and a plan of the tiny model."""
    path.mkdir()
    source, types = ModelDirectory(models["tiny"]), parse_types(["Q2_K", "Q4_K"])
    found = measured(source, types, on_text(None, 64))
    assert found.scores is not None and found.importance is not None
    found.scores.save(path / "scores.json", "lieq")
    save_importance(found.importance, path / "imatrix.gguf")
    options = AllocationOptions(types=types[1:])
    allocate(build_problem(source.spec, BitBudget("bits", 4.5), options), None).save(path / "plan.json", {})
    return path


def record(name: str) -> Callable[[Models, Path], Path]:
    """One of the records."""
    return lambda models, _path: models["records"] / name


def text_of(n_characters: int) -> Callable[[Models, Path], Path]:
    def write(_models: Models, path: Path) -> Path:
        path.write_text(TEXT[:n_characters], encoding="utf-8")
        return path

    return write


MAKERS: Mapping[str, Callable[[Models, Path], Path]] = {
    "tiny": llama(),
    "small": llama(num_hidden_layers=2),
    "untied": llama(tie_word_embeddings=False),
    "f16-model": llama(dtype=torch.float16),
    "biased": llama(attention_bias=True),
    "mixed": llama(hidden_size=256, intermediate_size=320),  # rows that fit blocks of 256, and rows that do not
    "narrow": llama(hidden_size=192, intermediate_size=320),  # only rows that do not
    "odd": llama(hidden_size=80, intermediate_size=160),  # rows that fit no blocks at all
    "llama-2": tokenized(tokenizer_fixtures.write_llama_2),
    "llama-2-model": tokenized(tokenizer_fixtures.write_llama_2_model_only),
    "f16": plain_file,
    "q4": quantised_file,
    "gemma": gemma_file,
    "parts": parts,
    "failing-template": failing_template,
    "granite-swa": lambda _models, path: TINY_MODELS["granite_swa"].write(path),
    "fp8": published,
    "adapter": adapter,
    "records": records,
    "scores": record("scores.json"),
    "imatrix": record("imatrix.gguf"),
    "plan": record("plan.json"),
    "text": text_of(4000),
    "short-text": text_of(12),
}


def change_tokenizer(change: Callable[[dict[str, object]], object]) -> Change:
    """Change tokenizer.json."""

    def edit(path: Path) -> None:
        content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        change(content)
        (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    return edit


def change_plan(tensor: str, quant_type: str) -> Change:
    """Give a tensor another type, as people do by hand."""

    def change(path: Path) -> None:
        types = json.loads((path / "plan.json").read_text())["types"]
        edit_json("plan.json", types=types | {tensor: quant_type})(path)

    return change


def add_large_id(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 5000, "content": "<far>"})


def remove_large_id(content: dict[str, Any]) -> None:
    content["added_tokens"].pop()


def spell_otherwise(path: Path) -> None:
    """Steps that split as before, in a form that is not in our table."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    nothing = pre_tokenizers.Split(Regex("\x00"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([nothing, digits, words])
    tokenizer.save(str(path / "tokenizer.json"))


def name_last_token(text: str) -> Change:
    """Give the last token of the vocabulary another text."""

    def change(path: Path) -> None:
        last = json.loads((path / "config.json").read_text())["vocab_size"] - 1
        added = json.loads((path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        edit_json("tokenizer_config.json", added_tokens_decoder=added | {str(last): {"content": text}})(path)

    return change


def without_bos(path: Path) -> None:
    """A SentencePiece model without the token that every text should begin with."""
    file = path / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    model.trainer_spec.bos_id = -1
    model.pieces[1].piece, model.pieces[1].type = "<begin>", model.pieces[1].USER_DEFINED
    file.write_bytes(model.SerializeToString())


def pickle_weights(path: Path) -> None:
    file = path / "model.safetensors"
    torch.save(load_file(file), path / "pytorch_model.bin")
    file.unlink()


def save_again(path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)


def huge(name: str) -> Change:
    """A weight beyond the range of F16."""
    return edit_weights(lambda weights: weights[name].__setitem__((3, 0), 1e6))


def without_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if not name.endswith(".bias")}


def name_rotated_layers(path: Path) -> None:
    """A base of zero for the layers that are not rotated."""
    rotated = json.loads((path / "config.json").read_text())["no_rope_layers"]
    edit_json("config.json", layer_rope_theta=[10_000.0 if is_rotated else 0.0 for is_rotated in rotated])(path)


def second_part(do: Callable[[Path, Path], object]) -> Change:
    """Do something with the second part of a file and a place outside of its folder."""
    return lambda path: do(path / "whole-00002-of-00002.gguf", path.with_name("elsewhere"))


def rename_embedding(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embeddings.weight"] = weights.pop("model.embed_tokens.weight")


TARGETS = (
    Row("plan {tiny} --types Q2_K,Q4_K --bits 2.1", "2.6250 to 4.5000",
        "--types allows smaller types, for example IQ2_XXS", ("plan {tiny} --types Q2_K,Q4_K,IQ2_XXS --bits 2.1",)),
    Row("plan {tiny} --types Q2_K,Q4_K --bits 2.1 --no-imatrix", "2.6250 to 4.5000",
        "smaller types, for example IQ2_XXS, if you drop --no-imatrix",
        ("plan {tiny} --types Q2_K,Q4_K,IQ2_XXS --bits 2.1",)),
    Row("plan {tiny} --types IQ2_XXS,Q2_K --bits 2.1 --no-imatrix", "only 2.6250 bits",
        "drop --no-imatrix, which rules out IQ2_XXS", ("plan {tiny} --types IQ2_XXS,Q2_K --bits 2.1",)),
    Row("plan {tiny} --types Q2_K,Q4_K --bits 5 --nominal", "2.0000 to 4.0000", "for example Q5_0",
        ("plan {tiny} --types Q2_K,Q4_K,Q5_0 --bits 5 --nominal",)),
    Row("plan {tiny} --types Q2_K,Q4_K --bits 9", "2.6250 to 4.5000", "--types allows larger types, for example F16",
        ("plan {tiny} --types Q2_K,Q4_K,F16 --bits 9",)),
    Row("plan {tiny} --types Q4_K --bits 20", "only 4.5000 bits", "larger types, for example F32",
        ("plan {tiny} --types Q4_K,F32 --bits 20",)),
    Row("plan {tiny} --types Q4_K --bits 1 --no-imatrix", "only 4.5000 bits", "choose a target inside this range",
        ("plan {tiny} --types Q4_K --bits {limit} --no-imatrix",)),
    Row("plan {tiny} --types Q4_K --size 100KB --no-imatrix", "can have only", "choose a target inside this range",
        ("plan {tiny} --types Q4_K --size {limit} --no-imatrix",)),
    Row("plan {tiny} --types Q2_K,Q4_K --size 100KB --no-imatrix", " to 1,2", "choose a target inside this range",
        ("plan {tiny} --types Q2_K,Q4_K --size {limit} --no-imatrix",)),
    Row("plan {tiny} --types Q4_K --file-bits 3 --no-imatrix", "embedding and output are 17% of the weights",
        "--types allows smaller types, for example Q2_K",
        ("plan {tiny} --types Q4_K,Q2_K --file-bits 3 --no-imatrix",)),
    Row("plan {tiny} --types Q2_K,Q4_K --file-bits 3.2 --embedding-type Q8_0", "in Q8_0",
        "--embedding-type Q4_K makes them small enough",
        ("plan {tiny} --types Q2_K,Q4_K --file-bits 3.2 --embedding-type Q4_K",)),
    Row("plan {tiny} --types Q2_K,Q4_K --file-bits 3.2 --output-type Q8_0", "in Q8_0",
        "--output-type Q4_K makes them small enough",
        ("plan {tiny} --types Q2_K,Q4_K --file-bits 3.2 --output-type Q4_K",)),
    Row("plan {untied} --types Q2_K,Q4_K --file-bits 3.5 --method zd", "in Q4_K, Q6_K",
        "--embedding-type Q4_K --output-type Q4_K makes them small enough",
        ("plan {untied} --types Q2_K,Q4_K --file-bits 3.5 --method zd --embedding-type Q4_K --output-type Q4_K",)),
    Row("plan {tiny} --types Q2_K,Q4_K --bits 2.7 --pin ffn_down=Q8_0", "3 matrices of the layers are pinned",
        "leave out --pin", ("plan {tiny} --types Q2_K,Q4_K --bits 2.7",)),
    Row("plan {tiny} --types IQ2_XXS,Q2_K --profile edge --bits 2.1", "only 2.6250 bits",
        "--profile quality or cpu has smaller types",
        ("plan {tiny} --types IQ2_XXS,Q2_K --profile quality --bits 2.1",
         "plan {tiny} --types IQ2_XXS,Q2_K --profile cpu --bits 2.1")),
    Row("plan {mixed} --types Q2_K,Q4_0 --method lieq-ladder --bits 3.5", "rows of 320 weights do not fit",
        "--granularity tensor uses those where they fit",
        ("plan {mixed} --types Q2_K,Q4_0 --method lieq-ladder --bits 3.5 --granularity tensor",)),
    *(Row(f"plan {{narrow}} --bits 3 --no-imatrix {more}", "rows of 192 and 320 weights", "--types +Q2_0 allows",
          (f"plan {{narrow}} --bits 3 --no-imatrix {more} --types +Q2_0",))
      for more in ("--method lieq", "--method lieq-ladder", "--profile edge")),
    Row("plan {odd} --no-imatrix --bits 4.5", "13.4445 to 16.0000", "choose a target inside this range",
        ("plan {odd} --no-imatrix --bits {limit}",)),
    Row(f"plan {{tiny}} {PLAIN} --min-tokens-per-sec 1e6", "tokens/s", "name no more than that",
        (f"plan {{tiny}} {PLAIN} --min-tokens-per-sec {{limit}}",)),
)  # fmt: skip
TYPES = (
    Row("plan {mixed} --types Q2_K --bits 3", "fits rows of 320 weights in layer 0",
        "--types Q2_0,Q4_0,IQ4_NL,Q5_0,Q8_0", ("plan {mixed} --types Q2_0,Q4_0,IQ4_NL,Q5_0,Q8_0 --bits 3",)),
    Row("plan {odd} --types Q4_K --bits 4.5", "fits rows of 80 weights in layer 0",
        "--types F16, at 16 bits per weight", ("plan {odd} --types F16 --bits 16",)),
    Row("plan {tiny} --types Q2_K,Q6_K,Q8_0 --bits 3 --method lieq", "cannot be met with two widths",
        "use --method best, or two of these: --types Q2_K,Q6_K",
        ("plan {tiny} --types Q2_K,Q6_K,Q8_0 --bits 3 --method best",
         "plan {tiny} --types Q2_K,Q6_K --bits 3 --method lieq",)),
    Row("plan {mixed} --types Q2_K,Q4_0,Q8_0 --method lieq --granularity tensor --bits 4.2",
        "types that fit all layers: Q4_0, Q8_0", "use --method best",
        ("plan {mixed} --types Q2_K,Q4_0,Q8_0 --method best --granularity tensor --bits 4.2",)),
    Row("plan {tiny} --types F16 --bits 16 --method lieq", "types that fit all layers: F16", "use --method best",
        ("plan {tiny} --types F16 --bits 16 --method best",)),
    Row("plan {tiny} --types Q2_K,Q4_K --bits 3 --method lieq --min-tokens-per-sec 1", "does not consider speed",
        "leave out --min-tokens-per-sec", ("plan {tiny} --types Q2_K,Q4_K --bits 3 --method lieq",)),
    Row("plan {tiny} --types IQ2_XXS --bits 3 --profile edge", "has K and legacy types only", "add K types",
        ("plan {tiny} --types IQ2_XXS,Q2_K,Q4_K --bits 3 --profile edge",)),
    Row("plan {tiny} --types IQ2_XXS,IQ3_XXS --bits 3 --no-imatrix", "need an importance matrix",
        "drop --no-imatrix or add K types",
        ("plan {tiny} --types IQ2_XXS,IQ3_XXS --bits 3",
         "plan {tiny} --types IQ2_XXS,IQ3_XXS,Q2_K,Q4_K --bits 3 --no-imatrix")),
    Row("plan {tiny} --types IQ2_XXS,IQ2_XS --size 650KB", "which token_embd.weight may lack",
        "add a K type, or name another type with --embedding-type",
        ("plan {tiny} --types IQ2_XXS,IQ2_XS,Q2_K --size 650KB",
         "plan {tiny} --types IQ2_XXS,IQ2_XS --size 650KB --embedding-type Q2_K",)),
    Row("plan {untied} --types IQ2_XXS,IQ2_XS --size 760KB", "which token_embd.weight and output.weight may lack",
        "name another type with --embedding-type and --output-type",
        ("plan {untied} --types IQ2_XXS,IQ2_XS --size 760KB --embedding-type Q2_K --output-type Q2_K",)),
    Row(f"plan {{tiny}} {PLAIN} --embedding-type Q4_0 --output-type Q8_0", "cannot be both Q4_0 and Q8_0",
        "leave out --embedding-type or --output-type",
        (f"plan {{tiny}} {PLAIN} --embedding-type Q4_0", f"plan {{tiny}} {PLAIN} --output-type Q8_0")),
    Row(f"plan {{tiny}} {PLAIN} --pin token_embd=Q4_0 --embedding-type Q8_0", "and also asked for Q8_0",
        "leave out one of the two",
        (f"plan {{tiny}} {PLAIN} --pin token_embd=Q4_0", f"plan {{tiny}} {PLAIN} --embedding-type Q8_0")),
    Row(f"plan {{tiny}} {PLAIN} --pin token_embd=IQ1_S", "which embedding and output may lack",
        "name another type, for example Q2_K", (f"plan {{tiny}} {PLAIN} --pin token_embd=Q2_K",)),
    Row("plan {mixed} --types IQ4_NL --bits 4.5 --pin ffn_down=Q4_K", "it does not fit its rows",
        "name another type, for example IQ4_NL", ("plan {mixed} --types IQ4_NL --bits 4.5 --pin ffn_down=IQ4_NL",)),
    Row("plan {tiny} --types Q4_K,Q8_0 --bits 4.5 --no-imatrix --pin ffn_down=IQ1_S", "needs an importance matrix",
        "drop --no-imatrix", ("plan {tiny} --types Q4_K,Q8_0 --bits 4.5 --pin ffn_down=IQ1_S",)),
    Row(f"plan {{tiny}} {PLAIN} --pin attn_qq=Q4_K", "matches no matrix",
        "their names are like blk.2.ffn_down.weight", (f"plan {{tiny}} {PLAIN} --pin blk.2.ffn_down.weight=Q4_K",)),
    Row("convert {model} --types F16 --bits 16 -o {out}/a.gguf", "blk.1.ffn_up.weight", "choose another with --types",
        ("convert {model} --types BF16 --bits 16 -o {out}/a.gguf",), change=huge(f"{UP}.weight")),
    Row(f"convert {{model}} {PLAIN} --embedding-type F16 -o {{out}}/a.gguf", "token_embd.weight",
        "choose another with --embedding-type",
        (f"convert {{model}} {PLAIN} --embedding-type BF16 -o {{out}}/a.gguf",),
        change=huge("model.embed_tokens.weight")),
)  # fmt: skip
SOURCES = (
    Row(f"plan {{f16}} {PLAIN} --mtp keep", "is a GGUF file", "leave out --mtp", (f"plan {{f16}} {PLAIN}",)),
    Row(f"plan {{tiny}} {PLAIN} --mtp keep", "has no head", "leave out --mtp keep", (f"plan {{tiny}} {PLAIN}",)),
    Row(f"plan {{f16}} {PLAIN} --adapter {{adapter}}", "is a GGUF file", "give the directory of the model",
        (f"plan {{f16-model}} {PLAIN} --adapter {{adapter}}",)),
    *(Row(f"plan {{{name}}} {PLAIN} --initializer-range 0.3", found, "leave out --initializer-range",
          (f"plan {{{name}}} {PLAIN}",))
      for name, found in {"tiny": "is not a GGUF file", "f16": "0.05", "gemma": "is run by llama.cpp"}.items()),
    Row(f"plan {{f16}} {PLAIN} --pre-tokenizer qwen2", "names its own", "leave out --pre-tokenizer",
        (f"plan {{f16}} {PLAIN}",)),
    Row(f"plan {{q4}} {PLAIN}", "is already quantised (Q4_K)", "convert the original, or pass --allow-requantize",
        (f"plan {{tiny}} {PLAIN}", f"plan {{q4}} {PLAIN} --allow-requantize")),
    *(Row(f"{command} {{q4}} {more}", "is already quantised", "pass --allow-requantize",
          (f"{command} {{q4}} {more} --allow-requantize",))
      for command, more in {"score": "--types Q4_K", "imatrix": "-o {out}/i.gguf"}.items()),
    Row(f"convert {{f16}} {PLAIN} --force -o {{f16}}", "is the model to read", "another file to write, with -o",
        (f"convert {{f16}} {PLAIN} --force -o {{out}}/a.gguf",)),
    Row(f"plan {{parts}}/whole-00002-of-00002.gguf {PLAIN}", "is part 00002 of 2",
        "give the first, whole-00001-of-00002.gguf", (f"plan {{parts}}/whole-00001-of-00002.gguf {PLAIN}",)),
    Row(f"plan {{model}}/whole-00001-of-00002.gguf {PLAIN}", "whole-00002-of-00002.gguf is missing",
        "put it in the same folder", (f"plan {{model}}/whole-00001-of-00002.gguf {PLAIN}",), of="parts",
        change=second_part(lambda part, elsewhere: part.rename(elsewhere)),
        mend=second_part(lambda part, elsewhere: elsewhere.rename(part))),
    Row("verify {q4} --source {tiny} --revision main", "is not a model on the hub", "leave out --revision main",
        ("verify {q4} --source {tiny}",)),
    Row(f"plan {{adapter}} {PLAIN}", "is an adapter", "give its base model, and the adapter with --adapter",
        (f"plan {{tiny}} {PLAIN} --adapter {{adapter}}",)),
    Row("verify {q4} --source {adapter}", "is an adapter", "give its base model, and the adapter with --adapter",
        (f"convert {{tiny}} {PLAIN} --adapter {{adapter}} -o {{out}}/a.gguf",
        "verify {out}/a.gguf --source {tiny} --adapter {adapter}",)),
    Row("eval {q4} --reference {adapter} --text {text} --chunks 1 --n-ctx 64", "is an adapter",
        "convert MODEL --adapter {adapter} --types F16 --bits 16",
        ("convert {tiny} --adapter {adapter} --types F16 --bits 16 -o {out}/f16.gguf",
         "eval {q4} --reference {out}/f16.gguf --text {text} --chunks 1 --n-ctx 64",)),
    Row("eval {q4} --reference {model} --text {text} --chunks 1 --n-ctx 64", "names that transformers does not read",
        "make an F16 GGUF of it (convert --types F16 --bits 16) and compare with that",
        ("convert {model} --types F16 --bits 16 -o {out}/f16.gguf",
        "eval {q4} --reference {out}/f16.gguf --text {text} --chunks 1 --n-ctx 64",), of="fp8",
        change=edit_weights(rename_embedding)),
    Row(f"plan {{model}} {PLAIN}", "unsupported architecture GPT2LMHeadModel",
        "give that file instead of the directory", (f"plan {{gemma}} {PLAIN}",),
        change=edit_json("config.json", architectures=["GPT2LMHeadModel"])),
    Row(f"plan {{model}} {PLAIN}", "holds only pickled weights",
        "re-save the model with transformers' save_pretrained", (f"plan {{model}} {PLAIN}",), change=pickle_weights,
        mend=save_again),
    Row(f"plan {{model}} {PLAIN}", "although its config.json says gptq", "remove quantization_config there",
        (f"plan {{model}} {PLAIN}",),
        change=edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64}),
        mend=edit_json("config.json", quantization_config=None)),
    Row(f"plan {{model}} {PLAIN}", "no_rope_layers in config.json is [", "layer_rope_theta with a base of 0 for these",
        (f"plan {{model}} {PLAIN}",), of="granite-swa", change=edit_json("config.json", layer_rope_theta=None),
        mend=name_rotated_layers),
    *(Row(f"plan {{model}} {PLAIN}", "attention_bias in config.json is not set",
          "remove it from the weights, or set attention_bias", (f"plan {{model}} {PLAIN}",), of="biased",
          change=edit_json("config.json", attention_bias=False), mend=mend)
      for mend in (edit_weights(without_biases), edit_json("config.json", attention_bias=True))),
)  # fmt: skip
RUN_BY_LLAMA_CPP = (
    Row("plan {gemma} --types Q2_K,Q4_K --bits 3 --method block-error", "cannot give the block errors",
        "expected --method weighted-error, lim or zd",
        tuple(f"plan {{gemma}} --types Q2_K,Q4_K --bits 3 --method {name}"
              for name in ("weighted-error", "lim", "zd"))),
    Row("plan {gemma} --types Q2_K,Q4_K --bits 3 --method lieq", "cannot give 'lieq'", "or another --layer-score",
        ("plan {gemma} --types Q2_K,Q4_K --bits 3 --method lieq --layer-score zd",)),
    Row("score {gemma} --types Q2_K --layer-score energy-gain", "cannot give 'energy-gain'", "expected zd or lim",
        tuple(f"score {{gemma}} --types Q2_K --layer-score {name}" for name in ("zd", "lim"))),
    Row(f"convert {{gemma}} {PLAIN} --error-feedback -o {{out}}/a.gguf", "cannot run a layer again",
        "use --no-error-feedback", (f"convert {{gemma}} {PLAIN} --no-error-feedback -o {{out}}/a.gguf",)),
    Row("imatrix {gemma} --device meta -o {out}/i.gguf", "here only on the CPU", "leave out --device meta",
        ("imatrix {gemma} -o {out}/i.gguf",)),
)  # fmt: skip
TOKENIZERS = (
    Row(f"convert {{model}} {PLAIN} -o {{out}}/a.gguf", "the nearest are smollm, ", "pass --pre-tokenizer NAME",
        (f"convert {{model}} {PLAIN} --pre-tokenizer smollm -o {{out}}/a.gguf",), change=spell_otherwise),
    Row(f"convert {{model}} {PLAIN} --pre-tokenizer tekken -o {{out}}/a.gguf", "tokenises differently",
        "name the right pre-tokenizer with --pre-tokenizer",
        (f"convert {{model}} {PLAIN} --pre-tokenizer smollm -o {{out}}/a.gguf",), change=spell_otherwise),
    Row(f"plan {{tiny}} {PLAIN} --pre-tokenizer smolm", "the nearest are smollm, ",
        "pass one of these with --pre-tokenizer NAME, or leave it out",
        (f"plan {{tiny}} {PLAIN} --pre-tokenizer smollm", f"plan {{tiny}} {PLAIN}")),
    Row(f"plan {{llama-2}} {PLAIN} --pre-tokenizer llama-bpe", "SentencePiece-style", "leave out --pre-tokenizer",
        (f"plan {{llama-2}} {PLAIN}",)),
    Row(f"plan {{model}} {PLAIN}", "the vocabulary holds '<s>' 2 times", "rename all but one in the tokenizer files",
        (f"plan {{model}} {PLAIN}",), of="llama-2", change=name_last_token("<s>"), mend=name_last_token("<other>")),
    Row(f"plan {{model}} {PLAIN}", "token '<far>' has id", "remove larger ids from the tokenizer files",
        (f"plan {{model}} {PLAIN}",), change=change_tokenizer(add_large_id), mend=change_tokenizer(remove_large_id)),
    Row("imatrix {model} -o {out}/i.gguf", "has no BOS token", "set add_bos_token to false in tokenizer_config.json",
        ("imatrix {model} -o {out}/i.gguf",), of="llama-2-model", change=without_bos,
        mend=edit_json("tokenizer_config.json", add_bos_token=False)),
)  # fmt: skip
FILES = (
    Row("imatrix {tiny} -o {out}/none/i.gguf", "does not exist", "create it first",
        ("imatrix {tiny} -o {out}/i.gguf",)),
    Row("imatrix {tiny} --calibration {short-text} -o {out}/i.gguf", "tokens; expected at least 16",
        "better a few thousand", ("imatrix {tiny} --calibration {text} -o {out}/i.gguf",)),
    Row("imatrix {tiny} --device toaster -o {out}/i.gguf", "cannot be used", "try --device cpu",
        ("imatrix {tiny} --device cpu -o {out}/i.gguf",)),
    *(Row(f"{command} {{tiny}} {more}", "is a folder", "expected a GGUF file, which convert makes of a model directory",
          (f"convert {{tiny}} {PLAIN} -o {{out}}/a.gguf", f"{command} {{out}}/a.gguf {more}"))
      for command, more in {
          "inspect": "", "verify": "", "run": "word -n 2", "bench": "-p 8 -n 2 -r 1 -t 1",
          "eval": "--reference {f16} --text {text} --n-ctx 64 --chunks 1",
      }.items()),
    Row("eval {q4} --reference {out}/none --text {text} --n-ctx 64 --chunks 1", "none does not exist",
        "expected a GGUF file, a model directory",
        tuple(f"eval {{q4}} --reference {{{name}}} --text {{text}} --n-ctx 64 --chunks 1" for name in ("f16", "tiny"))),
    Row("eval {q4} --reference {f16} --text {text} --n-ctx 4096", "the text has",
        "use a smaller --n-ctx, or a longer --text",
        ("eval {q4} --reference {f16} --text {text} --n-ctx 64 --chunks 1",)),
    Row("run {failing-template} word -n 2", "no system message", "--raw continues the text without it",
        ("run {failing-template} word -n 2 --raw",)),
    Row("run {q4} '" + "word " * 3000 + "' -n 2", "exceed context window", "shorten the prompt",
        ("run {q4} word -n 2",)),
)  # fmt: skip
SCORED = "--types Q2_K,Q4_K --bits 3 --no-imatrix"
RECORDS = (
    Row("plan {tiny} --types Q2_K,Q6_K --bits 3 --no-imatrix --scores-file {scores}", "have no errors for Q6_K",
        "score again with --types Q2_K,Q4_K,Q6_K, or leave those types out here",
        ("score {tiny} --types Q2_K,Q4_K,Q6_K -o {out}/s.json",
         "plan {tiny} --types Q2_K,Q6_K --bits 3 --no-imatrix --scores-file {out}/s.json",
         f"plan {{tiny}} {SCORED} --scores-file {{scores}}")),
    Row(f"plan {{tiny}} {SCORED} --scores-file {{scores}} --layer-score perplexity-drop",
        "the scores have no 'perplexity-drop'", "name one of these with --layer-score",
        (f"plan {{tiny}} {SCORED} --scores-file {{scores}} --layer-score lim",)),
    Row(f"plan {{tiny}} {SCORED} --scores-file {{model}}/scores.json", "the scores have no block error",
        "score again, or use --method lieq-ladder",
        (f"plan {{tiny}} {SCORED} --scores-file {{model}}/scores.json --method lieq-ladder",
         "score {tiny} --types Q2_K,Q4_K -o {out}/s.json", f"plan {{tiny}} {SCORED} --scores-file {{out}}/s.json"),
        of="records", change=edit_json("scores.json", sensitivities={})),
    Row(f"plan {{small}} {SCORED} --scores-file {{scores}}", "small has 2", "score it again",
        ("score {small} --types Q2_K,Q4_K -o {out}/s.json", f"plan {{small}} {SCORED} --scores-file {{out}}/s.json")),
    Row("convert {small} --plan {plan} -o {out}/a.gguf", "does not belong to small", "make a plan of small",
        (f"plan {{small}} {PLAIN} -o {{out}}/p.json",
         "convert {small} --plan {out}/p.json --no-imatrix -o {out}/a.gguf")),
    Row("convert {tiny} --plan {model}/plan.json --no-imatrix -o {out}/a.gguf", "that need an importance matrix",
        "drop --no-imatrix", ("convert {tiny} --plan {model}/plan.json --no-error-feedback -o {out}/a.gguf",),
        of="records", change=change_plan("blk.0.attn_q.weight", "IQ2_XXS")),
    Row("convert {tiny} --plan {model}/plan.json --no-imatrix -o {out}/a.gguf", "may lack one", "choose another type",
        ("convert {tiny} --plan {model}/plan.json --no-imatrix -o {out}/a.gguf",),
        of="records", change=change_plan("token_embd.weight", "IQ2_XXS"),
        mend=change_plan("token_embd.weight", "Q4_K")),
    Row("convert {tiny} --plan {model}/plan.json --no-imatrix -o {out}/a.gguf", "which does not fit",
        "and F32 for vectors", ("convert {tiny} --plan {model}/plan.json --no-imatrix -o {out}/a.gguf",),
        of="records", change=change_plan("output_norm.weight", "Q4_K"),
        mend=change_plan("output_norm.weight", "F32")),
    Row("plan {mixed} --types Q4_0 --bits 4.5 --imatrix {imatrix}", "the importance matrix has 512 columns",
        "expected one made from this model",
        ("imatrix {mixed} -o {out}/i.gguf", "plan {mixed} --types Q4_0 --bits 4.5 --imatrix {out}/i.gguf")),
    Row(f"plan {{tiny}} {PLAIN} -o {{model}}/config.json", "exists already",
        "choose another name with -o, or replace it with --force",
        (f"plan {{tiny}} {PLAIN} -o {{out}}/p.json", f"plan {{tiny}} {PLAIN} -o {{model}}/config.json --force")),
)  # fmt: skip
USAGE = (
    usage("plan {tiny}", "--bits", "give exactly one of --bits, --file-bits and --size", f"plan {{tiny}} {PLAIN}"),
    usage("convert {tiny} --bits 4 --plan {plan}", "--bits",
          "give exactly one of --bits, --file-bits, --size and --plan",
          "convert {tiny} --plan {plan} --no-imatrix -o {out}/a.gguf"),
    usage("plan {tiny} --types Q4_K --no-imatrix --size 2MB --nominal", "a file has no nominal size",
          "goes with --bits",
          "plan {tiny} --types Q4_K --no-imatrix --bits 4 --nominal"),
    usage("plan {tiny} --bits 4.5 --types Q4_K --imatrix {imatrix} --no-imatrix", "--imatrix",
          "give --imatrix or --no-imatrix, not both", "plan {tiny} --bits 4.5 --types Q4_K --imatrix {imatrix}",
          f"plan {{tiny}} {PLAIN}"),
    usage(f"plan {{tiny}} {PLAIN} --json --format tensor-type-file", "both would print to stdout",
          "write the tensor types to a file with -o",
          f"plan {{tiny}} {PLAIN} --json --format tensor-type-file -o {{out}}/types.txt"),
    usage(f"plan {{tiny}} {PLAIN} --revision main", "is not a model on the hub", "leave this out",
          f"plan {{tiny}} {PLAIN}"),
    usage(f"plan {{tiny}} {PLAIN} --pin ffn_down", "is not a pin", "for example 'ffn_down=Q4_K'",
          f"plan {{tiny}} {PLAIN} --pin ffn_down=Q4_K"),
    usage(f"plan {{tiny}} {PLAIN} --embedding-type Q4_0,Q4_1", "names 2 types", "expected one",
          f"plan {{tiny}} {PLAIN} --embedding-type Q4_0"),
    usage("convert {tiny} --plan {plan} --types Q2_K", "the plan decides the types", "leave this out",
          "convert {tiny} --plan {plan} --no-imatrix -o {out}/a.gguf"),
    usage("convert {tiny} --bits 3 --types Q2_K,Q4_K --scores-file {scores} --imatrix {imatrix} --seed 1",
          "nothing is measured with these files", "leave this out",
          "convert {tiny} --bits 3 --types Q2_K,Q4_K --scores-file {scores} --imatrix {imatrix} -o {out}/a.gguf"),
    usage("verify {q4} --adapter {adapter}", "says how to read a model", "name the model with --source",
          f"convert {{tiny}} {PLAIN} --adapter {{adapter}} -o {{out}}/a.gguf",
          "verify {out}/a.gguf --source {tiny} --adapter {adapter}"),
    usage("bench", "FILE", "give a file", "bench {q4} -p 8 -n 2 -r 1 -t 1"),
    usage("bench {q4} -p 8 -n 2 -r 1 -t 1,x", "is not a list of thread counts", "expected for example 1,2,4",
          "bench {q4} -p 8 -n 2 -r 1 -t 1,2"),
)  # fmt: skip
ROWS = (*TARGETS, *TYPES, *SOURCES, *RUN_BY_LLAMA_CPP, *TOKENIZERS, *FILES, *RECORDS, *USAGE)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Models and files by name."""
    return Models(tmp_path_factory.mktemp("advice"))


@pytest.fixture(scope="session")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all rows, most of which measure the same models."""
    return tmp_path_factory.mktemp("passes")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.found[:40]}, {row.advice[:50]}")
def test_advice_works(
    row: Row, models: Models, passes: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIEQ_GGUF_CACHE", str(passes))
    out, copy = tmp_path / "out", tmp_path / "model"
    out.mkdir()
    places: ChainMap[str, Any] = ChainMap({"out": out, "model": copy}, models)
    if "{model}" in row.refused:
        shutil.copytree(models[row.of], copy)
        row.change(copy)

    def run(command: str) -> CliResult:
        arguments = shlex.split(command.format_map(places))
        return run_cli(*arguments, *QUICKLY.get(arguments[0], ("-q",)))

    done = run(row.refused)
    assert done.exit_code == row.exit_code, done.stderr
    message = refusal(done)
    limit = re.search(r"can have (?:only )?(\d[\d,.]*)", message)
    places["limit"] = limit[1].replace(",", "") if limit else ""
    assert row.found in message
    assert row.advice.format_map(places) in message
    assert list(out.iterdir()) == []
    row.mend(copy)
    for command in row.followed:
        followed = run(command)
        assert followed.exit_code == 0, followed.stderr


def refusal(done: CliResult) -> str:
    """The message: one line, or what wrong usage shows. Warnings about the model may come before it."""
    assert done.stdout == ""
    if done.exit_code == 2:
        return " ".join(done.stderr.split())
    *warnings, message = done.stderr.splitlines()
    assert message.startswith("error: ")
    assert all(line.startswith("warning: ") for line in warnings)
    return message


def test_folder_of_measured_costs(tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is measured; another folder is used, also for a table that is damaged."""
    monkeypatch.setattr("lieq_gguf.quant_types.DEFAULT_LADDER", parse_types(["Q4_K"]))
    monkeypatch.setattr(bench_types, "_N_LAYERS", 4)  # a quarter of the weights, less often: seconds, and noisier
    monkeypatch.setattr(bench_types, "_RUNS", 2)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIEQ_GGUF_DATA", str(tmp_path / "file" / "below"))
    measure = ("bench", "--types", "-t", 1, "-q")
    assert_refused(run_cli(*measure), "name another with LIEQ_GGUF_DATA")
    monkeypatch.setenv("LIEQ_GGUF_DATA", str(tmp_path))
    model, table = write_model(tmp_path / "model"), tmp_path / "decode-costs.json"
    table.write_text(json.dumps({"schema_version": 1, "kind": "decode-costs"}))
    assert_refused(run_cli("plan", model, *PLAIN.split()), "measure with bench --types")
    assert run_cli(*measure).exit_code == 0
    assert run_cli("plan", model, *PLAIN.split()).exit_code == 0


@pytest.mark.filterwarnings("ignore")  # PEFT warns of a bias, and asks transformers in an old way
def test_an_adapter_that_is_merged_with_peft(models: Models, tmp_path: Path, run_cli: RunCli) -> None:
    """One whose B has a bias, which PEFT adds to the model's own."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models["biased"]),
        LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    refused = run_cli("plan", models["biased"], *PLAIN.split(), "--adapter", tmp_path / "adapter")
    assert_refused(refused, "merge it with PEFT's merge_and_unload, save model and tokenizer, and convert that")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(models["biased"]).save_pretrained(tmp_path / "merged")
    done = run_cli("plan", tmp_path / "merged", *PLAIN.split(), "-q")
    assert done.exit_code == 0, done.stderr


def test_a_tokenizer_without_pre_tokenizer_is_not_told_to_name_one(tmp_path: Path, run_cli: RunCli) -> None:
    model = write_model(tmp_path / "model", write_tokenizer=tokenizer_fixtures.write_llama_2_json_only)
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}

    def change(content: dict[str, Any]) -> None:
        content["normalizer"]["normalizers"].extend(normalizer["normalizers"])

    change_tokenizer(change)(model)
    message = refusal(run_cli("convert", model, *PLAIN.split(), "-q", "-o", tmp_path / "a.gguf"))
    assert "tokenises differently" in message
    assert message.endswith("please report this")


def option_names() -> set[str]:
    """Names of the options that commands have."""
    group: Any = typer.main.get_command(app)
    return {
        name for c in (group, *group.commands.values()) for o in c.params for name in (*o.opts, *o.secondary_opts)
    } | {"--help"}


OF_OTHER_PROGRAMS = {
    "--outtype",
    "--tensor-type",
    "--tensor-type-file",
    "--output-tensor-type",
    "--token-embedding-type",
}
"""llama.cpp's converter and llama-quantize."""


def test_every_option_in_a_message_exists() -> None:
    """Also in warnings and notes, and in the pieces that messages are made of; not the old spellings of options."""
    known = option_names() | OF_OTHER_PROGRAMS
    for file in Path(lieq_gguf.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.name != "old_spellings.py" else ()
        texts = " ".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", texts))
        assert named <= known, file

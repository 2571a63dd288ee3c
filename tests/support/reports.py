"""Conditions under which people report wrong files or refusals of other converters: each one as a small model.

A condition is an example of a kind. Sources are issues and pull requests of the projects named, by number.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lieq_gguf.native.llama_cpp import open_model
from support.families import LLAMA_3_ROPE, TINY_MODELS, YARN_ROPE
from support.tolerances import distance

Change = Callable[[Path], object]
Weights = dict[str, torch.Tensor]
_QWEN3_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Condition:
    """A model directory that is unusual in one way.

    Attributes:
        reported: Where people report it.
        what: What is unusual, for people.
        model: Which of the tiny models it begins with.
        change: Makes it unusual.
        refusal: What the message must say, if the model cannot be converted; empty for a file that is right.
        says: What a note or warning must say beside a file that is right.
        settings: Of the tiny model.
        reference: Makes, from a copy of the changed directory, one that transformers reads; None if it reads this one.
    """

    reported: str
    what: str
    model: str
    change: Change
    refusal: str = ""
    says: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: Change | None = None

    def write(self, path: Path) -> Path:
        """Write the model directory."""
        TINY_MODELS[self.model].write(path, **self.settings)
        self.change(path)
        return path


def edit_json(name: str, **changes: Any) -> Change:
    """Change keys of a file; None removes one."""

    def change(path: Path) -> None:
        content = json.loads((path / name).read_text()) if (path / name).is_file() else {}
        kept = {key: value for key, value in content.items() if key not in changes}
        (path / name).write_text(json.dumps(kept | {k: v for k, v in changes.items() if v is not None}))

    return change


def edit_weights(change: Callable[[Weights], Weights | None]) -> Change:
    """Change the tensors, in place or to others."""

    def edit(path: Path) -> None:
        file = path / "model.safetensors"
        weights = load_file(file)
        save_file(change(weights) or weights, file, metadata={"format": "pt"})

    return edit


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(path: Path) -> None:
        for some in changes:
            some(path)

    return change


def card(header: str) -> Change:
    """A model card."""
    return lambda path: (path / "README.md").write_text(f"---\n{header}\n---\nText.\n")


def untie_head(path: Path) -> None:
    """What PEFT leaves when it merges an adapter of the head into a model with tied embeddings."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        head = model.lm_head.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head + 0.05 * torch.randn_like(head))
    model.save_pretrained(path)


def repeat_head(weights: Weights) -> None:
    """What older versions of transformers saved of a model with tied embeddings."""
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def negate_up(weights: Weights) -> None:
    """A later version of the weights."""
    weights["model.layers.1.mlp.up_proj.weight"].mul_(-1)


def older_shards(path: Path) -> None:
    """A directory that was once in several files, before the weights in one file were made."""
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path.parent / "old", max_shard_size="1MB")
    edit_weights(negate_up)(path)
    for file in (path.parent / "old").glob("model*"):
        shutil.copy(file, path)


def stale_index(path: Path) -> None:
    """What transformers leaves when it saves one file over several: the index."""
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="1MB")
    index = (path / "model.safetensors.index.json").read_text()
    model.save_pretrained(path)
    for shard in path.glob("model-*"):
        shard.unlink()
    (path / "model.safetensors.index.json").write_text(index)


def fuse_experts(weights: Weights) -> Weights:
    """The layout of transformers 5 itself: one tensor for all experts."""
    experts = {name: weights.pop(name) for name in sorted(weights) if ".mlp.experts." in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        names = ([f"{prefix}{i}.{part}_proj.weight" for i in range(8)] for part in ("gate", "up", "down"))
        gate, up, down = (torch.stack([experts[name] for name in of_part]) for of_part in names)
        weights |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    return weights


def prefix(new: str) -> Change:
    """Another prefix in the place of ``model.``."""
    return edit_weights(lambda w: {re.sub(r"^model\.", new, name): tensor for name, tensor in w.items()})


def usual_prefix(old: str) -> Change:
    """``model.`` in its place."""
    return edit_weights(lambda w: {n.replace(old, "model.", 1): t for n, t in w.items()})


def zero(*parts: str) -> Change:
    """Matrices of the second layer that do nothing yet, as in LLaMA-Pro."""

    def clear(weights: Weights) -> None:
        for part in parts:
            weights[f"model.layers.1.{part}.weight"].zero_()

    return edit_weights(clear)


def rope(**changes: Any) -> Change:
    """Change keys of ``rope_parameters``."""

    def change(path: Path) -> None:
        given = json.loads((path / "config.json").read_text())["rope_parameters"]
        edit_json("config.json", rope_parameters=given | changes)(path)

    return change


def no_eos(**ids: Any) -> Change:
    """No token that ends a text in the tokenizer's files."""
    return both(edit_json("tokenizer_config.json", eos_token=None, bos_token=None), edit_json("config.json", **ids))


PLAIN = (
    "--bits", 16, "--types", "F16", "--embedding-type", "F16", "--output-type", "F16", "--no-imatrix",
)  # fmt: skip
_N_TOKENS = 128


def difference(condition: Condition, path: Path, file: Path) -> tuple[npt.NDArray[np.float64], bool]:
    """How far a file is from the model in transformers.

    Returns:
        Largest difference of each position's logits, in standard deviations; and whether a text has the same tokens.
    """
    if condition.reference is not None:
        path = Path(shutil.copytree(path, path.with_name("reference")))
        condition.reference(path)
    ids = np.random.default_rng(1).integers(8, 600, _N_TOKENS).tolist()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with open_model(file, n_ctx=_N_TOKENS, n_threads=1) as ours:
        found, tokens = ours.logits(ids), ours.tokenize("Hello", add_special_tokens=True)
    return distance(found, expected), tokens == AutoTokenizer.from_pretrained(path)("Hello").input_ids


_OLMO_3 = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_OWN_FACTOR = 0.1 * math.log(8) + 1

CONDITIONS: Mapping[str, Condition] = {
    "C1 head": Condition(
        "transformers 45127, peft 2777, unsloth 9331, LlamaFactory 10560", "tied, with a head that differs", "qwen2",
        untie_head,
    ),
    "C1 head twice": Condition("transformers 45127", "tied, with a head that is the same", "qwen2",
                               edit_weights(repeat_head)),
    "C1 head gemma2": Condition("transformers 45127", "tied in the graph, with a head that differs", "gemma2",
                                untie_head, refusal="only with the embedding in its place"),
    "C1 olmo2": Condition("own", "tied, where the graph has a head of its own", "olmo2", lambda _path: None,
                          refusal="only with one", settings={"tie_word_embeddings": True}),
    "C2 llama3": Condition(
        "Model-Optimizer 917, sglang 26187", "rope_scaling beside rope_parameters", "llama",
        edit_json("config.json", rope_scaling=LLAMA_3_ROPE),
    ),
    "C2 yarn": Condition(
        "vllm recipes 856", "rope_scaling beside rope_parameters", "qwen2",
        edit_json("config.json", rope_scaling=_QWEN3_YARN),
    ),
    "C2 base": Condition(
        "vllm recipes 856", "rope_scaling without the base that rope_parameters has", "qwen3",
        edit_json("config.json", rope_scaling=_QWEN3_YARN, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        says="the rotary base is 10000, not the 500000 given there",
    ),
    "C2 linear": Condition(
        "vllm recipes 856", "rope_scaling beside rope_parameters", "gemma3",
        edit_json("config.json", rope_scaling={"rope_type": "linear", "factor": 8.0}),
    ),
    "C3": Condition("diffusers 14719, mlx-vlm 1329, unsloth-zoo 808", "one file beside older shards", "smollm2",
                    older_shards, says="model.safetensors is converted, as transformers loads it"),
    "C4 eos": Condition("llama.cpp 8990, vllm 7491", "add_eos_token without a post-processor", "smollm2",
                        edit_json("tokenizer_config.json", add_eos_token=True)),
    "C4 bos": Condition("llama.cpp 8990, vllm 7491", "add_bos_token without a post-processor", "olmo2",
                        edit_json("tokenizer_config.json", add_bos_token=True)),
    "C5 list": Condition("llama.cpp 15051, colibri 1478", "EOS as a list in config.json", "smollm2",
                         no_eos(eos_token_id=[2, 0])),
    "C5 none": Condition("llama.cpp 15051, colibri 1478", "no EOS anywhere", "smollm2",
                         no_eos(eos_token_id=None, bos_token_id=None), says="so llama.cpp takes token 11"),
    "C6 attention": Condition("mlx-lm 1507", "longrope with attention_factor", "phi3-long", rope(attention_factor=1.0)),
    "C6 factor": Condition("mlx-lm 1507", "longrope with factor", "phi3-long", rope(factor=2.0)),
    "C8 languages": Condition("llama.cpp 9813, 8769", "a card with Norwegian", "smollm2", card("language: [en, no]")),
    "C8 tags": Condition("llama.cpp 9813", "a card with numbers", "smollm2",
                         card("tags: [x, 2024, true, null, 1.5]\nversion: 1.5\nmodel_name: 123\nlicense: 1.0\n"
                              "license_name: 5\nauthor: [x, y]\nmodel_description: {}")),
    "C8 yaml": Condition("llama.cpp 9813", "a card that is no YAML", "smollm2", card("a: [b"),
                         says="the model card cannot be read"),
    "C10 olmo3": Condition(
        "mlx-lm 1507, llama.cpp 16015", "yarn with the attention_factor that is its own", "olmo3",
        edit_json("config.json", rope_parameters=None, rope_theta=5e5,
                  rope_scaling=_OLMO_3 | {"attention_factor": _OWN_FACTOR}),
    ),
    "C10 other": Condition(
        "mlx-lm 1507", "yarn with another attention_factor", "qwen2",
        edit_json("config.json", rope_parameters=YARN_ROPE | {"attention_factor": 1.0}),
        refusal="multiplies attention by 1 is not supported; expected yarn's own 1.27726",
    ),
    "C11": Condition("diffusers 14719, CoSER 3, mlx-vlm 1827", "an index whose shards are gone", "smollm2",
                     stale_index),
    "C12": Condition("vllm 36997, 38882, mergekit 692", "experts in one tensor", "qwen3moe",
                     edit_weights(fuse_experts)),
    "C13 block": Condition("llama.cpp 20460, LLaMA-Pro", "a block that does nothing", "smollm2",
                           zero("self_attn.o_proj", "mlp.down_proj")),
    "C13 query": Condition("llama.cpp 20460", "a query of zeros", "smollm2", zero("self_attn.q_proj")),
    "C13 up": Condition("llama.cpp 20460", "an up projection of zeros", "smollm2", zero("mlp.up_proj")),
    "C13 value": Condition("llama.cpp 20460", "a value of zeros", "smollm2", zero("self_attn.v_proj")),
    "C14": Condition("vllm 7491, llama.cpp 8990", "add_eos_token beside a template with BOS", "llama",
                     edit_json("tokenizer_config.json", add_eos_token=True)),
    "C15 none": Condition("llama.cpp 15023, 14459", "names without a prefix", "qwen3", prefix("")),
    "C15 inner": Condition(
        "llama.cpp 24502", "names with another prefix", "gemma3", prefix("language_model.model."),
        says="begin with language_model.model.", reference=usual_prefix("language_model.model."),
    ),
    "C15 outer": Condition(
        "llama.cpp 24502", "names with another prefix", "gemma3", prefix("model.language_model."),
        says="begin with model.language_model.", reference=usual_prefix("model.language_model."),
    ),
    **{
        f"C16 {name}": Condition("own", "biases that the graph does not add", name, lambda _path: None,
                                 refusal="attention_bias is set", settings={"attention_bias": True})
        for name in ("qwen3", "qwen3moe", "olmo2", "gemma2", "gemma3", "smollm3")
    },
    "C16 mlp": Condition("own", "biases that the graph does not add", "smollm3", lambda _path: None,
                         refusal="mlp_bias is set", settings={"mlp_bias": True}),
}  # fmt: skip

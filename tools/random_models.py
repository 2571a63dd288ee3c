"""Models of any size with random weights, for measuring memory; the text they generate means nothing.

Usage: random_models.py FOLDER N_VOCAB [CONFIG]      CONFIG as JSON, for example '{"hidden_size": 2048}'; a Llama, if it
has no model_type
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def write_random_model(path: Path, n_vocab: int, **config: Any) -> None:
    """Write a model in BF16, with a byte-level vocabulary filled up with words that never occur.

    Args:
        path: Folder to write, with shards of at most 500 MB.
        n_vocab: Size of the vocabulary.
        config: Values that differ from those of a model with two layers and width 256.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(["<|endoftext|>", *characters])}
    vocab["he"] = len(vocab)
    vocab |= {f"filler{i}": i for i in range(len(vocab), n_vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(path)
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    tokens = {"vocab_size": n_vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    settings: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True} | sizes | tokens | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))  # type: ignore[no-untyped-call]
    model.save_pretrained(path, max_shard_size="500MB")


if __name__ == "__main__":
    folder, n_tokens, *changes = sys.argv[1:]
    write_random_model(Path(folder), int(n_tokens), **json.loads(changes[0] if changes else "{}"))

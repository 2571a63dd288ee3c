"""Tiny real models: random weights in the files and structure that transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.tokenizer_fixtures import write_smollm2


def write_model(
    path: Path,
    *,
    write_tokenizer: Callable[[Path], int] = write_smollm2,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A Llama of three layers, width 256 and two key-value heads; ``config`` overrides its configuration.

    The weights are larger than a fresh initialiser's, so that layers change their input as trained ones do.
    """
    path.mkdir(parents=True, exist_ok=True)
    n_vocab = write_tokenizer(path)
    settings: dict[str, Any] = {
        "vocab_size": n_vocab,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    model.to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path

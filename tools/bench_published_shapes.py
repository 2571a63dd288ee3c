#!/usr/bin/env python3
"""Time and memory of planning models of published widths, with random weights and a few of their layers.

Usage: bench_published_shapes.py [NAME…]      (all of them)

For each, what `plan --bits 2.1` and `plan --size` take, the latter at a fifth of the size in BF16.
Both run without a cache. The time grows with the number of layers, the memory hardly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QWEN35 = {"model_type": "qwen3_5_text", "head_dim": 256, "tie_word_embeddings": True, "num_hidden_layers": 4}
DELTA = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3.5-0.8B": QWEN35 | DELTA | {
        "vocab_size": 248_320, "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
        "num_key_value_heads": 2, "linear_num_value_heads": 16,
    },
    "Qwen3.5-4B": QWEN35 | DELTA | {
        "vocab_size": 248_320, "hidden_size": 2560, "intermediate_size": 9216, "num_attention_heads": 16,
        "num_key_value_heads": 4, "linear_num_value_heads": 32,
    },
    "Gemma-4-E2B": {
        "model_type": "gemma4_text", "vocab_size": 262_144, "vocab_size_per_layer_input": 262_144, "hidden_size": 1536,
        "intermediate_size": 6144, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "global_head_dim": 512, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 2, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512, "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "LFM2.5-1.2B": {
        "model_type": "lfm2", "vocab_size": 65_536, "hidden_size": 2048, "intermediate_size": 12_288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "Granite-4-h-tiny": {
        "model_type": "granitemoehybrid", "vocab_size": 100_352, "hidden_size": 1536, "intermediate_size": 512,
        "shared_intermediate_size": 1024, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 3,
        "layer_types": ["mamba", "mamba", "attention"], "num_local_experts": 64, "num_experts_per_tok": 6,
        "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2,
        "position_embedding_type": "nope", "embedding_multiplier": 12.0, "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22, "logits_scaling": 6.0, "tie_word_embeddings": True,
    },
    "Ministral-3-3B": {
        "model_type": "ministral3", "vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 9216,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 3,
        "tie_word_embeddings": True, "rope_parameters": YARN,
    },
}  # fmt: skip


def main() -> None:
    """Make each model, and plan it twice."""
    for name in sys.argv[1:] or SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            settings = {key: value for key, value in SHAPES[name].items() if key != "vocab_size"}
            # in a separate process, so that its memory is not counted here
            subprocess.run(
                [sys.executable, Path(__file__).with_name("random_models.py"), model, str(SHAPES[name]["vocab_size"]),
                 json.dumps(settings)],
                check=True,
            )  # fmt: skip
            n_bytes = sum(f.stat().st_size for f in model.glob("*.safetensors"))
            print(f"{name}, {settings['num_hidden_layers']} layers, {n_bytes / 1e9:.2f} GB in BF16", flush=True)
            for target in (["--bits", "2.1"], ["--size", str(n_bytes // 5)]):
                plan(model, target)


def plan(model: Path, target: list[str]) -> None:
    """Run the command and print its time, its largest memory and what it has planned."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lieq_gguf", "plan", model, *target, "--no-cache", "--quiet", "--json"], stdout=out
        )
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        printed = out.read()
    if status != 0:
        raise SystemExit(f"plan {' '.join(target)} failed: {printed}")
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9
    result = json.loads(printed)
    print(
        f"  {' '.join(target):<20} {seconds:6.1f} s {peak:6.2f} GB   {result['layer_bpw']:.3f} bits, "
        f"{result['file_bytes'] / 1e6:.1f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()

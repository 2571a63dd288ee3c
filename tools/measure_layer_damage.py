#!/usr/bin/env python3
"""Measures how well each layer score predicts the damage: KL divergence with only that layer quantised to IQ2_XXS.

Usage: measure_layer_damage.py MODEL_DIR SCORES.json IMATRIX.gguf TEXT [N_CHUNKS]

SCORES is a file of 'score --compare -o', TEXT a text other than the calibration text. Runs the model in transformers
once for every layer, on N_CHUNKS sequences (6 if left out) of 512 tokens whose second half counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from transformers import AutoModelForCausalLM

from lieq_gguf.evaluation.divergence import compare_logits, read_text
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import load_source_tokenizer

N_CTX = 512


def main() -> None:
    """Print damage and scores by layer, then the correlations."""
    path, scores_file, imatrix_file, text_file = map(Path, sys.argv[1:5])
    n_chunks = int(sys.argv[5]) if len(sys.argv) > 5 else 6
    source, scores = ModelDirectory(path), LayerScores.load(scores_file)
    importance = load_importance(imatrix_file)
    ids = load_source_tokenizer(path).encode(read_text(text_file)[: n_chunks * N_CTX * 10], add_special_tokens=False)
    chunks = torch.tensor(ids[: n_chunks * N_CTX]).reshape(n_chunks, N_CTX)
    targets = chunks[:, N_CTX // 2 + 1 :].reshape(-1).numpy()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.inference_mode()
    def logits() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        by_chunk = [model(chunk[None], use_cache=False).logits[0, N_CTX // 2 : -1] for chunk in chunks]
        return np.concatenate([some.numpy() for some in by_chunk])

    intact, damage = logits(), []
    for layer, matrices in enumerate(source.spec.layer_matrices):
        original = {}
        for tensor in matrices:
            assert tensor.source_name is not None
            parameter = model.get_parameter(tensor.source_name)
            original[tensor.source_name] = parameter.detach().clone()
            encoded = ggml.quantize(parameter.detach().numpy(), QUANT_TYPES["IQ2_XXS"], importance.mean(tensor.name), 2)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(ggml.dequantize(encoded, QUANT_TYPES["IQ2_XXS"], 2)))
        damage.append(float(compare_logits(intact, logits(), targets).kld.mean()))
        with torch.no_grad():
            for name, weights in original.items():
                model.get_parameter(name).copy_(weights)
        print(f"layer {layer}: KLD {damage[-1]:.4f}", flush=True)
    print("\n| score | Spearman | Pearson of logarithms |\n|---|---|---|")
    for name, values in scores.by_scorer.items():
        by_log = f"{pearsonr(np.log(values), np.log(damage)).statistic:+.2f}" if min(values) > 0 else ""
        print(f"| {name} | {spearmanr(values, damage).statistic:+.2f} | {by_log} |")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measures the share of each type's error that error feedback leaves, on the calibration text and on another one.

Usage: measure_feedback.py MODEL_DIR CALIBRATION TEXT [LAYER…]      (3, 12 and 20 if left out)

The error is that of the matrix's output, ``tr(ΔW H ΔWᵀ)`` with the second moments ``H`` of either text; 16,384 tokens
of CALIBRATION and 8,192 of TEXT pass the unquantised layers. Uses some rows of four matrices per layer. Prints
Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.second_moments import SecondMoments
from lieq_gguf.measure.text import read_calibration_texts, tokenize
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import load_source_tokenizer
from lieq_gguf.writing.error_feedback import MatrixToEncode, coupling, encode

TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
N_TOKENS, N_ROWS, N_THREADS = (16384, 8192), 384, 2


def moments_of(layer: LayerModel, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments of each input, by the last module that has it."""
    moments = SecondMoments(tuple(layer.tensors), layer.in_bfloat16)
    with layer.watching_inputs(moments.see_input):
        layer.forward(hidden)
    return {modules[-1]: moments.take(modules[0]) for modules in moments.groups()}


def output_error(change: np.ndarray[Any, Any], moments: torch.Tensor) -> float:
    """``tr(ΔW H ΔWᵀ)``."""
    return float(((change.astype(np.float64) @ moments.double().numpy()) * change).sum())


@torch.inference_mode()
def main() -> None:
    """Go through the layers and print the geometric means."""
    source = ModelDirectory(Path(sys.argv[1]))
    layers = [int(arg) for arg in sys.argv[4:]] or [3, 12, 20]
    tokenizer = load_source_tokenizer(source.path)
    ids = []
    for file, n_tokens in zip(sys.argv[2:4], N_TOKENS, strict=True):
        ids.append(tokenize(read_calibration_texts([Path(file)]), tokenizer, n_tokens).ids)
    layer = LayerModel.of(source, ComputeOptions(n_threads=N_THREADS))
    hidden = [layer.embed(source, some) for some in ids]
    left: dict[str, list[list[float]]] = {name: [] for name in TYPES}
    for index in range(max(layers) + 1):
        layer.load(source, index)
        if index in layers:
            seen, unseen = (moments_of(layer, h) for h in hidden)
            for module, moments in seen.items():
                weights = np.ascontiguousarray(layer.weight(module).numpy()[:N_ROWS])
                importance = moments.diagonal().numpy().copy()
                coupled = coupling(moments.clone())
                for name in TYPES:
                    quant_type = QUANT_TYPES[name]
                    plain = ggml.quantize(weights, quant_type, importance, N_THREADS)
                    [fed] = encode([MatrixToEncode(weights, quant_type, importance)], coupled, N_THREADS)
                    changes = [ggml.dequantize(data, quant_type) - weights for data in (fed, plain)]
                    pairs = [[output_error(c, of) for c in changes] for of in (moments, unseen[module])]
                    left[name].append([with_feedback / without for with_feedback, without in pairs])
        hidden = [layer.forward(h) for h in hidden]
    print("| type | left on calibration text | on the other |\n|---|---|---|")
    for name, shares in left.items():
        on_seen, on_unseen = np.exp(np.log(np.array(shares)).mean(axis=0))
        print(f"| {name} | {on_seen:.2f} | {on_unseen:.2f} |")


if __name__ == "__main__":
    main()

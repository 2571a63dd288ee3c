#!/usr/bin/env python3
"""Measures how far the estimated errors of the types are from the errors of whole matrices, as a Markdown table.

Usage: measure_error_sample.py MODEL_DIR CALIBRATION [--layers 7]

Encodes all weights of some layers in every type: a minute or two for each layer of a model of 135 million weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lieq_gguf.measure.type_errors import FloatArray, probe_matrix, relative_errors
from lieq_gguf.native import encoders, ggml
from lieq_gguf.pipeline import imatrix
from lieq_gguf.quant_types import DEFAULT_LADDER, QuantType
from lieq_gguf.records.options import ComputeOptions, MeasuringOptions
from lieq_gguf.request import ImatrixRequest
from lieq_gguf.sources.model_directory import ModelDirectory

N_THREADS = 2


def main() -> None:
    """Print mean, 90 % quantile and maximum of the deviation by type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, default=7)
    arguments = parser.parse_args()
    source = ModelDirectory(arguments.model)
    measuring, compute = MeasuringOptions(text_files=(arguments.text,)), ComputeOptions(n_threads=N_THREADS)
    importance = imatrix(ImatrixRequest(str(arguments.model), measuring=measuring, compute=compute))
    deviations: dict[str, list[float]] = {t.name: [] for t in DEFAULT_LADDER}
    layers = np.linspace(0, source.spec.n_layers - 1, arguments.layers).round().astype(int)
    for layer in layers:
        for tensor in source.spec.layer_matrices[layer]:
            weights = source.read(tensor).float().numpy()
            mean = importance.mean(tensor.name)
            [estimates] = relative_errors([probe_matrix(weights, mean, N_THREADS)], DEFAULT_LADDER, N_THREADS)
            for quant_type in (t for t in DEFAULT_LADDER if t.name in estimates):
                whole = error_of_all_rows(weights, mean, quant_type)
                if whole > 0:
                    deviations[quant_type.name].append(abs(estimates[quant_type.name] / whole - 1))
    print("| type | matrices | mean deviation | 90 % | worst |\n|---|---|---|---|---|")
    for name, values in deviations.items():
        if values:
            quantile = np.quantile(values, 0.9)
            print(f"| {name} | {len(values)} | {np.mean(values):.1%} | {quantile:.1%} | {max(values):.1%} |")


def error_of_all_rows(weights: FloatArray, importance: FloatArray | None, quant_type: QuantType) -> float:
    """``Σ im·(W − Ŵ)² / Σ im·W²`` of the whole matrix."""
    encoded = encoders.quantize(weights, quant_type, importance, N_THREADS)
    difference = weights - ggml.dequantize(encoded, quant_type, N_THREADS)
    column = np.ones(weights.shape[1]) if importance is None else importance.astype(np.float64)
    exact = weights.astype(np.float64)
    return float((column * difference.astype(np.float64) ** 2).sum() / (column * exact**2).sum())


if __name__ == "__main__":
    main()

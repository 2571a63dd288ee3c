#!/usr/bin/env python3
"""Make llama.cpp's own presets with the installed library, for comparisons with the same importance matrix.

Usage: make_preset.py F16.gguf IMATRIX.gguf OUT_FOLDER PRESET…      for example Q2_K Q3_K_M IQ2_M
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.native.llama_cpp import llama_cpp
from lieq_gguf.records.importance import ImportanceMatrix


def quantize(source: Path, target: Path, preset: str, importance: ImportanceMatrix) -> None:
    """Do the same as ``llama-quantize --imatrix IMATRIX SOURCE TARGET PRESET``."""
    api = llama_cpp()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{preset}"])
    means = {name: np.ascontiguousarray(importance.mean(name), dtype=np.float32) for name in importance.in_sum2}
    entries = (api.llama_model_imatrix_data * (len(means) + 1))()  # the last one stays empty and ends the list
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = entries
    status = api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if status != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {preset} (status {status})")


def main() -> None:
    """Make the presets named on the command line."""
    source, imatrix, folder = (Path(argument) for argument in sys.argv[1:4])
    importance = load_importance(imatrix)
    for preset in sys.argv[4:]:
        target = folder / f"{preset}.gguf"
        quantize(source, target, preset, importance)
        print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

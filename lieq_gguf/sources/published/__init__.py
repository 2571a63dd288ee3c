"""Model directories whose weights are published quantised, as ``quantization_config`` of ``config.json`` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lieq_gguf.errors import SourceError
from lieq_gguf.sources.published.compressed_tensors import CompressedTensors
from lieq_gguf.sources.published.fp8 import Fp8
from lieq_gguf.sources.published.gptq_awq import Awq, Gptq
from lieq_gguf.sources.published.mxfp4 import Mxfp4
from lieq_gguf.sources.published.stored import WeightFormat

_FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], WeightFormat]] = {
    "fp8": Fp8.from_config,
    "mxfp8": Fp8.from_config,
    "compressed-tensors": CompressedTensors.from_config,
    "gptq": Gptq.from_config,
    "awq": Awq.from_config,
    "mxfp4": Mxfp4.from_config,
}
_DTYPES = ("bfloat16", "float16", "float32")


def find_format(path: Path, config: Mapping[str, Any]) -> WeightFormat | None:
    """The format of the matrices of a model directory; None if they are plain.

    Args:
        path: The directory.
        config: Its ``config.json``.

    Raises:
        SourceError: if the format is not supported.
    """
    inner = config.get("text_config")
    sources = (config, inner if isinstance(inner, dict) else {})
    settings = next((c["quantization_config"] for c in sources if c.get("quantization_config") is not None), None)
    if settings is None:
        return None
    file = path / "config.json"
    if not isinstance(settings, dict):
        raise SourceError(f"quantization_config in {file} is {settings!r:.60}; expected an object")
    is_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = str(settings.get("quant_method", "bitsandbytes" if is_bitsandbytes else "an unnamed method"))
    if method not in _FORMATS:
        raise SourceError(
            f"{path} is quantised with {method}, which cannot be read; expected BF16, F16 or F32, or one of "
            f"{', '.join(_FORMATS)}: give the model that it was made from"
        )
    dtypes = (c.get(key) for c in sources for key in ("dtype", "torch_dtype"))
    dtype = next((name for name in dtypes if name in _DTYPES), _DTYPES[0])
    try:
        return _FORMATS[method](settings, dtype)
    except SourceError as error:
        raise SourceError(
            f"quantization_config in {file} ({method}) has {error}; give the model that it was made from"
        ) from None

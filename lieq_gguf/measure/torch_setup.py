"""Prepares torch for a pass: the device, precision, and how freed memory is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lieq_gguf.errors import CalibrationError


def keep_freed_memory() -> None:
    """Let glibc keep the memory that one batch frees for the next; returning it costs a quarter of a layer's time.

    glibc keeps up to twice the largest block freed so far, but ignores blocks above 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware; elsewhere torch emulates them, slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    supported = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(is_supported() for is_supported in supported if is_supported is not None)


def torch_device(name: str) -> torch.device:
    """A device by name.

    Raises:
        CalibrationError: if it is not available.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise CalibrationError(f"device '{name}' cannot be used: {first_line}; try --device cpu") from None
    return device


@contextmanager
def rounding_products(rounding: bool) -> Iterator[None]:
    """For the length of a ``with``, products of float32 matrices may round their factors to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if rounding else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

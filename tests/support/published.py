"""Model directories as they are published quantised, and the same with the dequantised weights in plain form.

Every quantiser gives the parts of a matrix and what they stand for. The latter is computed from codes that are not
packed, so it does not depend on the order of bits.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Quantiser = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Of a matrix ``[n_out, n_in]``: its parts by the ends of their names, and the matrix they stand for."""

WORD_BITS = 32


@dataclass(frozen=True)
class Published:
    """A format.

    Attributes:
        settings: Its ``quantization_config``.
        quantise: What it does to a matrix.
        of: Ends of the names of matrices to which it does this.
    """

    settings: Mapping[str, Any]
    quantise: Quantiser
    of: str | tuple[str, ...] = "_proj.weight"


def fp8(block: tuple[int, int] | None, scale_end: str = "weight_scale_inv") -> Quantiser:
    """E4M3, with a float32 scale for each block, or for the matrix; and a scale of activations, which says nothing."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        spread, scales = _scales(weight.float(), block or tuple(weight.shape), 448.0)
        codes = (weight.float() / spread).to(torch.float8_e4m3fn)
        parts = {"weight": codes, scale_end: scales if block else scales[0, 0].clone()}
        return parts | {"activation_scale": torch.tensor(3.0)}, (codes.float() * spread).to(weight.dtype)

    return quantise


def mxfp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """E4M3, with a power of two for each 32 weights of a row."""
    spread, scales = _scales(weight.float(), (1, 32), 448.0)
    exponents = scales.log2().ceil()
    spread = torch.exp2(exponents).repeat_interleave(32, 1)
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale_inv": (exponents + 127).to(torch.uint8)}
    return parts, (codes.float() * spread).to(weight.dtype)


def naive(block: Callable[[torch.Tensor], tuple[int, int]], kind: torch.dtype, *, zeros: bool = False) -> Quantiser:
    """compressed-tensors, not packed: FP8 or INT8 with scales in the type of the weights."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        most = 448.0 if kind == torch.float8_e4m3fn else 127.0
        spread, scales = _scales(weight.float(), block(weight), most)
        spread, scales = spread.to(weight.dtype), scales.to(weight.dtype)
        offset = torch.arange(len(scales))[:, None] % 5 - 2 if zeros else torch.zeros(len(scales), 1)
        codes = (weight.float() / spread.float() + offset.repeat_interleave(len(weight) // len(offset), 0)).clamp(
            -most - 1 if kind == torch.int8 else -most, most
        )
        codes = (codes.round() if kind == torch.int8 else codes).to(kind)
        parts = {"weight": codes, "weight_scale": scales[0] if scales.numel() == 1 else scales}
        if zeros:
            parts["weight_zero_point"] = offset.expand_as(scales).to(kind).contiguous()
        shifted = codes.to(weight.dtype) - offset.repeat_interleave(len(weight) // len(offset), 0).to(weight.dtype)
        return parts, shifted * spread

    return quantise


def packed(n_bits: int, group_size: int | None, *, zeros: bool = False, act_order: bool = False) -> Quantiser:
    """compressed-tensors' INT4 and INT8 in 32-bit words."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = _groups(weight.shape[1], group_size, act_order)
        codes, offsets, scales = _integers(weight, groups, n_bits, zeros=zeros)
        parts = {
            "weight_packed": pack(codes, n_bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if zeros:
            parts["weight_zero_point"] = pack(offsets.T, n_bits).T.contiguous()
        if act_order:
            parts["weight_g_idx"] = groups.int()
        return parts, (codes - offsets[:, groups]) * scales[:, groups]

    return quantise


def gptq(n_bits: int, group_size: int | None, *, act_order: bool = False, version: int = 1) -> Quantiser:
    """GPTQ, with zeros that differ from output to output; version 1 stores them less one."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = _groups(weight.shape[1], group_size, act_order)
        codes, offsets, scales = _integers(weight.half(), groups, n_bits, zeros=True)
        parts = {
            "qweight": pack(codes, n_bits).T.contiguous(),
            "qzeros": pack(offsets.T - (1 if version == 1 else 0), n_bits),
            "scales": scales.T.contiguous(),
            "g_idx": groups.int(),
        }
        return parts, (codes - offsets[:, groups]) * scales[:, groups]

    return quantise


def awq(group_size: int) -> Quantiser:
    """AWQ in the layout of its gemm kernel: output 4 of eight comes second in a word."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = _groups(weight.shape[1], group_size, act_order=False)
        codes, offsets, scales = _integers(weight.half(), groups, 4, zeros=True)
        order = torch.arange(len(weight)).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        parts = {
            "qweight": pack(codes.T[:, order], 4),
            "qzeros": pack(offsets.T[:, order], 4),
            "scales": scales.T.contiguous(),
        }
        return parts, (codes - offsets[:, groups]) * scales[:, groups]

    return quantise


def mxfp4(stacked: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """E2M1 with a power of two for each 32 inputs; matrices of all experts ``[n_experts, n_in, n_out]``.

    Some blocks have a power more than they need.
    """
    blocks = stacked.float().transpose(1, 2).reshape(len(stacked), stacked.shape[2], -1, 32)
    exponents = (blocks.abs().amax(3) / 6).log2().ceil() + torch.arange(blocks.shape[2]) % 3
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = blocks * torch.exp2(-exponents)[..., None]
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(4)
    meant = magnitudes[codes] * scaled.sign() * torch.exp2(exponents)[..., None]
    codes += 8 * (scaled < 0)
    parts = {"_blocks": (codes[..., ::2] | codes[..., 1::2] << 4).byte(), "_scales": (exponents + 127).byte()}
    return parts, meant.flatten(2).transpose(1, 2).to(stacked.dtype).contiguous()


def pack(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Codes ``[n_rows, n]`` in 32-bit words, the first in the lowest bits; signed sums, so that borrows go on."""
    per_word = WORD_BITS // n_bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    padded = padded.reshape(len(codes), -1, per_word)
    words = (padded << torch.arange(0, WORD_BITS, n_bits)).sum(-1) & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def write_both(model: Path, published: Published, folder: Path | None = None) -> tuple[Path, Path]:
    """The directory with the matrices of its layers quantised, and one with what they stand for.

    They are written into ``folder``, or beside it.
    """
    plain, quantised = ((folder or model.parent) / kind / model.name for kind in ("plain", "quantised"))
    for copy in (plain, quantised):
        shutil.copytree(model, copy)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith(published.of):
            stored[name] = meant[name] = weight
            continue
        parts, meant[name] = published.quantise(weight)
        stored |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text()) | {"quantization_config": dict(published.settings)}
    (quantised / "config.json").write_text(json.dumps(settings))
    return quantised, plain


def compressed_tensors(storage: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """``quantization_config`` of one group."""
    scheme = {"weights": {"dynamic": False, "symmetric": True, **weights}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **more,
    }


def _scales(weight: torch.Tensor, block: tuple[int, ...], most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each weight, and of each block; blocks at the end may be smaller."""
    grid = [math.ceil(n / size) for n, size in zip(weight.shape, block, strict=True)]
    rows, columns = block
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            scales[i, j] = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].abs().max() / most
    spread = scales.repeat_interleave(rows, 0)[: weight.shape[0]]
    return spread.repeat_interleave(columns, 1)[:, : weight.shape[1]], scales


def _groups(n_in: int, group_size: int | None, act_order: bool) -> torch.Tensor:
    """The group of each input; with ``act_order`` those of a group lie apart."""
    groups = torch.arange(n_in) // (group_size or n_in)
    return groups[torch.randperm(n_in, generator=torch.Generator().manual_seed(n_in))] if act_order else groups


def _integers(
    weight: torch.Tensor, groups: torch.Tensor, n_bits: int, *, zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0 ``[n_out, n_in]``, and zeros and scales ``[n_out, n_groups]``, scales in the type of the weight."""
    n_groups, most = int(groups.max()) + 1, (1 << n_bits) - 1
    low, high = (
        torch.stack([f(weight.float()[:, groups == i], 1) for i in range(n_groups)], 1)
        for f in (torch.amin, torch.amax)
    )
    if zeros:
        scales = ((high - low) / most).to(weight.dtype)
        offsets = (-low / scales.float()).round().clamp(1, most).long()
    else:
        scales = (torch.maximum(-low, high) / (most / 2)).to(weight.dtype)
        offsets = torch.full_like(low, 1 << (n_bits - 1)).long()
    codes = (weight.float() / scales.float()[:, groups]).round().long() + offsets[:, groups]
    return codes.clamp(0, most), offsets, scales

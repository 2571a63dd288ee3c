"""The float16 numbers by which a block is scaled, and how to multiply them: all its weights change by one factor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lieq_gguf.quant_types import QuantType

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_PLACES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where the scale of a block is, and the scale of its minima: bytes in the block."""

_IQ1_M, _IQ1_M_SCALES, _IQ1_M_SHIFT = "IQ1_M", 48, 12
"""IQ1_M keeps four bits of its scale on top of each of four words, which begin at this byte, the lowest bits first."""


def can_be_multiplied(quant_type: QuantType) -> bool:
    """Whether the type's blocks have such numbers. Plain numbers have none, and MXFP4 has powers of two."""
    return quant_type.name in _PLACES or quant_type.name == _IQ1_M


def multiplied(data: ByteArray, quant_type: QuantType, factors: FloatArray) -> ByteArray:
    """Encoded rows whose blocks are multiplied by a factor each, to the nearest float16.

    Args:
        data: ``[n_rows, row_bytes]``.
        quant_type: Their type, which must be one that can be multiplied.
        factors: ``[n_rows, n_blocks]``.
    """
    blocks = data.reshape(-1, quant_type.block_bytes).copy()
    by_block = factors.reshape(-1)
    if quant_type.name == _IQ1_M:
        words = blocks[:, _IQ1_M_SCALES:].view(np.uint16)
        shifts = np.arange(4, dtype=np.uint16) * 4
        top = (words >> _IQ1_M_SHIFT).astype(np.uint16)
        scales = (top << shifts).sum(axis=1, dtype=np.uint16)
        changed = _scaled(scales.view(np.float16), by_block).view(np.uint16)
        words &= np.uint16((1 << _IQ1_M_SHIFT) - 1)
        words |= ((changed[:, None] >> shifts) & np.uint16(15)) << np.uint16(_IQ1_M_SHIFT)
        blocks[:, _IQ1_M_SCALES:] = words.view(np.uint8)
    for place in _PLACES.get(quant_type.name, ()):
        scales = np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16)[:, 0]
        blocks[:, place : place + 2] = _scaled(scales, by_block).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(data.shape)


def _scaled(scales: npt.NDArray[np.float16], factors: FloatArray) -> npt.NDArray[np.float16]:
    limit = np.finfo(np.float16).max
    scaled: npt.NDArray[np.float16] = np.clip(scales.astype(np.float32) * factors, -limit, limit).astype(np.float16)
    return scaled

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

_IQ1_M, _IQ1_M_SCALES, _IQ1_M_SHIFT, _IQ1_M_SHIFTS = "IQ1_M", 48, 12, np.arange(4, dtype=np.uint16) * 4
"""IQ1_M keeps four bits of its scale on top of each of four words, which begin at this byte, the lowest bits first."""


def can_be_multiplied(quant_type: QuantType) -> bool:
    """Whether the type's blocks have such numbers. Plain numbers have none, and MXFP4 has powers of two."""
    return quant_type.name in _PLACES or quant_type.name == _IQ1_M


def read(data: ByteArray, quant_type: QuantType) -> FloatArray:
    """The numbers ``[n_blocks, 1 or 2]`` of encoded rows ``[n_rows, row_bytes]``."""
    blocks = data.reshape(-1, quant_type.block_bytes)
    if quant_type.name == _IQ1_M:
        words = _words(blocks)
        scales = ((words >> _IQ1_M_SHIFT) << _IQ1_M_SHIFTS).sum(axis=1, dtype=np.uint16).view(np.float16)
        return np.array(scales[:, None], dtype=np.float32)
    places = _PLACES[quant_type.name]
    numbers = [np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16) for place in places]
    return np.concatenate(numbers, axis=1, dtype=np.float32)


def written(data: ByteArray, quant_type: QuantType, numbers: FloatArray) -> ByteArray:
    """Encoded rows with other numbers ``[n_blocks, 1 or 2]``, to the nearest float16."""
    blocks = data.reshape(-1, quant_type.block_bytes).copy()
    limit = np.finfo(np.float16).max
    halves: npt.NDArray[np.float16] = np.clip(numbers, -limit, limit).astype(np.float16)
    if quant_type.name == _IQ1_M:
        words = _words(blocks) & np.uint16((1 << _IQ1_M_SHIFT) - 1)
        words |= ((halves.view(np.uint16) >> _IQ1_M_SHIFTS) & np.uint16(15)) << np.uint16(_IQ1_M_SHIFT)
        blocks[:, _IQ1_M_SCALES:] = words.view(np.uint8)
    else:
        for i, place in enumerate(_PLACES[quant_type.name]):
            blocks[:, place : place + 2] = halves[:, i : i + 1].view(np.uint8)
    return blocks.reshape(data.shape)


def multiplied(data: ByteArray, quant_type: QuantType, factors: FloatArray) -> ByteArray:
    """Encoded rows whose blocks are multiplied by a factor each, to the nearest float16.

    Args:
        data: ``[n_rows, row_bytes]``.
        quant_type: Their type, which must be one that can be multiplied.
        factors: ``[n_rows, n_blocks]``.
    """
    return written(data, quant_type, read(data, quant_type) * factors.reshape(-1, 1))


def _words(blocks: ByteArray) -> npt.NDArray[np.uint16]:
    return np.ascontiguousarray(blocks[:, _IQ1_M_SCALES:]).view(np.uint16)

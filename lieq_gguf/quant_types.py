"""The table of tensor types that llama.cpp stores: name, block, bytes.

Every size in this package is integer arithmetic on this table. Block sizes and bytes are those of ``ggml``'s type
traits (a test compares the two); the identifiers are those of the GGUF format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lieq_gguf.errors import BudgetError

Family = Literal["float", "legacy", "K", "IQ", "trained"]


@dataclass(frozen=True)
class QuantType:
    """One tensor type.

    Attributes:
        name: Name in llama.cpp's spelling, for example ``IQ2_XXS``.
        ggml_id: ``enum ggml_type``, the number stored in the file.
        block_size: Weights in a block; a row must be a whole number of blocks.
        block_bytes: Stored bytes of a block.
        nominal_bits: The digit in the name, which is how papers count bits.
        file_type: ``enum llama_ftype`` of a file that is mostly of this type.
        family: How the type stores weights: plain numbers, blocks with one scale (legacy), blocks of blocks (K), a grid
            of vectors (IQ), or a grid that weights were trained to lie on.
        needs_imatrix: Whether the type is useless without an importance matrix.
        has_tables: Whether its encoder needs tables that take seconds to compute.
    """

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int
    nominal_bits: int
    file_type: int
    family: Family
    needs_imatrix: bool = False
    has_tables: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, block scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_quantized(self) -> bool:
        """Whether the type stores blocks and not plain numbers."""
        return self.block_size > 1

    def fits(self, n_per_row: int) -> bool:
        """Whether a row of ``n_per_row`` weights is a whole number of blocks."""
        return n_per_row % self.block_size == 0

    def row_bytes(self, n_per_row: int) -> int:
        """Stored bytes of a row of ``n_per_row`` weights, which must fit."""
        return n_per_row // self.block_size * self.block_bytes

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a tensor of ``shape`` (rows last), without padding."""
        n_rows = 1
        for size in shape[:-1]:
            n_rows *= size
        return n_rows * self.row_bytes(shape[-1])


# fmt: off
_TABLE = (
    #         name     id block bytes digit ftype family
    QuantType("F32",     0,   1,   4, 32,  0, "float"),
    QuantType("F16",     1,   1,   2, 16,  1, "float"),
    QuantType("BF16",   30,   1,   2, 16, 32, "float"),
    QuantType("Q4_0",    2,  32,  18,  4,  2, "legacy"),
    QuantType("Q4_1",    3,  32,  20,  4,  3, "legacy"),
    QuantType("Q5_0",    6,  32,  22,  5,  8, "legacy"),
    QuantType("Q5_1",    7,  32,  24,  5,  9, "legacy"),
    QuantType("Q8_0",    8,  32,  34,  8,  7, "legacy"),
    QuantType("Q2_0",   42,  64,  18,  2, 41, "legacy"),
    QuantType("Q2_K",   10, 256,  84,  2, 10, "K"),
    QuantType("Q3_K",   11, 256, 110,  3, 12, "K"),
    QuantType("Q4_K",   12, 256, 144,  4, 15, "K"),
    QuantType("Q5_K",   13, 256, 176,  5, 17, "K"),
    QuantType("Q6_K",   14, 256, 210,  6, 18, "K"),
    QuantType("IQ1_S",  19, 256,  50,  1, 24, "IQ", needs_imatrix=True, has_tables=True),
    QuantType("IQ1_M",  29, 256,  56,  1, 31, "IQ", needs_imatrix=True, has_tables=True),
    QuantType("IQ2_XXS", 16, 256,  66,  2, 19, "IQ", needs_imatrix=True, has_tables=True),
    QuantType("IQ2_XS", 17, 256,  74,  2, 20, "IQ", needs_imatrix=True, has_tables=True),
    QuantType("IQ2_S",  22, 256,  82,  2, 28, "IQ", needs_imatrix=True, has_tables=True),
    QuantType("IQ3_XXS", 18, 256,  98,  3, 23, "IQ", needs_imatrix=True, has_tables=True),
    QuantType("IQ3_S",  21, 256, 110,  3, 26, "IQ", has_tables=True),
    QuantType("IQ4_NL", 20,  32,  18,  4, 25, "IQ"),
    QuantType("IQ4_XS", 23, 256, 136,  4, 30, "IQ"),
    QuantType("TQ1_0",  34, 256,  54,  1, 36, "trained"),
    QuantType("TQ2_0",  35, 256,  66,  2, 37, "trained"),
    QuantType("MXFP4",  39,  32,  17,  4, 38, "trained"),
)
# fmt: on

QUANT_TYPES = {t.name: t for t in _TABLE}
BY_GGML_ID = {t.ggml_id: t for t in _TABLE}

F32 = QUANT_TYPES["F32"]
F16 = QUANT_TYPES["F16"]

# The types offered when the user names none. Left out: the 1-bit types, which ruin small models and must be named;
# TQ1_0, TQ2_0 and MXFP4, whose grids are made for weights trained to lie on them; and Q2_0, the one small type for
# rows that are not a multiple of 256, since older llama.cpp does not load it and few processors have a fast kernel.
# fmt: off
DEFAULT_LADDER = tuple(
    QUANT_TYPES[name]
    for name in (
        "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K", "Q4_1",
        "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16",
    )
)
# fmt: on


def parse_types(names: Iterable[str]) -> tuple[QuantType, ...]:
    """Look types up by name, in any case, dropping repetitions.

    Raises:
        BudgetError: if a name is not in the table, or no name is given.
    """
    types: dict[str, QuantType] = {}
    for name in names:
        key = name.strip().upper()
        if key not in QUANT_TYPES:
            raise BudgetError(f"'{name.strip()}' is not a tensor type; the types are {', '.join(QUANT_TYPES)}")
        types[key] = QUANT_TYPES[key]
    if not types:
        raise BudgetError(f"no tensor type given; the types are {', '.join(QUANT_TYPES)}")
    return tuple(types.values())

import re
from typing import get_args

import gguf
import pytest

from lieq_gguf.allocation.decode_costs import decode_costs
from lieq_gguf.allocation.problem import PROFILES
from lieq_gguf.cli.tables import _COLOURS
from lieq_gguf.errors import BudgetError
from lieq_gguf.measure.type_errors import probe_type
from lieq_gguf.native import ggml
from lieq_gguf.native.type_layouts import code_layout
from lieq_gguf.quant_types import BY_GGML_ID, DEFAULT_LADDER, QUANT_TYPES, Family, QuantType, parse_types

ALL_TYPES = pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=lambda t: t.name)
GGML_IDS = {t.value for t in gguf.GGMLQuantizationType}
IN_GGUF = pytest.mark.parametrize(
    "quant_type", [t for t in QUANT_TYPES.values() if t.ggml_id in GGML_IDS], ids=lambda t: t.name
)
# Where llama.cpp calls a file otherwise than "mostly" the name of the type.
FILE_TYPE_NAMES = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}
# tensor_requires_imatrix in llama.cpp's src/llama-quant.cpp
NEED_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


@ALL_TYPES
def test_name_and_block_are_those_of_the_library(quant_type: QuantType) -> None:
    traits = ggml.ggml_library().ggml_get_type_traits(quant_type.ggml_id).contents
    assert (traits.type_name.decode().upper(), traits.block_size, traits.type_size) == (
        quant_type.name,
        quant_type.block_size,
        quant_type.block_bytes,
    )


def test_gguf_knows_all_but_the_newest() -> None:
    """Version 0.19 is behind llama.cpp by one of our types."""
    assert {t.name for t in QUANT_TYPES.values() if t.ggml_id not in GGML_IDS} <= {"Q2_0"}


@IN_GGUF
def test_name_and_block_are_those_of_gguf(quant_type: QuantType) -> None:
    ggml_type = gguf.GGMLQuantizationType(quant_type.ggml_id)
    assert ggml_type.name == quant_type.name
    assert gguf.GGML_QUANT_SIZES[ggml_type] == (quant_type.block_size, quant_type.block_bytes)


@IN_GGUF
def test_file_type_is_that_of_gguf(quant_type: QuantType) -> None:
    expected = FILE_TYPE_NAMES.get(quant_type.name, f"MOSTLY_{quant_type.name}")
    assert gguf.LlamaFileType(quant_type.file_type).name == expected


@ALL_TYPES
def test_nominal_bits_are_the_number_in_the_name(quant_type: QuantType) -> None:
    digits = re.search(r"\d+", quant_type.name)
    assert digits is not None
    assert quant_type.nominal_bits == int(digits.group())


def test_importance_is_needed_where_llama_quantize_needs_it() -> None:
    assert {t.name for t in QUANT_TYPES.values() if t.needs_imatrix} == NEED_IMATRIX


@pytest.mark.parametrize(
    ("name", "bits"), [("IQ1_S", 1.5625), ("Q2_K", 2.625), ("IQ4_XS", 4.25), ("Q6_K", 6.5625), ("F16", 16.0)]
)
def test_bits_per_weight_count_the_scales(name: str, bits: float) -> None:
    assert QUANT_TYPES[name].bits_per_weight == bits


@IN_GGUF
def test_tensor_bytes_agree_with_gguf(quant_type: QuantType) -> None:
    shape = gguf.quant_shape_to_byte_shape((3, 5, 512), gguf.GGMLQuantizationType(quant_type.ggml_id))
    assert quant_type.tensor_bytes((3, 5, 512)) == shape[0] * shape[1] * shape[2]


@ALL_TYPES
def test_a_row_fits_only_in_whole_blocks(quant_type: QuantType) -> None:
    size = quant_type.block_size
    assert [n for n in range(1, 3 * size + 1) if quant_type.fits(n)] == [size, 2 * size, 3 * size]


def test_only_plain_numbers_are_not_quantized() -> None:
    assert [t.name for t in QUANT_TYPES.values() if not t.is_quantized] == ["F32", "F16", "BF16"]


# What a type of each family looks like by name; the family itself is a column of the table.
FAMILY_NAMES: dict[Family, str] = {
    "float": r"B?F\d+", "legacy": r"Q\d_[01]", "K": r"Q\d_K", "IQ": r"IQ\d_\w+", "trained": r"TQ\d_0|MXFP4",
}  # fmt: skip
# ggml_quantize_init in llama.cpp's ggml-quants.c builds grids for these
WITH_TABLES = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}


@ALL_TYPES
def test_family_is_that_of_the_name(quant_type: QuantType) -> None:
    assert [f for f, pattern in FAMILY_NAMES.items() if re.fullmatch(pattern, quant_type.name)] == [quant_type.family]


def test_tables_are_made_where_ggml_makes_them() -> None:
    assert {t.name for t in QUANT_TYPES.values() if t.has_tables} == WITH_TABLES


@ALL_TYPES
def test_a_type_stands_in_every_table_that_it_belongs_to(quant_type: QuantType) -> None:
    """A new row of the table must not be forgotten elsewhere."""
    assert (code_layout(quant_type) is not None) == (quant_type.family not in ("float", "trained"))
    if quant_type in DEFAULT_LADDER or quant_type.name == "Q2_0":  # what `bench --types` measures
        assert decode_costs().picoseconds[quant_type.name] > 0
    assert any(quant_type.family in profile.families for profile in PROFILES.values())
    assert any(quant_type.bits_per_weight <= limit for limit, _ in _COLOURS)
    assert probe_type(quant_type.block_size).fits(quant_type.block_size)


def test_every_profile_has_families_of_the_table() -> None:
    assert all(set(profile.families) <= set(get_args(Family)) for profile in PROFILES.values())


def test_types_are_found_by_their_id() -> None:
    assert {BY_GGML_ID[t.ggml_id] for t in QUANT_TYPES.values()} == set(QUANT_TYPES.values())


def test_parse_takes_any_case_and_blanks() -> None:
    assert parse_types([" q2_k", "Iq3_Xxs "]) == (QUANT_TYPES["Q2_K"], QUANT_TYPES["IQ3_XXS"])


def test_parse_drops_repetitions_and_keeps_order() -> None:
    assert [t.name for t in parse_types(["Q4_K", "Q2_K", "q4_k"])] == ["Q4_K", "Q2_K"]


@pytest.mark.parametrize("names", [["Q2_K", "Q9_K"], ["Q4_K_M"], [""], ["Q2_K", ""]])
def test_parse_refuses_an_unknown_name_and_lists_the_known(names: list[str]) -> None:
    with pytest.raises(BudgetError, match=f"'{names[-1]}' is not a tensor type.*IQ2_XXS"):
        parse_types(names)


def test_parse_refuses_no_name() -> None:
    with pytest.raises(BudgetError, match=r"no tensor type given.*Q4_K"):
        parse_types([])


def test_ladder_rises_without_repetition() -> None:
    bits = [t.bits_per_weight for t in DEFAULT_LADDER]
    assert bits == sorted(bits)
    assert len(set(DEFAULT_LADDER)) == len(DEFAULT_LADDER)


def test_ladder_has_no_type_that_ruins_ordinary_models() -> None:
    names = {t.name for t in DEFAULT_LADDER}
    assert not names & {"IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4"}


@pytest.mark.parametrize("nominal", [2, 4, 8, 16])
def test_ladder_has_the_widths_of_the_papers(nominal: int) -> None:
    assert any(t.nominal_bits == nominal for t in DEFAULT_LADDER)


@pytest.mark.parametrize(("width", "most"), [(576, 4.5), (896, 4.5), (2048, 2.1), (100, 16.0)])
def test_ladder_has_a_small_type_for_rows_of(width: int, most: float) -> None:
    assert min(t.bits_per_weight for t in DEFAULT_LADDER if t.fits(width)) <= most


def test_ladder_leaves_a_choice_without_an_importance_matrix() -> None:
    assert min(t.bits_per_weight for t in DEFAULT_LADDER if not t.needs_imatrix) == 2.625

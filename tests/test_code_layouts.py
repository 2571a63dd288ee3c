"""Packing is proved by ggml's own decoders."""

import numpy as np
import numpy.typing as npt
import pytest

from lieq_gguf.native import ggml
from lieq_gguf.native.code_layouts import CodeLayout, code_layout
from lieq_gguf.quant_types import QUANT_TYPES

LAYOUTS = {name: found for name, quant_type in QUANT_TYPES.items() if (found := code_layout(quant_type))}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CodeLayout:
    return LAYOUTS[request.param]


def encoded_rows(layout: CodeLayout) -> npt.NDArray[np.uint8]:
    weights = np.random.default_rng(0).standard_normal((6, 512), dtype=np.float32)
    return ggml.quantize(weights, layout.quant_type, np.ones(512, dtype=np.float32))


def test_types_with_codes_are_those_that_are_rounded_weight_by_weight() -> None:
    # the others round some weights together to an entry of a codebook, or are packed by threes
    vectors = (
        "IQ1",
        "IQ2",
        "IQ3",
        "TQ",
        "MXFP",
    )
    assert LAYOUTS.keys() == {n for n, t in QUANT_TYPES.items() if t.is_quantized and not n.startswith(vectors)}


def test_any_codes_decode_to_base_and_steps(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    codes = np.random.default_rng(1).integers(0, len(layout.levels), (6, 512)).astype(np.uint8)
    base, step = layout.grid(blocks)
    decoded = ggml.dequantize(layout.pack(blocks, codes), layout.quant_type)
    np.testing.assert_allclose(decoded, base + step * layout.levels[codes], rtol=1e-5, atol=1e-6)


def test_codes_of_decoded_weights_are_those_of_the_bytes(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    base, step = layout.grid(blocks)
    assert (step != 0).all()
    codes, levels = layout.nearest((ggml.dequantize(blocks, layout.quant_type) - base) / step)
    assert np.array_equal(levels, layout.levels[codes])
    assert np.array_equal(layout.pack(blocks, codes), blocks)


def test_nearest_level_is_nearest(layout: CodeLayout) -> None:
    values = np.random.default_rng(2).uniform(layout.levels[0] - 2, layout.levels[-1] + 2, 2000).astype(np.float32)
    codes, levels = layout.nearest(values)
    best = np.abs(values[:, None] - layout.levels).min(axis=1)
    np.testing.assert_allclose(np.abs(values - levels), best, atol=1e-5)
    assert np.array_equal(levels, layout.levels[codes])


def test_packing_leaves_the_scales_alone(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    other = layout.pack(blocks, np.zeros((6, 512), dtype=np.uint8))
    for before, after in zip(layout.grid(blocks), layout.grid(other), strict=True):
        assert np.array_equal(before, after)

"""What codes, scales and minima mean is proved by ggml's own decoders."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.plain_blocks import LAYOUTS, grid, largest_code, levels_of, nearest

from lieq_gguf.native import block_scales, ggml
from lieq_gguf.native.code_layouts import CodeLayout
from lieq_gguf.quant_types import QUANT_TYPES


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CodeLayout:
    return LAYOUTS[request.param]


def encoded_rows(layout: CodeLayout) -> npt.NDArray[np.uint8]:
    weights = np.random.default_rng(0).standard_normal((6, 512), dtype=np.float32)
    return ggml.quantize(weights, layout.quant_type, np.ones(512, dtype=np.float32))


def any_codes(layout: CodeLayout, n_codes: int) -> npt.NDArray[Any]:
    """``[6, n_codes]``."""
    return np.random.default_rng(1).integers(0, largest_code(layout) + 1, (6, n_codes)).astype(np.uint32)


def test_types_without_codes_are_those_for_trained_weights() -> None:
    assert LAYOUTS.keys() == {n for n, t in QUANT_TYPES.items() if t.is_quantized and t.family != "trained"}
    assert {n for n in LAYOUTS if LAYOUTS[n].n_together == 8} == {
        n for n in LAYOUTS if n.startswith(("IQ1", "IQ2", "IQ3"))
    }


def test_numbers_mean_what_the_decoder_makes_of_them(layout: CodeLayout) -> None:
    """Any codes, scales, minima and deltas, by the formula of ``CodeLayout``."""
    n_blocks = 512 // layout.quant_type.block_size
    blocks = layout.codes.written(encoded_rows(layout), any_codes(layout, 512 // layout.n_together))
    rng, numbers = np.random.default_rng(3), {}
    for name in ("scales", "minima", "deltas"):
        kind = getattr(layout, name)
        if kind is not None:
            given = rng.integers(0, kind.most + 1, (6, n_blocks * kind.n_per_block)).astype(np.uint32)
            blocks, numbers[name] = kind.written(blocks, given), given.astype(np.float64)
            assert np.array_equal(kind.read(blocks), given)
    factors = block_scales.read(blocks, layout.quant_type).reshape(6, n_blocks, -1)

    def by_weight(given: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.repeat(given, 512 // given.shape[1], axis=1)

    scale = layout.unit * (layout.first_scale + by_weight(numbers.get("scales", np.zeros((6, 1)))))
    delta = layout.delta * (1 - 2.0 * by_weight(numbers.get("deltas", np.zeros((6, 1)))))
    lowest = np.zeros((6, 512))
    if factors.shape[2] == 2:  # a minimum of the whole block is added
        lowest = by_weight(factors[..., 1]) * (-by_weight(numbers["minima"]) if "minima" in numbers else 1)
    expected = by_weight(factors[..., 0]) * scale * (levels_of(layout, layout.codes.read(blocks)) + delta) + lowest
    decoded = ggml.dequantize(blocks, layout.quant_type)
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_codes_of_decoded_weights_are_those_of_the_bytes(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    base, step = grid(layout, blocks)
    assert (step != 0).all()
    values = (ggml.dequantize(blocks, layout.quant_type) - base) / step
    parts = np.split(values.T, 512 // layout.n_together)
    codes = np.stack([nearest(layout, v, np.ones(len(v), dtype=np.float32))[0] for v in parts], axis=1)
    assert np.array_equal(layout.codes.written(blocks, codes), blocks)
    assert np.array_equal(layout.codes.read(blocks), codes)


def test_packing_leaves_the_scales_alone(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    for before, after in zip(grid(layout, blocks), grid(layout, layout.codes.filled(blocks, 0)), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("quant_type", [t for t in QUANT_TYPES.values() if block_scales.can_be_multiplied(t)])
def test_scales_of_blocks_are_read_as_they_were_written(quant_type: Any) -> None:
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (5, 3 * quant_type.block_bytes)).astype(np.uint8)
    n = block_scales.read(data, quant_type).shape[1]
    numbers = rng.standard_normal((15, n)).astype(np.float16).astype(np.float32)
    written = block_scales.written(data, quant_type, numbers)
    assert np.array_equal(block_scales.read(written, quant_type), numbers)
    zeros = np.zeros_like(numbers)
    assert np.array_equal(
        block_scales.written(written, quant_type, zeros), block_scales.written(data, quant_type, zeros)
    )

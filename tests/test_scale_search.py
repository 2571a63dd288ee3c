"""The scales of blocks against all neighbouring ones."""

import numpy as np
import numpy.typing as npt
import pytest

from lieq_gguf.native import block_scales, ggml
from lieq_gguf.native.code_layouts import CodeLayout
from lieq_gguf.native.type_layouts import code_layout
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.writing.scale_search import scales_for

LAYOUTS = {name: found for name, quant_type in QUANT_TYPES.items() if (found := code_layout(quant_type))}
Floats = npt.NDArray[np.float32]


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CodeLayout:
    return LAYOUTS[request.param]


def some_moments(n: int) -> Floats:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * n, n // 8)) @ rng.standard_normal((n // 8, n)) / 2 + rng.standard_normal((4 * n, n))
    return (x.T @ x / len(x)).astype(np.float32)


def some_weights(layout: CodeLayout) -> Floats:
    """``[n_rows, n_columns]``."""
    return np.random.default_rng(1).standard_normal((40, layout.quant_type.block_size), dtype=np.float32)


def errors(
    blocks: npt.NDArray[np.uint8], layout: CodeLayout, wanted: Floats, moments: Floats
) -> npt.NDArray[np.float64]:
    change = ggml.dequantize(blocks, layout.quant_type).astype(np.float64) - wanted
    result: npt.NDArray[np.float64] = ((change @ moments) * change).sum(axis=1)
    return result


def test_no_block_is_further_away_and_all_together_are_nearer(layout: CodeLayout) -> None:
    wanted, moments = some_weights(layout), some_moments(layout.quant_type.block_size)
    blocks = ggml.quantize(wanted, layout.quant_type, moments.diagonal().copy())
    found = scales_for(blocks, layout, wanted.T, moments)
    before, after = (errors(data, layout, wanted, moments) for data in (blocks, found))
    assert (after <= before * 1.01).all()  # the scale of a block is rounded to F16
    assert after.sum() < before.sum()
    assert np.array_equal(layout.codes.read(found), layout.codes.read(blocks))


def test_scales_that_are_off_by_one_are_found_again(layout: CodeLayout) -> None:
    blocks = ggml.quantize(some_weights(layout), layout.quant_type, np.ones(layout.quant_type.block_size, np.float32))
    wanted = ggml.dequantize(blocks, layout.quant_type)
    moved = blocks
    for numbers in filter(None, (layout.scales, layout.minima)):
        given = numbers.read(moved)
        given[:, 5] = np.where(given[:, 5] > 0, given[:, 5] - 1, 1)
        moved = numbers.written(moved, given)
    moved = block_scales.multiplied(moved, layout.quant_type, np.full((len(moved), 1), 0.97, np.float32))
    found = scales_for(moved, layout, wanted.T, np.eye(wanted.shape[1], dtype=np.float32))
    left, off = (np.square(ggml.dequantize(d, layout.quant_type) - wanted).sum() for d in (found, moved))
    assert left < 2e-3 * off


def test_scales_stay_in_their_range() -> None:
    for name in ("Q2_K", "IQ2_XS", "Q4_K"):
        layout = LAYOUTS[name]
        moments = np.eye(256, dtype=np.float32)
        blocks = ggml.quantize(some_weights(layout), layout.quant_type, np.ones(256, np.float32))
        assert layout.scales is not None
        for number, factor in ((layout.scales.most, 3.0), (0, -3.0)):
            extreme = layout.scales.filled(blocks, number)
            wanted = factor * ggml.dequantize(layout.scales.filled(blocks, layout.scales.most), layout.quant_type)
            found = scales_for(extreme, layout, wanted.T, moments)
            if factor > 0:
                assert (layout.scales.read(found) == number).all()
            else:  # below zero it would be the largest number; minima can make one of one better
                assert (layout.scales.read(found) <= 1).all()
            assert np.isfinite(ggml.dequantize(found, layout.quant_type)).all()


def test_rows_of_zeros_stay_zero(layout: CodeLayout) -> None:
    zeros = np.zeros((2, layout.quant_type.block_size), dtype=np.float32)
    blocks = ggml.quantize(zeros, layout.quant_type, np.ones(zeros.shape[1], np.float32))
    found = scales_for(blocks, layout, zeros.T, some_moments(zeros.shape[1]))
    assert not ggml.dequantize(found, layout.quant_type).any()

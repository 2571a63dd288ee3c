"""Packing is proved by ggml's own decoders."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lieq_gguf.native import ggml
from lieq_gguf.native.code_layouts import CodebookLayout, CodeLayout, LevelLayout
from lieq_gguf.native.packed_numbers import PackedNumbers
from lieq_gguf.native.type_layouts import code_layout
from lieq_gguf.quant_types import QUANT_TYPES

LAYOUTS = {name: found for name, quant_type in QUANT_TYPES.items() if (found := code_layout(quant_type))}
LEVELS = {name: layout for name, layout in LAYOUTS.items() if isinstance(layout, LevelLayout)}
CODEBOOKS = {name: layout for name, layout in LAYOUTS.items() if isinstance(layout, CodebookLayout)}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CodeLayout:
    return LAYOUTS[request.param]


def encoded_rows(layout: CodeLayout) -> npt.NDArray[np.uint8]:
    weights = np.random.default_rng(0).standard_normal((6, 512), dtype=np.float32)
    return ggml.quantize(weights, layout.quant_type, np.ones(512, dtype=np.float32))


def any_codes(layout: CodeLayout, n_codes: int) -> npt.NDArray[Any]:
    """``[6, n_codes]``."""
    most = max(layout.spread)
    if isinstance(layout, CodebookLayout):
        most = (1 << layout.n_signs) * len(layout.entries) ** (8 // layout.entries.shape[1]) - 1
    dtype = np.uint8 if isinstance(layout, LevelLayout) else np.uint32
    return np.random.default_rng(1).integers(0, most + 1, (6, n_codes)).astype(dtype)


def nearest_codes(layout: CodeLayout, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Codes ``[n_rows, n_codes]`` of values ``[n_rows, n_per_row]``."""
    parts = np.split(values.T, values.shape[1] // layout.n_together)
    return np.stack([layout.nearest(v, np.ones(len(v), dtype=np.float32))[0] for v in parts], axis=1)


def test_types_without_codes_are_those_for_trained_weights() -> None:
    assert LAYOUTS.keys() == {n for n, t in QUANT_TYPES.items() if t.is_quantized and t.family != "trained"}
    assert CODEBOOKS.keys() == {n for n in LAYOUTS if n.startswith(("IQ1", "IQ2", "IQ3"))}


def test_any_codes_decode_to_base_and_steps(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    codes = any_codes(layout, 512 // layout.n_together)
    base, step = layout.grid(blocks)
    decoded = ggml.dequantize(layout.codes.written(blocks, codes), layout.quant_type)
    np.testing.assert_allclose(decoded, base + step * layout.levels_of(codes), rtol=1e-5, atol=1e-6)


def test_codes_of_decoded_weights_are_those_of_the_bytes(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    base, step = layout.grid(blocks)
    assert (step != 0).all()
    values = (ggml.dequantize(blocks, layout.quant_type) - base) / step
    codes = nearest_codes(layout, values)
    assert np.array_equal(layout.codes.written(blocks, codes), blocks)
    assert np.array_equal(layout.codes.read(blocks), codes)


@pytest.mark.parametrize("name", LEVELS)
def test_nearest_level_is_nearest(name: str) -> None:
    layout = LEVELS[name]
    values = np.random.default_rng(2).uniform(layout.levels[0] - 2, layout.levels[-1] + 2, (1, 2000))
    codes, levels = layout.nearest(values.astype(np.float32), np.ones(1, dtype=np.float32))
    best = np.abs(values[0, :, None] - layout.levels).min(axis=1)
    np.testing.assert_allclose(np.abs(values - levels)[0], best, atol=1e-5)
    assert np.array_equal(levels[0], layout.levels_of(codes))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_hardly_any_entry_of_a_codebook_is_nearer(name: str) -> None:
    layout = CODEBOOKS[name]
    rng = np.random.default_rng(2)
    importance = rng.lognormal(sigma=0.5, size=8).astype(np.float32)
    typical = float(np.abs(layout.entries).mean())
    values = rng.normal(0, 1.2 * typical, (8, 200)).astype(np.float32)
    codes, levels = layout.nearest(values, importance)
    np.testing.assert_array_equal(layout.levels_of(codes[:, None]), levels.T)
    error = (importance[:, None] * (values - levels) ** 2).sum(axis=0)

    def least(signs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        width, result = layout.entries.shape[1], np.zeros(200)
        for start in range(0, 8, width):
            some = slice(start, start + width)
            apart = (values * signs)[some, :, None] - layout.entries.T[:, None, :]
            result += (importance[some, None, None] * apart**2).sum(axis=0).min(axis=1)
        return result

    natural = np.where(values < 0, -1, 1).astype(np.float32) if layout.n_signs else np.ones_like(values)
    best = least(natural)
    if layout.n_signs == 7:  # with an odd number of negative signs, one of them is not that of its value
        is_odd = (natural < 0).sum(axis=0) % 2 == 1
        assert ((levels < 0).sum(axis=0) % 2 == 0).all()
        others = [natural * np.where(np.arange(8) == i, -1, 1)[:, None] for i in range(8)]
        best[is_odd] = np.min([least(signs.astype(np.float32)) for signs in others], axis=0)[is_odd]
    assert (error >= best * (1 - 1e-4)).all()
    assert error.sum() <= best.sum() * (1.02 if layout.n_signs == 7 else 1.0001)


def test_packing_leaves_the_scales_alone(layout: CodeLayout) -> None:
    blocks = encoded_rows(layout)
    other = layout.codes.filled(blocks, 0)
    for before, after in zip(layout.grid(blocks), layout.grid(other), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("kind", ["scales", "minima"])
def test_weights_are_linear_in_the_scale_and_the_minimum_of_their_part(layout: CodeLayout, kind: str) -> None:
    numbers: PackedNumbers | None = getattr(layout, kind)
    if numbers is None:
        assert kind == "minima" or layout.quant_type.block_size < 256
        return
    blocks = encoded_rows(layout)
    given = np.random.default_rng(3).integers(0, numbers.most + 1, (6, 2 * numbers.n_per_block)).astype(np.uint32)
    changed = numbers.written(blocks, given)
    assert np.array_equal(numbers.read(changed), given)
    assert np.array_equal(layout.codes.read(changed), layout.codes.read(blocks))
    least, most, found = (
        ggml.dequantize(data, layout.quant_type)
        for data in (numbers.filled(blocks, 0), numbers.filled(blocks, numbers.most), changed)
    )
    shares = np.repeat(given / numbers.most, 256 // numbers.n_per_block, axis=1)
    np.testing.assert_allclose(found, least + (most - least) * shares, rtol=1e-4, atol=1e-5 * np.abs(most).max())

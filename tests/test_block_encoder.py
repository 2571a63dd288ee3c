"""Blocks encoded by compiled code, against a plain implementation, and against all neighbouring scales."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.command import RunCli, assert_refused
from support.plain_blocks import LAYOUTS, grid, nearest, with_scales

from lieq_gguf.native import block_encoder, block_scales, ggml
from lieq_gguf.native.block_encoder import Columns
from lieq_gguf.native.code_layouts import CodeLayout

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CodeLayout:
    return LAYOUTS[request.param]


def some_moments(n: int) -> Floats:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * n, n // 8)) @ rng.standard_normal((n // 8, n)) / 2 + rng.standard_normal((4 * n, n))
    return (x.T @ x / len(x)).astype(np.float32)


def some_weights(layout: CodeLayout, n_rows: int = 40) -> Floats:
    """``[n_rows, n_columns]``."""
    return np.random.default_rng(1).standard_normal((n_rows, layout.quant_type.block_size), dtype=np.float32)


def columns_of(weights: Floats, moments: Floats) -> Columns:
    """The only block of rows ``[n_rows, n_columns]``."""
    lower = np.linalg.cholesky(moments[::-1, ::-1].astype(np.float64))
    upper = lower[::-1, ::-1]
    exact = np.ascontiguousarray(weights.T)
    roots = upper.diagonal()
    return Columns(
        exact,
        np.zeros_like(exact),
        exact,
        moments,
        (upper / roots).astype(np.float32),
        np.square(roots, dtype=np.float32),
    )


def scales_for(blocks: Bytes, layout: CodeLayout, wanted: Floats, moments: Floats) -> Bytes:
    return block_encoder.encode(layout, columns_of(wanted, moments), blocks, n_rounds=0)[0]


def errors(blocks: Bytes, layout: CodeLayout, wanted: Floats, moments: Floats) -> npt.NDArray[np.float64]:
    change = ggml.dequantize(blocks, layout.quant_type).astype(np.float64) - wanted
    result: npt.NDArray[np.float64] = ((change @ moments) * change).sum(axis=1)
    return result


def plain_codes(layout: CodeLayout, blocks: Bytes, columns: Columns) -> Bytes:
    """The same scales with other codes."""
    base, step = (part.T for part in grid(layout, blocks))
    n, codes = layout.n_together, []
    wrong = np.zeros_like(columns.exact)
    for start in range(0, len(columns.exact), n):
        some = slice(start, start + n)
        among = columns.coupling[some, some]
        correction = np.linalg.solve(among.T, columns.coupling[:start, some].T @ wrong[:start])
        importance = np.square(among) @ columns.pivots[some].astype(np.float32)
        code, level = nearest(layout, (columns.exact[some] + correction - base[some]) / step[some], importance)
        codes.append(code)
        wrong[some] = columns.exact[some] - (base[some] + step[some] * level)
    return layout.codes.written(blocks, np.stack(codes, axis=1))


def test_scales_and_codes_are_those_of_the_plain_implementation(layout: CodeLayout) -> None:
    weights, moments = some_weights(layout), some_moments(layout.quant_type.block_size)
    columns = columns_of(weights, moments)
    start = ggml.quantize(weights, layout.quant_type, moments.diagonal().copy())
    found, decoded = block_encoder.encode(layout, columns, start, n_rounds=1)
    regular = moments + 0.05 * columns.pivots.mean() * np.eye(len(moments), dtype=np.float32)
    expected = with_scales(layout, start, columns.wanted, regular)
    expected = with_scales(layout, plain_codes(layout, expected, columns), columns.wanted, regular)
    assert (found != expected).any(axis=1).sum() <= 2  # a tie in float32 moves all that follows in its row
    assert (found == expected).mean() > 0.97
    again = ggml.dequantize(found, layout.quant_type).T
    np.testing.assert_allclose(decoded, again, rtol=1e-5, atol=1e-6 * np.abs(again).max())


def test_our_own_start_leaves_no_larger_error_than_that_of_ggml(layout: CodeLayout) -> None:
    if layout.deltas is not None:
        pytest.skip("types with deltas start from ggml's blocks")
    weights, moments = some_weights(layout, 200), some_moments(layout.quant_type.block_size)
    columns = columns_of(weights, moments)
    start = ggml.quantize(weights, layout.quant_type, moments.diagonal().copy())
    own, of_ggml = (
        errors(block_encoder.encode(layout, columns, given)[0], layout, weights, moments).sum()
        for given in (None, start)
    )
    assert own < 1.02 * of_ggml  # less for most types; by chance a little more


def test_no_block_is_further_away_and_all_together_are_nearer(layout: CodeLayout) -> None:
    wanted, moments = some_weights(layout), some_moments(layout.quant_type.block_size)
    blocks = ggml.quantize(wanted, layout.quant_type, moments.diagonal().copy())
    found = scales_for(blocks, layout, wanted, moments)
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
    found = scales_for(moved, layout, wanted, np.eye(wanted.shape[1], dtype=np.float32))
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
            found = scales_for(extreme, layout, wanted.astype(np.float32), moments)
            if factor > 0:
                assert (layout.scales.read(found) == number).all()
            else:  # below zero it would be the largest number; minima can make one of one better
                assert (layout.scales.read(found) <= 1).all()
            assert np.isfinite(ggml.dequantize(found, layout.quant_type)).all()


@pytest.mark.parametrize("size", [0.0, 1e-9, 3e4])
def test_rows_of_zeros_and_extreme_rows_stay_what_they_are(layout: CodeLayout, size: float) -> None:
    weights, moments = some_weights(layout, 3) * np.float32(size), some_moments(layout.quant_type.block_size)
    columns = columns_of(weights, moments)
    for start in (None, ggml.quantize(weights, layout.quant_type, np.ones(weights.shape[1], np.float32))):
        if start is None and layout.deltas is not None:
            continue
        found, _ = block_encoder.encode(layout, columns, start)
        decoded = ggml.dequantize(found, layout.quant_type)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded).max() <= 4 * np.abs(weights).max() + (1e-7 if size else 0)


def test_rows_do_not_depend_on_their_neighbours(layout: CodeLayout) -> None:
    weights, moments = some_weights(layout, 70), some_moments(layout.quant_type.block_size)
    start = None if layout.deltas is None else ggml.quantize(weights, layout.quant_type, moments.diagonal().copy())
    together, _ = block_encoder.encode(layout, columns_of(weights, moments), start)
    for some in (slice(0, 1), slice(31, 34), slice(40, 70)):
        alone, _ = block_encoder.encode(
            layout, columns_of(weights[some], moments), None if start is None else start[some]
        )
        assert np.array_equal(alone, together[some])


def test_missing_library_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, tiny_model: Path, tmp_path: Path
) -> None:
    block_encoder._library.cache_clear()
    monkeypatch.setattr(block_encoder, "LIBRARY", tmp_path / "nothing.so")
    command = ("convert", tiny_model, "--bits", "4.5", "--n-tokens", "512", "-o", tmp_path / "out.gguf")
    done = run_cli(*command)
    assert_refused(done, "or use --no-error-feedback", tmp_path)  # one line, so nothing was measured
    assert run_cli(*command, "--no-error-feedback").exit_code == 0
    monkeypatch.undo()
    block_encoder._library.cache_clear()
    block_encoder.require_library()

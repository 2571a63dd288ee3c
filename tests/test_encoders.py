"""Where our encoder is not ggml's: the scale of Q2_0. ggml decodes what it writes."""

import numpy as np
import numpy.typing as npt
import pytest

from lieq_gguf.errors import QuantizationError
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import QUANT_TYPES

FloatArray = npt.NDArray[np.float32]
Q2_0 = QUANT_TYPES["Q2_0"]
LEVELS = np.arange(-1, 3, dtype=np.float32)


@pytest.fixture(scope="module")
def weights() -> FloatArray:
    return np.random.default_rng(0).normal(0, 0.05, (40, 576)).astype(np.float32)


@pytest.fixture(scope="module")
def importance() -> FloatArray:
    return np.random.default_rng(1).uniform(0.01, 4, 576).astype(np.float32)


def errors(data: npt.NDArray[np.uint8], weights: FloatArray, importance: FloatArray) -> FloatArray:
    """Weighted squared error of each block."""
    squared: FloatArray = importance * (ggml.dequantize(data, Q2_0) - weights) ** 2
    result: FloatArray = squared.reshape(-1, 64).sum(axis=1)
    return result


def test_hardly_any_scale_is_better(weights: FloatArray, importance: FloatArray) -> None:
    found = errors(encoders.quantize(weights, Q2_0, importance), weights, importance)
    blocks, weighted = weights.reshape(-1, 64), np.tile(importance.reshape(-1, 64), (len(weights), 1))
    best = np.full(len(blocks), np.inf)
    for scale in np.linspace(-0.2, 0.2, 2001):  # zero is among them: every weight on zero
        rounded = scale * np.clip(np.rint(blocks / scale), -1, 2) if scale else np.zeros_like(blocks)
        best = np.minimum(best, (weighted * (rounded - blocks) ** 2).sum(axis=1))
    assert found.sum() < 1.01 * best.sum()
    assert (found < 1.15 * best).all()


def test_error_is_a_fraction_of_that_of_ggmls_encoder(weights: FloatArray, importance: FloatArray) -> None:
    ours, theirs = (
        errors(quantize(weights, Q2_0, importance), weights, importance).sum()
        for quantize in (encoders.quantize, ggml.quantize)
    )
    assert ours < 0.25 * theirs
    # four even levels leave 11.9 % of a Gaussian's energy
    assert ours < 0.125 * (importance * weights**2).sum()


def test_weights_on_the_grid_are_kept(importance: FloatArray) -> None:
    numbers = np.random.default_rng(2)
    for scale in (0.25, -0.25):
        grid = (scale * numbers.choice(LEVELS, (8, 576))).astype(np.float32)
        data = encoders.quantize(grid, Q2_0, importance)
        assert np.array_equal(ggml.dequantize(data, Q2_0), grid)


def test_importance_is_heeded(weights: FloatArray) -> None:
    importance = np.ones(576, dtype=np.float32)
    importance[:8] = 1e4
    plain, heeded = (ggml.dequantize(encoders.quantize(weights, Q2_0, given), Q2_0) for given in (None, importance))
    assert ((heeded - weights)[:, :8] ** 2).sum() < 0.6 * ((plain - weights)[:, :8] ** 2).sum()


@pytest.mark.parametrize("value", [0, 1], ids=["weights", "importance"])
def test_blocks_of_nothing_are_zeros(value: float) -> None:
    """Weights that are all zero, and columns that are never used."""
    rows = np.full((2, 128), value, dtype=np.float32)
    decoded = ggml.dequantize(encoders.quantize(rows, Q2_0, np.zeros(128, dtype=np.float32)), Q2_0)
    assert not decoded.any()


def test_bytes_do_not_depend_on_threads(
    weights: FloatArray, importance: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = encoders.quantize(weights, Q2_0, importance)
    monkeypatch.setattr(ggml, "_CHUNK_WEIGHTS", 3 * 576)
    assert np.array_equal(encoders.quantize(weights, Q2_0, importance, n_threads=3), alone)


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "F16"])
def test_other_types_are_ggmls(name: str) -> None:
    rows = np.random.default_rng(3).normal(size=(5, 512)).astype(np.float32)
    expected = ggml.quantize(rows, QUANT_TYPES[name], np.ones(512, dtype=np.float32))
    assert np.array_equal(encoders.quantize(rows, QUANT_TYPES[name], np.ones(512, dtype=np.float32)), expected)


def test_what_cannot_be_encoded_is_refused() -> None:
    for rows, words in ((np.zeros((1, 96), np.float32), "blocks of 64"), (np.full((1, 64), np.nan, np.float32), "NaN")):
        with pytest.raises(QuantizationError, match=words):
            encoders.quantize(rows, Q2_0)

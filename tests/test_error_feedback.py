"""Error feedback against a plain implementation of the published algorithm, and against no feedback at all."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.plain_blocks import grid, nearest, with_scales

from lieq_gguf.errors import CalibrationError, QuantizationError
from lieq_gguf.native import block_encoder, ggml
from lieq_gguf.native.block_encoder import Columns
from lieq_gguf.native.type_layouts import code_layout
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.writing import error_feedback
from lieq_gguf.writing.error_feedback import DAMPING, MatrixToEncode, coupling, encode

# without the types for weights that were trained to have three values
QUANTIZED = [t for t in QUANT_TYPES.values() if t.is_quantized and not t.name.startswith("TQ")]
Floats = npt.NDArray[np.float64]


def correlated_moments(n_in: int, n_tokens: int = 4096) -> torch.Tensor:
    """Of inputs with a few strong common directions and columns of very different size, as activations have them."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((n_tokens, n_in // 16)) @ rng.standard_normal((n_in // 16, n_in)) / 4
    x = (common + rng.standard_normal((n_tokens, n_in))) * rng.lognormal(sigma=0.7, size=n_in)
    return torch.from_numpy(x.T @ x / n_tokens).float()


def some_weights(n_in: int, n_rows: int = 96) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((n_rows, n_in), dtype=np.float32)


def output_error(
    wanted: npt.NDArray[np.float32], data: npt.NDArray[np.uint8], quant_type: QuantType, moments: torch.Tensor
) -> float:
    """``tr(ΔW H ΔWᵀ)``."""
    change = (wanted - ggml.dequantize(data, quant_type)).astype(np.float64)
    return float(((change @ moments.double().numpy()) * change).sum())


@pytest.mark.parametrize("quant_type", QUANTIZED, ids=lambda t: t.name)
def test_output_error_is_less_than_without_feedback(quant_type: QuantType) -> None:
    moments, weights = correlated_moments(512), some_weights(512)
    importance = moments.diagonal().numpy().copy()
    plain = ggml.quantize(weights, quant_type, importance)
    [data] = encode([MatrixToEncode(weights, quant_type, importance)], coupling(moments.clone()))
    assert data.shape == plain.shape
    bound = 0.97 if quant_type.family == "trained" else 0.75
    assert output_error(weights, data, quant_type, moments) < bound * output_error(weights, plain, quant_type, moments)


class Published:
    """GPTQ as in arXiv 2210.17323: errors over all later columns at once, by the inverse of ``H``; scales of a block
    when its turn comes. Weights that share a code are rounded together. The scales with which a block starts are ours.
    """

    def __init__(self, quant_type: QuantType, importance: npt.NDArray[np.float32], moments: Floats) -> None:
        layout = code_layout(quant_type)
        assert layout is not None
        self.layout, self.quant_type, self.importance = layout, quant_type, importance
        self.upper = np.linalg.cholesky(np.linalg.inv(moments)).T

    def encoded(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        left, blocks = weights.astype(np.float64), []
        for start in range(0, weights.shape[1], self.quant_type.block_size):
            some = slice(start, start + self.quant_type.block_size)
            wanted = np.ascontiguousarray(left[:, some], np.float32)
            cost = self.remaining(some).astype(np.float32)
            block = self.started(wanted, cost, some)
            for _ in range(2 if self.layout.n_together == 1 else 1):
                block = self.rounded(block, left.copy(), start)
                block = with_scales(self.layout, block, wanted.T, cost + self.least(cost))
            self.correct(left, some, ggml.dequantize(block, self.quant_type))
            blocks.append(block)
        return np.concatenate(blocks, axis=1)

    def started(self, wanted: npt.NDArray[np.float32], cost: npt.NDArray[np.float32], some: slice) -> Any:
        if self.layout.deltas is not None:
            block = ggml.quantize(wanted, self.quant_type, self.importance[some])
            return with_scales(self.layout, block, wanted.T, cost + self.least(cost))
        rows = np.ascontiguousarray(wanted.T)
        pivots = self.pivots(cost)
        given = Columns(rows, np.zeros_like(rows), rows, cost, np.eye(len(cost), dtype=np.float32), pivots)
        return block_encoder.encode(self.layout, given, n_rounds=0)[0]

    @staticmethod
    def pivots(cost: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        roots = np.linalg.cholesky(cost[::-1, ::-1].astype(np.float64)).diagonal()[::-1]
        return np.square(roots).astype(np.float32)

    def least(self, cost: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What keeps scales from forgetting columns without inputs."""
        result: npt.NDArray[np.float32] = np.eye(len(cost), dtype=np.float32) * np.float32(
            0.05 * self.pivots(cost).mean()
        )
        return result

    def rounded(self, block: npt.NDArray[np.uint8], left: Floats, first: int) -> npt.NDArray[np.uint8]:
        base, step = (part.astype(np.float64) for part in grid(self.layout, block))
        n, codes = self.layout.n_together, []
        for start in range(0, base.shape[1], n):
            here, some = slice(start, start + n), slice(first + start, first + start + n)
            values = ((left[:, some] - base[:, here]) / step[:, here]).T.astype(np.float32)
            code, levels = nearest(self.layout, values, self.remaining(some).diagonal().astype(np.float32))
            codes.append(code)
            self.correct(left, some, base[:, here] + step[:, here] * levels.T)
        return self.layout.codes.written(block, np.stack(codes, axis=1))

    def remaining(self, some: slice) -> Floats:
        """What an error in some columns costs when all later columns have corrected it."""
        return np.linalg.inv(self.upper[some, some].T @ self.upper[some, some])

    def correct(self, left: Floats, some: slice, decoded: npt.NDArray[np.floating[Any]]) -> None:
        error = (left[:, some] - decoded) @ np.linalg.inv(self.upper[some, some])
        left[:, some.stop :] -= error @ self.upper[some, some.stop :]


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ1_M"])
def test_codes_are_those_of_the_published_algorithm(name: str) -> None:
    quant_type, moments, weights = QUANT_TYPES[name], correlated_moments(512), some_weights(512, n_rows=24)
    importance = moments.diagonal().numpy().copy()
    damped = moments.double().numpy() + 1e-4 * np.eye(512) * float(moments.diagonal().mean())
    damped[np.diag_indices(512)] *= 1 + DAMPING
    [data] = encode([MatrixToEncode(weights, quant_type, importance)], coupling(moments.clone()))
    expected = Published(quant_type, importance, damped).encoded(weights)
    rows_that_differ = (data != expected).any(axis=1)  # a tie in float32 moves all that follows in its row
    fine = name == "Q8_0"  # its many levels have more ties, and codes are chosen twice
    assert rows_that_differ.sum() <= (8 if fine else 3)
    assert (data == expected).mean() > (0.95 if fine else 0.97)


def test_coupling_is_a_factor_of_the_moments() -> None:
    moments = correlated_moments(256).double()
    found = coupling(moments.float(), damping=0.0).weights.astype(np.float64)
    assert np.array_equal(found, np.triu(found))
    assert np.array_equal(found.diagonal(), np.ones(256))
    inverse = np.linalg.inv(found)
    squares = inverse @ moments.numpy() @ inverse.T  # D²
    scale = np.sqrt(np.outer(squares.diagonal(), squares.diagonal()))
    np.testing.assert_allclose(squares / scale, np.eye(256), atol=0.01)


def test_products_are_divided_by_the_damped_moments() -> None:
    moments = correlated_moments(256)
    damped = moments.double().numpy().copy()
    np.einsum("ii->i", damped)[:] = 2 * (damped.diagonal() + 1e-4 * damped.diagonal().mean())
    products = some_weights(256)
    found = coupling(moments.clone(), damping=1.0).divided(products)
    np.testing.assert_allclose(found @ damped, products, atol=1e-4)


def test_matrix_that_is_not_positive_definite_is_damped_more() -> None:
    moments = np.eye(8, dtype=np.float32)
    moments[2, 5] = moments[5, 2] = 5.0  # a diagonal of 1 + 1 is too little, (1 + 1) · (1 + 10) is enough
    found = coupling(torch.from_numpy(moments.copy()), damping=1.0).weights
    assert np.array_equal(np.argwhere(np.triu(found, 1)), [[2, 5]])
    diagonal = (1 + 1e-4) * 2 * 11
    assert found[2, 5] == pytest.approx(5.0 / diagonal, rel=1e-5)
    moments[2, 5] = moments[5, 2] = 1e12
    with pytest.raises(CalibrationError, match="not positive definite"):
        coupling(torch.from_numpy(moments))


def test_bytes_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_feedback, "_LEAST_ROWS", 16)  # several parts
    moments = correlated_moments(256)
    matrices = [
        MatrixToEncode(some_weights(256, n), QUANT_TYPES[name], None) for n, name in ((96, "Q3_K"), (40, "Q4_0"))
    ]
    coupled = coupling(moments)
    for one, several in zip(encode(matrices, coupled, 1), encode(matrices, coupled, 3), strict=True):
        assert np.array_equal(one, several)


def test_weights_of_uncorrelated_inputs_get_the_nearest_codes() -> None:
    quant_type, weights = QUANT_TYPES["Q8_0"], some_weights(256)
    [data] = encode([MatrixToEncode(weights, quant_type, None)], coupling(torch.eye(256)))
    found, plain = (ggml.dequantize(d, quant_type) for d in (data, ggml.quantize(weights, quant_type)))
    # ggml rounds by the scale before it is itself rounded
    per_block = [np.square(d - weights).reshape(-1, quant_type.block_size).sum(axis=1) for d in (found, plain)]
    assert (per_block[0] <= per_block[1] * (1 + 1e-5)).mean() > 0.9
    assert per_block[0].sum() < per_block[1].sum()


@pytest.mark.parametrize("n_used", [0, 100])
def test_columns_that_are_never_used_do_no_harm(n_used: int) -> None:
    moments = correlated_moments(256)
    moments[n_used:] = 0
    moments[:, n_used:] = 0
    weights = some_weights(256)
    [data] = encode([MatrixToEncode(weights, QUANT_TYPES["Q4_K"], None)], coupling(moments.clone()))
    found, plain = (
        ggml.dequantize(d, QUANT_TYPES["Q4_K"]) for d in (data, ggml.quantize(weights, QUANT_TYPES["Q4_K"]))
    )
    assert np.isfinite(found).all()
    unused, expected = (np.square(decoded - weights)[:, n_used:].mean() for decoded in (found, plain))
    assert unused < 2 * expected  # no error was moved there for nothing, and their scales were not forgotten


def test_few_tokens_are_enough_for_a_factor() -> None:
    assert np.isfinite(coupling(correlated_moments(256, n_tokens=8)).weights).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        coupling(torch.full((32, 32), float("nan")))


def test_plain_numbers_are_converted() -> None:
    weights = some_weights(256)
    [data] = encode([MatrixToEncode(weights, QUANT_TYPES["F16"], None)], coupling(correlated_moments(256)))
    assert np.array_equal(data, ggml.quantize(weights, QUANT_TYPES["F16"]))


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = some_weights(256)
    weights[3, 5] = np.inf
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        encode([MatrixToEncode(weights, QUANT_TYPES["Q4_K"], None)], coupling(correlated_moments(256)))

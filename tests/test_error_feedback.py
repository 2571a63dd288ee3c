"""Error feedback against a plain implementation of the published algorithm, and against no feedback at all."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lieq_gguf.errors import CalibrationError, QuantizationError
from lieq_gguf.native import ggml
from lieq_gguf.native.code_layouts import code_layout
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
    bound = 0.75 if code_layout(quant_type) else 0.97
    assert output_error(weights, data, quant_type, moments) < bound * output_error(weights, plain, quant_type, moments)


def published(
    weights: npt.NDArray[np.float32], quant_type: QuantType, importance: npt.NDArray[np.float32], moments: Floats
) -> npt.NDArray[np.uint8]:
    """GPTQ as in arXiv 2210.17323: errors over all later columns at once, by the inverse of ``H``; scales of a group
    when its turn comes."""
    layout = code_layout(quant_type)
    assert layout is not None
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    left = weights.astype(np.float64)
    codes = np.empty(weights.shape, dtype=np.uint8)
    groups = []
    for k in range(weights.shape[1]):
        if k % quant_type.block_size == 0:
            columns = slice(k, k + quant_type.block_size)
            groups.append(
                ggml.quantize(np.ascontiguousarray(left[:, columns], np.float32), quant_type, importance[columns])
            )
            base, step = (part.astype(np.float64) for part in layout.grid(groups[-1]))
        here = k % quant_type.block_size
        distance = np.abs(left[:, k, None] - (base[:, here, None] + step[:, here, None] * layout.levels))
        codes[:, k] = distance.argmin(axis=1)
        decoded = base[:, here] + step[:, here] * layout.levels[codes[:, k]]
        left[:, k:] -= np.outer((left[:, k] - decoded) / upper[k, k], upper[k, k:])
    return layout.pack(np.concatenate(groups, axis=1), codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "Q6_K", "IQ4_NL"])
def test_codes_are_those_of_the_published_algorithm(name: str) -> None:
    quant_type, moments, weights = QUANT_TYPES[name], correlated_moments(512), some_weights(512, n_rows=24)
    importance = moments.diagonal().numpy().copy()
    damped = moments.double().numpy() + 1e-4 * np.eye(512) * float(moments.diagonal().mean())
    damped[np.diag_indices(512)] *= 1 + DAMPING
    [data] = encode([MatrixToEncode(weights, quant_type, importance)], coupling(moments.clone()))
    expected = published(weights, quant_type, importance, damped)
    rows_that_differ = (data != expected).any(axis=1)  # a tie in float32 moves all that follows in its row
    assert rows_that_differ.sum() <= 2
    assert (data == expected).mean() > 0.97


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
    assert (np.abs(found - weights) <= np.abs(plain - weights) + 1e-6).all()
    assert (found == plain).mean() > 0.95  # ggml rounds by the scale before it is itself rounded


@pytest.mark.parametrize("n_used", [0, 100])
def test_columns_that_are_never_used_do_no_harm(n_used: int) -> None:
    moments = correlated_moments(256)
    moments[n_used:] = 0
    moments[:, n_used:] = 0
    weights = some_weights(256)
    [data] = encode([MatrixToEncode(weights, QUANT_TYPES["Q4_K"], None)], coupling(moments.clone()))
    decoded = ggml.dequantize(data, QUANT_TYPES["Q4_K"])
    assert np.isfinite(decoded).all()
    assert np.abs(decoded[:, n_used:] - weights[:, n_used:]).max() < 0.5  # no error was moved there for nothing


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

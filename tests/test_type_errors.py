from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from lieq_gguf.measure.type_errors import probe_matrix, relative_errors
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import QUANT_TYPES, QuantType

FloatArray = npt.NDArray[np.float32]
CHEAP_TYPES = [
    q for q in QUANT_TYPES.values() if q.name != "F32" and not q.name.startswith(("IQ1", "IQ2", "IQ3", "TQ", "MXFP"))
]  # the tables of the others cost seconds


def gaussian(n_rows: int, n_columns: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((n_rows, n_columns)).astype(np.float32)


def error_of_all_rows(weights: FloatArray, importance: FloatArray | None, name: str) -> float:
    quant_type = QUANT_TYPES[name]
    decoded = ggml.dequantize(encoders.quantize(weights, quant_type, importance), quant_type)
    column = np.ones(weights.shape[1]) if importance is None else importance.astype(np.float64)
    exact = weights.astype(np.float64)
    return float((column * (exact - decoded) ** 2).sum() / (column * exact**2).sum())


def estimated(
    weights: FloatArray, importance: FloatArray | None, types: Sequence[QuantType], n_threads: int = 1
) -> dict[str, float]:
    return relative_errors([probe_matrix(weights, importance, n_threads)], types, n_threads)[0]


def heavy_tailed(n_rows: int, n_columns: int) -> tuple[FloatArray, FloatArray]:
    """A matrix whose rows and columns differ by orders of magnitude, as in a trained model."""
    numbers = np.random.default_rng(3)
    scale = numbers.lognormal(0, 1, (n_rows, 1)) * numbers.lognormal(0, 0.5, (1, n_columns))
    weights = (gaussian(n_rows, n_columns) * scale).astype(np.float32)
    weights[: n_rows // 4] = 0
    return weights, numbers.lognormal(0, 2, n_columns).astype(np.float32)


@pytest.mark.parametrize("n_columns", [256, 1536, 96, 576])
def test_probe_knows_its_own_error_exactly(n_columns: int) -> None:
    weights, importance = heavy_tailed(60, n_columns)
    probe = probe_matrix(weights, importance)
    assert probe.quant_type.name == ("Q3_K" if n_columns % 256 == 0 else "Q4_0")
    assert probe.relative_error == pytest.approx(
        error_of_all_rows(weights, importance, probe.quant_type.name), rel=1e-4
    )
    encoded = ggml.quantize(weights, probe.quant_type, importance)
    np.testing.assert_array_equal(probe.decoded, ggml.dequantize(encoded, probe.quant_type))
    assert estimated(weights, importance, [probe.quant_type])[probe.quant_type.name] == probe.relative_error


@pytest.mark.parametrize("with_importance", [True, False], ids=["importance", "no importance"])
@pytest.mark.parametrize("n_columns", [512, 576])
def test_estimates_are_near_the_error_of_all_rows(with_importance: bool, n_columns: int) -> None:
    weights, importance = heavy_tailed(1024, n_columns)
    given = importance if with_importance else None
    types = [t for t in CHEAP_TYPES if t.fits(n_columns)]
    errors = estimated(weights, given, types)
    assert errors.keys() == {t.name for t in types}
    expected = {name: error_of_all_rows(weights, given, name) for name in errors}
    deviations = {name: abs(errors[name] / expected[name] - 1) for name in errors}
    for name, deviation in deviations.items():  # the rounding of plain types has little to do with the probe's
        assert deviation < (0.25 if name in ("F16", "BF16") else 0.15), name
    assert np.mean(list(deviations.values())) < 0.05


def test_types_that_do_not_fit_the_rows_are_left_out() -> None:
    errors = estimated(gaussian(4, 96), None, CHEAP_TYPES)
    assert errors.keys() == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16", "BF16"}


def test_odd_rows_fit_plain_types_alone() -> None:
    weights = gaussian(4, 100)
    errors = estimated(weights, None, CHEAP_TYPES)
    assert errors.keys() == {"F16", "BF16"}
    assert errors["BF16"] == pytest.approx(error_of_all_rows(weights, None, "BF16"), rel=0.2)


def test_types_that_need_importance_are_left_out_without_it() -> None:
    types = [QUANT_TYPES[name] for name in ("IQ2_XXS", "IQ1_S", "Q2_K")]
    assert estimated(gaussian(4, 256), None, types).keys() == {"Q2_K"}


def test_more_bits_make_less_error() -> None:
    errors = estimated(gaussian(32, 512), None, CHEAP_TYPES)
    ordered = [errors[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[-1] > 0
    assert ordered[0] < 1


def test_a_few_important_blocks_are_found() -> None:
    weights = gaussian(2048, 512)
    weights[700:703] *= 1000  # all of the error is in three rows of 2048
    errors = estimated(weights, None, CHEAP_TYPES)
    for name in ("Q2_K", "Q4_K"):
        assert errors[name] == pytest.approx(error_of_all_rows(weights, None, name), rel=0.1)


def test_matrix_that_the_probe_hits_exactly() -> None:
    weights = np.ones((8, 256), dtype=np.float32)
    errors = estimated(weights, None, [QUANT_TYPES["Q3_K"], QUANT_TYPES["F16"]])
    assert all(0 <= error < 1e-2 for error in errors.values())
    assert errors["F16"] == 0


def test_zero_matrix_has_no_error() -> None:
    assert estimated(np.zeros((4, 256), dtype=np.float32), None, [QUANT_TYPES["Q4_K"]]) == {"Q4_K": 0.0}


def test_errors_do_not_depend_on_threads() -> None:
    weights, importance = heavy_tailed(600, 512)
    assert estimated(weights, importance, CHEAP_TYPES, 1) == estimated(weights, importance, CHEAP_TYPES, 3)


def test_several_matrices_keep_their_order() -> None:
    first, second = gaussian(16, 256), gaussian(16, 512, seed=1)
    both = relative_errors([probe_matrix(first, None), probe_matrix(second, None)], CHEAP_TYPES, 2)
    assert both == [estimated(first, None, CHEAP_TYPES), estimated(second, None, CHEAP_TYPES)]

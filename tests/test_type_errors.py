from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from lieq_gguf import ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.type_errors import N_SAMPLED_ROWS, relative_errors

FloatArray = npt.NDArray[np.float32]
CHEAP_TYPES = [
    q for q in QUANT_TYPES.values() if q.name != "F32" and not q.name.startswith(("IQ1", "IQ2", "IQ3", "TQ", "MXFP"))
]  # the tables of the others cost seconds


def gaussian(n_rows: int, n_columns: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((n_rows, n_columns)).astype(np.float32)


def error_of_all_rows(weights: FloatArray, importance: FloatArray | None, name: str) -> float:
    quant_type = QUANT_TYPES[name]
    encoded = ggml.quantize(weights, quant_type, importance)
    decoded = gguf.dequantize(encoded, gguf.GGMLQuantizationType(quant_type.ggml_id))
    column = np.ones(weights.shape[1]) if importance is None else importance.astype(np.float64)
    exact = weights.astype(np.float64)
    return float((column * (exact - decoded) ** 2).sum() / (column * exact**2).sum())


@pytest.mark.parametrize("with_importance", [True, False], ids=["importance", "no importance"])
def test_errors_are_those_of_ggufs_decoder(with_importance: bool) -> None:
    weights = gaussian(N_SAMPLED_ROWS - 8, 256)
    importance = np.random.default_rng(1).lognormal(0, 2, 256).astype(np.float32) if with_importance else None
    errors = relative_errors(torch.from_numpy(weights), importance, CHEAP_TYPES)
    expected = {t.name: error_of_all_rows(weights, importance, t.name) for t in CHEAP_TYPES}
    assert errors == pytest.approx(expected, rel=1e-5)


def test_types_that_do_not_fit_the_rows_are_left_out() -> None:
    errors = relative_errors(torch.from_numpy(gaussian(4, 96)), None, CHEAP_TYPES)
    assert errors.keys() == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16", "BF16"}


def test_types_that_need_importance_are_left_out_without_it() -> None:
    types = [QUANT_TYPES[name] for name in ("IQ2_XXS", "IQ1_S", "Q2_K")]
    assert relative_errors(torch.from_numpy(gaussian(4, 256)), None, types).keys() == {"Q2_K"}


def test_more_bits_make_less_error() -> None:
    errors = relative_errors(torch.from_numpy(gaussian(32, 512)), None, CHEAP_TYPES)
    ordered = [errors[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[-1] > 0
    assert ordered[0] < 1


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_sample_of_rows_stands_for_all(name: str) -> None:
    weights = gaussian(1024, 512)
    importance = np.random.default_rng(1).lognormal(0, 1, 512).astype(np.float32)
    sampled = relative_errors(torch.from_numpy(weights), importance, [QUANT_TYPES[name]])
    assert sampled[name] == pytest.approx(error_of_all_rows(weights, importance, name), rel=0.1)


def test_sample_reaches_from_the_first_to_the_last_row() -> None:
    weights = np.ones(
        (1024, 256), dtype=np.float32
    )  # a constant row is exact in F16, so every error is a sampled row's
    weights[0] = weights[-1] = 1 + 2.0**-13
    errors = relative_errors(torch.from_numpy(weights), None, [QUANT_TYPES["F16"]])
    assert errors["F16"] == pytest.approx(2 / N_SAMPLED_ROWS * 2.0**-26, rel=1e-3)


def test_weights_in_bfloat16_are_accepted() -> None:
    weights = torch.from_numpy(gaussian(8, 256)).bfloat16()
    same = relative_errors(weights.float(), None, CHEAP_TYPES)
    assert relative_errors(weights, None, CHEAP_TYPES) == same


def test_zero_matrix_has_no_error() -> None:
    assert relative_errors(torch.zeros(4, 256), None, [QUANT_TYPES["Q4_K"]]) == {"Q4_K": 0.0}


def test_errors_do_not_depend_on_threads() -> None:
    weights = torch.from_numpy(gaussian(32, 256))
    assert relative_errors(weights, None, CHEAP_TYPES, 1) == relative_errors(weights, None, CHEAP_TYPES, 3)

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from lieq_gguf.errors import QuantizationError
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES, QuantType

N_ROWS, N_PER_ROW = 4, 512
SLOW = ("IQ1_S", "IQ1_M")  # their tables take ten seconds once in a process
FloatArray = npt.NDArray[np.float32]


def types(*names: str) -> pytest.MarkDecorator:
    chosen = names or tuple(QUANT_TYPES)
    marked = [
        pytest.param(QUANT_TYPES[name], id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name in chosen
    ]
    return pytest.mark.parametrize("quant_type", marked)


@pytest.fixture(scope="module")
def weights() -> FloatArray:
    return np.random.default_rng(0).normal(0, 0.05, (N_ROWS, N_PER_ROW)).astype(np.float32)


@pytest.fixture(scope="module")
def importance() -> FloatArray:
    return np.random.default_rng(1).uniform(0.01, 4, N_PER_ROW).astype(np.float32)


@types(*(t.name for t in QUANT_TYPES.values() if t.name != "Q2_0"))  # which gguf 0.19 does not know
def test_decoded_as_gguf_decodes_bit_for_bit(
    quant_type: QuantType, weights: FloatArray, importance: FloatArray
) -> None:
    data = ggml.quantize(weights, quant_type, importance)
    reference = gguf.dequantize(data, gguf.GGMLQuantizationType(quant_type.ggml_id)).astype(np.float32)
    assert np.array_equal(ggml.dequantize(data, quant_type).view(np.uint32), reference.view(np.uint32))


@types(*(t.name for t in QUANT_TYPES.values() if t.is_quantized and not t.name.startswith(("TQ", "Q2_0"))))
def test_error_is_near_what_the_bits_allow(quant_type: QuantType, weights: FloatArray, importance: FloatArray) -> None:
    decoded = ggml.dequantize(ggml.quantize(weights, quant_type, importance), quant_type)
    error = (importance * (decoded - weights) ** 2).sum() / (importance * weights**2).sum()
    # No code of b bits has less than 4^-b of a Gaussian's energy as error; these have 1.7 to 4.9 times as much.
    assert 4.0**-quant_type.bits_per_weight < error < 5 * 4.0**-quant_type.bits_per_weight


@types("TQ1_0", "TQ2_0")
def test_ternary_types_keep_ternary_weights(quant_type: QuantType, weights: FloatArray) -> None:
    ternary = np.sign(np.round(weights * 20)).astype(np.float32)
    assert np.array_equal(ggml.dequantize(ggml.quantize(ternary, quant_type), quant_type), ternary)


@types("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q3_K", "IQ4_XS", "IQ2_XXS", "TQ2_0")
def test_bytes_do_not_depend_on_threads(
    quant_type: QuantType, importance: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(2).normal(size=(37, N_PER_ROW)).astype(np.float32)
    alone = ggml.quantize(rows, quant_type, importance, n_threads=1)
    monkeypatch.setattr(ggml, "_CHUNK_WEIGHTS", 3 * N_PER_ROW)
    assert np.array_equal(ggml.quantize(rows, quant_type, importance, n_threads=3), alone)


def test_decoding_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(2).normal(size=(37, N_PER_ROW)).astype(np.float32)
    data = ggml.quantize(rows, QUANT_TYPES["Q4_K"])
    alone = ggml.dequantize(data, QUANT_TYPES["Q4_K"])
    monkeypatch.setattr(ggml, "_CHUNK_WEIGHTS", 3 * N_PER_ROW)
    assert np.array_equal(ggml.dequantize(data, QUANT_TYPES["Q4_K"], n_threads=3), alone)


@types("Q4_0", "Q4_K", "F16", "BF16", "F32")
def test_layout_in_memory_does_not_matter(quant_type: QuantType, weights: FloatArray) -> None:
    strided = np.repeat(weights, 2, axis=1)[:, ::2]
    assert not strided.flags.c_contiguous
    assert np.array_equal(ggml.quantize(strided, quant_type), ggml.quantize(weights, quant_type))


@types("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS")
def test_importance_lowers_the_weighted_error(quant_type: QuantType, weights: FloatArray) -> None:
    importance = np.geomspace(1e-3, 1e3, N_PER_ROW).astype(np.float32)
    np.random.default_rng(3).shuffle(importance)

    def error(used: FloatArray | None) -> float:
        decoded = ggml.dequantize(ggml.quantize(weights, quant_type, used), quant_type)
        return float((importance * (decoded - weights) ** 2).sum())

    assert error(importance) < error(None)


@types("Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "F16")
def test_importance_means_nothing_to(quant_type: QuantType, weights: FloatArray, importance: FloatArray) -> None:
    assert np.array_equal(ggml.quantize(weights, quant_type, importance), ggml.quantize(weights, quant_type))


@types("Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_0", "Q5_1")
def test_columns_never_used_leave_finite_values(quant_type: QuantType, weights: FloatArray) -> None:
    data = ggml.quantize(weights, quant_type, np.zeros(N_PER_ROW, dtype=np.float32))
    assert np.isfinite(ggml.dequantize(data, quant_type)).all()


@types("Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q8_0", "TQ2_0", "MXFP4")
def test_zeros_stay_zeros(quant_type: QuantType, importance: FloatArray) -> None:
    zeros = np.zeros((N_ROWS, N_PER_ROW), dtype=np.float32)
    assert not ggml.dequantize(ggml.quantize(zeros, quant_type, importance), quant_type).any()


@pytest.mark.parametrize(("name", "width"), [("Q2_K", 576), ("IQ4_NL", 100), ("Q8_0", 16), ("IQ3_S", 128)])
def test_refuses_a_row_that_does_not_fit(name: str, width: int) -> None:
    with pytest.raises(QuantizationError, match=f"{width} weights cannot be divided into {name}'s blocks"):
        ggml.quantize(np.zeros((2, width), dtype=np.float32), QUANT_TYPES[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@types("F32", "F16", "Q4_0", "Q4_K")
def test_refuses_weights_that_are_not_finite(quant_type: QuantType, weights: FloatArray, value: float) -> None:
    damaged = weights.copy()
    damaged[2, 7] = value
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        ggml.quantize(damaged, quant_type)


@pytest.mark.parametrize("name", [t.name for t in QUANT_TYPES.values() if t.needs_imatrix])
def test_refuses_missing_importance(name: str, weights: FloatArray) -> None:
    with pytest.raises(QuantizationError, match=f"{name} needs an importance matrix"):
        ggml.quantize(weights, QUANT_TYPES[name])


@pytest.mark.parametrize(
    "importance",
    [
        np.ones(N_PER_ROW - 1, dtype=np.float32),
        np.ones(N_PER_ROW + 256, dtype=np.float32),
        np.ones((1, N_PER_ROW), dtype=np.float32),
        np.full(N_PER_ROW, -1, dtype=np.float32),
        np.full(N_PER_ROW, np.nan, dtype=np.float32),
        np.full(N_PER_ROW, np.inf, dtype=np.float32),
    ],
    ids=["too short", "too long", "two axes", "negative", "NaN", "infinite"],
)
def test_refuses_wrong_importance(importance: FloatArray, weights: FloatArray) -> None:
    with pytest.raises(QuantizationError, match=f"importance as {N_PER_ROW} finite"):
        ggml.quantize(weights, QUANT_TYPES["Q4_K"], importance)


def test_refuses_bytes_that_are_no_whole_blocks() -> None:
    with pytest.raises(QuantizationError, match="143 bytes cannot be divided into Q4_K's blocks"):
        ggml.dequantize(np.zeros((1, 143), dtype=np.uint8), QUANT_TYPES["Q4_K"])


def test_missing_library_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")  # where the library has another name
    with pytest.raises(QuantizationError, match=r"ggml-base\.dll is missing.*reinstall llama-cpp-python"):
        ggml.library_file()

"""Tuning of scales and norms: what it changes, what it gains, and that the file says and holds it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.command import RunCli
from support.families import TINY_MODELS
from support.requests import on_text, request_of

from lieq_gguf.errors import VerificationError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.measure.text import CalibrationText, tokenize
from lieq_gguf.native import block_scales, ggml
from lieq_gguf.pipeline import plan as planned
from lieq_gguf.quant_types import F32, QUANT_TYPES, QuantType
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.writing.model_tuning import ModelTuning
from lieq_gguf.writing.tunable import LARGEST_FACTOR, WrittenTensor
from lieq_gguf.writing.verification import verify
from lieq_gguf.writing.writer import EncodedRows, encode_tensors

MULTIPLIED = [t for t in QUANT_TYPES.values() if block_scales.can_be_multiplied(t)]


def encoded(quant_type: QuantType, n_rows: int = 8) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    weights = np.random.default_rng(0).standard_normal((n_rows, 512), dtype=np.float32)
    return ggml.quantize(weights, quant_type, np.ones(512, dtype=np.float32))


def test_all_types_but_powers_of_two_have_scales() -> None:
    others = {t.name for t in QUANT_TYPES.values() if t not in MULTIPLIED}
    assert others == {"F32", "F16", "BF16", "MXFP4"}


@pytest.mark.parametrize("quant_type", MULTIPLIED, ids=lambda t: t.name)
def test_a_factor_multiplies_all_weights_of_its_block(quant_type: QuantType) -> None:
    data = encoded(quant_type)
    n_blocks = 512 // quant_type.block_size
    factors = np.random.default_rng(1).uniform(0.5, 2, (8, n_blocks)).astype(np.float32)
    before, after = (ggml.dequantize(d, quant_type) for d in (data, block_scales.multiplied(data, quant_type, factors)))
    expected = before * np.repeat(factors, quant_type.block_size, axis=1)
    np.testing.assert_allclose(after, expected, rtol=2e-3, atol=2e-3 * np.abs(before).max())
    assert np.array_equal(block_scales.multiplied(data, quant_type, np.ones_like(factors)), data)


def test_gradients_reach_the_factors() -> None:
    tensor = TensorSpec("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", (8, 512), layer=0)
    written = WrittenTensor(tensor, QUANT_TYPES["Q2_K"], encoded(QUANT_TYPES["Q2_K"]))
    factors = torch.ones(written.factors_shape, requires_grad=True)
    [weight] = written.in_model_form(factors, torch.float32, torch.device("cpu")).values()
    towards = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    (weight * towards).sum().backward()  # type: ignore[no-untyped-call]
    assert factors.grad is not None
    torch.testing.assert_close(factors.grad, (written.numbers() * towards).view(8, 2, 256).sum(-1))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
def test_wrong_scales_and_norms_are_mended(name: str, calibration_text: Path, tmp_path: Path) -> None:
    """Of a file whose scales and norms are a tenth too small, the divergence falls."""
    source = ModelDirectory(TINY_MODELS[name].write(tmp_path / "model"))
    plan = planned(request_of(source.path, 8.5, None, "Q8_0", on_text(calibration_text, 256))).plan
    tokens = tokenize(
        [CalibrationText(calibration_text.read_text(encoding="utf-8"), "a")], source.load_tokenizer(), 4096
    )
    tuning = ModelTuning(source, plan, tokens, ComputeOptions(n_threads=2, in_float32=True))
    assert tuning.expected_seconds() > 0
    assert tuning.expected_bytes() > 0
    tenth_off = []
    for rows in encode_tensors(source, source.spec.tensors, plan, None):
        written = WrittenTensor(rows.tensor, QUANT_TYPES[plan.types[rows.tensor.name]], rows.data)
        if written.is_tunable and rows.tensor.layer is not None:
            written = written.multiplied(np.full(written.factors_shape, 0.9, dtype=np.float32))
        tenth_off.append(EncodedRows(rows.tensor, written.data, rows.is_last))
    tuning.take(tenth_off, lambda _n: None)
    shares: list[float] = []
    after = {rows.tensor.name: rows for rows in tuning.tuned(shares.append)}
    assert list(after) == [t.name for t in source.spec.tensors]
    assert sum(shares) == pytest.approx(1)
    assert tuning.divergences is not None
    assert tuning.divergences[1] < 0.85 * tuning.divergences[0]
    for name, rows in after.items():
        assert rows.data.nbytes == sum(part.data.nbytes for part in tenth_off if part.tensor.name == name)


def test_final_norm_is_tuned_under_any_name(calibration_text: Path, tmp_path: Path) -> None:
    """LFM2 has it as ``token_embd_norm``."""
    source = ModelDirectory(TINY_MODELS["lfm2"].write(tmp_path / "model"))
    plan = planned(request_of(source.path, 2.625, None, "Q2_K", on_text(calibration_text, 256))).plan
    tokens = tokenize(
        [CalibrationText(calibration_text.read_text(encoding="utf-8"), "a")], source.load_tokenizer(), 2048
    )
    tuning = ModelTuning(source, plan, tokens, ComputeOptions(n_threads=2, in_float32=True))
    tuning.take(encode_tensors(source, source.spec.tensors, plan, None), lambda _n: None)
    tuned = {rows.tensor.name: rows.data for rows in tuning.tuned(lambda _n: None)}
    assert tuning.divergences is not None
    assert tuning.divergences[1] < tuning.divergences[0]
    norm = source.spec.final_norm
    assert norm.name == "token_embd_norm.weight"
    assert not np.array_equal(tuned[norm.name].view(np.float32), next(iter(source.rows(norm))))


def test_a_tuned_file_is_proved_and_says_so(
    run_cli: RunCli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned.gguf"
    done = run_cli(
        "convert", tiny_model, "--types", "IQ2_XXS", "--bits", 2.0625, "--calibration", calibration_text,
        "--n-tokens", 8192, "--tune", "model", "-o", output,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "tuning takes about" in done.stderr
    file = GgufFile(output)
    assert file.value("lieq.tune") == "model"
    source = ModelDirectory(tiny_model)
    stored = {t.spec.name: t for t in file.tensors}
    norms = [t for t in source.spec.tensors if t.name.endswith("norm.weight")]
    ratios = np.concatenate(
        [ggml.dequantize(stored[t.name].data, F32)[0] / next(iter(source.rows(t)))[0] for t in norms]
    )
    assert 0 < np.abs(ratios - 1).max() < LARGEST_FACTOR - 1
    checked = run_cli("verify", output, "--source", tiny_model)
    assert checked.exit_code == 0, checked.stderr


def test_bytes_that_changed_on_the_disk_are_found(run_cli: RunCli, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    done = run_cli("convert", tiny_model, "--bits", 16, "--types", "F16", "-q", "-o", output)
    assert done.exit_code == 0, done.stderr
    file = GgufFile(output)
    with pytest.raises(VerificationError, match="has other bytes than were written"):
        verify(output, checksums={file.tensors[0].spec.name: 1})

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.command import RunCli
from support.models import write_model

from lieq_gguf import __version__, pipeline
from lieq_gguf.errors import OutputError, QuantizationError
from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import rotary_order
from lieq_gguf.sources import file_order
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.writing.writer import EncodedRows, encode_tensors, write_file


def keys(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def encoded(
    source: Path, plan: QuantPlan, importance: ImportanceMatrix | None, n_threads: int = 1
) -> Iterator[EncodedRows]:
    model = ModelDirectory(source)
    return encode_tensors(model, model.spec.tensors, plan, importance, n_threads)


def write_again(source: Path, conversion: pipeline.Conversion, target: Path, n_threads: int = 1) -> bytes:
    prepared = conversion.prepared
    write_file(target, prepared.header, encoded(source, prepared.plan, prepared.measured.importance, n_threads))
    return target.read_bytes()


@pytest.fixture
def without_imatrix(run_cli: RunCli, tiny_model: Path, tmp_path: Path) -> Path:
    """Q4_K throughout, quantised without importance."""
    file = tmp_path / "plain.gguf"
    done = run_cli("convert", tiny_model, "--types", "Q4_K", "--bits", 4.5, "--no-imatrix", "-q", "-o", file)
    assert done.exit_code == 0, done.stderr
    return file


def test_planned_size_is_the_size_of_the_file(conversion: pipeline.Conversion) -> None:
    assert conversion.prepared.header.meter.file_bytes == conversion.output.stat().st_size


def test_every_tensor_is_aligned(conversion: pipeline.Conversion) -> None:
    reader = gguf.GGUFReader(conversion.output)
    assert reader.data_offset % 32 == 0
    assert [t.name for t in reader.tensors if t.data_offset % 32] == []


def test_tensors_follow_each_other_without_gaps(conversion: pipeline.Conversion) -> None:
    reader = gguf.GGUFReader(conversion.output)
    end = reader.data_offset
    for tensor in reader.tensors:
        assert tensor.data_offset == end
        end += -(-int(tensor.n_bytes) // 32) * 32
    assert end == conversion.output.stat().st_size


def test_types_are_those_of_the_plan(conversion: pipeline.Conversion) -> None:
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(conversion.output).tensors}
    assert types == conversion.prepared.plan.types
    assert {"Q2_K", "Q4_K"} < set(types.values())


def test_bit_meter_counts_what_is_in_the_file(conversion: pipeline.Conversion) -> None:
    matrices = [
        t for t in gguf.GGUFReader(conversion.output).tensors if t.name.startswith("blk.") and len(t.shape) == 2
    ]
    assert len(matrices) == 21
    stored_bits = 8 * sum(t.data.nbytes for t in matrices)
    meter = conversion.prepared.header.meter
    assert meter.layer_bpw == stored_bits / sum(int(t.n_elements) for t in matrices)
    assert 0.95 * 3.4 < meter.layer_bpw <= 3.4


def test_bit_meter_counts_the_weights_of_the_source(conversion: pipeline.Conversion, tiny_model: Path) -> None:
    n_weights = sum(w.numel() for w in load_file(tiny_model / "model.safetensors").values())
    meter = conversion.prepared.header.meter
    assert meter.n_weights == n_weights
    assert meter.file_bpw == 8 * conversion.output.stat().st_size / n_weights


def test_figures_in_the_metadata_are_the_bit_meter(conversion: pipeline.Conversion) -> None:
    found, meter = keys(conversion.output), conversion.prepared.header.meter
    for name in ("layer_bpw", "file_bpw", "nominal_bits"):
        assert found[f"lieq.{name}"] == np.float32(getattr(meter, name))


def test_provenance_is_in_the_metadata(conversion: pipeline.Conversion) -> None:
    found, plan = keys(conversion.output), conversion.prepared.plan
    assert found["lieq.version"] == __version__
    assert (found["lieq.method"], found["lieq.scorer"]) == ("best", "energy-gain")
    assert (found["lieq.target.kind"], found["lieq.target.value"]) == ("bits", np.float32(3.4))
    assert found["lieq.command_line"] == "lieq-gguf convert tiny --bits 3.4"
    assert found["lieq.layer_scores"] == [np.float32(score) for score in plan.layer_scores]
    assert len(plan.layer_scores) == 3


def test_measured_imatrix_is_in_the_metadata(conversion: pipeline.Conversion, calibration_text: Path) -> None:
    found = keys(conversion.output)
    assert found["quantize.imatrix.file"] == "computed by lieq-gguf"
    assert found["quantize.imatrix.dataset"] == calibration_text.name
    assert (found["quantize.imatrix.entries_count"], found["quantize.imatrix.chunks_count"]) == (22, 1)


def test_given_imatrix_is_named_in_the_metadata(
    run_cli: RunCli, conversion: pipeline.Conversion, tiny_model: Path, tmp_path: Path
) -> None:
    imatrix, file = tmp_path / "mine.gguf", tmp_path / "out.gguf"
    assert conversion.prepared.measured.importance is not None
    save_importance(conversion.prepared.measured.importance, imatrix)
    done = run_cli("convert", tiny_model, "--types", "Q4_K", "--bits", 4.5, "--imatrix", imatrix, "-q", "-o", file)
    assert done.exit_code == 0, done.stderr
    assert keys(file)["quantize.imatrix.file"] == "mine.gguf"


def test_no_imatrix_leaves_no_trace_of_one(without_imatrix: Path) -> None:
    assert [key for key in keys(without_imatrix) if key.startswith("quantize.imatrix")] == []


def test_file_type_is_that_of_most_layer_weights(conversion: pipeline.Conversion) -> None:
    weights: dict[str, int] = {}
    for tensor in gguf.GGUFReader(conversion.output).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            kind = tensor.tensor_type.name
            weights[kind] = weights.get(kind, 0) + int(tensor.n_elements)
    most = max(weights, key=lambda name: weights[name])
    assert keys(conversion.output)["general.file_type"] == QUANT_TYPES[most].file_type


def test_file_type_of_a_uniform_file(without_imatrix: Path) -> None:
    assert keys(without_imatrix)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_general_metadata_is_what_llama_cpp_expects(conversion: pipeline.Conversion) -> None:
    found = keys(conversion.output)
    assert (found["general.type"], found["general.architecture"]) == ("model", "llama")
    assert found["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_bytes_do_not_depend_on_threads(conversion: pipeline.Conversion, tiny_model: Path, tmp_path: Path) -> None:
    written = conversion.output.read_bytes()  # by two threads
    assert write_again(tiny_model, conversion, tmp_path / "again.gguf", n_threads=1) == written


def test_bytes_do_not_depend_on_the_rows_held_at_a_time(
    conversion: pipeline.Conversion, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_order, "CHUNK_WEIGHTS", 256 * 7)  # no divisor of any number of rows
    assert write_again(tiny_model, conversion, tmp_path / "again.gguf") == conversion.output.read_bytes()


def test_progress_adds_up_to_all_weights(conversion: pipeline.Conversion, tiny_model: Path, tmp_path: Path) -> None:
    prepared, steps = conversion.prepared, list[float]()
    tensors = encoded(tiny_model, prepared.plan, prepared.measured.importance)
    write_file(tmp_path / "a", prepared.header, tensors, advance=steps.append)
    assert sum(steps) == pytest.approx(prepared.job.source.spec.n_weights)


def test_refuses_a_header_of_another_plan(conversion: pipeline.Conversion, tiny_model: Path, tmp_path: Path) -> None:
    prepared = conversion.prepared
    other = replace(prepared.plan, types=dict(prepared.plan.types) | {"token_embd.weight": "F32"})
    with pytest.raises(OutputError, match="bytes; planned"):
        write_file(tmp_path / "a", prepared.header, encoded(tiny_model, other, prepared.measured.importance))


def test_names_the_tensor_that_cannot_be_encoded(
    conversion: pipeline.Conversion, tiny_model: Path, tmp_path: Path
) -> None:
    prepared = conversion.prepared
    other = replace(prepared.plan, types=dict(prepared.plan.types) | {"blk.1.ffn_up.weight": "IQ2_XXS"})
    with pytest.raises(QuantizationError, match=r"blk\.1\.ffn_up\.weight: IQ2_XXS needs an importance matrix"):
        write_file(tmp_path / "a", prepared.header, encoded(tiny_model, other, None))


@pytest.mark.parametrize(("n_rows", "n_heads"), [(2, 1), (64, 1), (256, 4), (96 * 3, 3), (12, 6)])
def test_rotary_order_interleaves_the_halves_of_each_head(n_rows: int, n_heads: int) -> None:
    order = rotary_order(n_rows, n_heads).in_source
    head_dim = n_rows // n_heads
    assert sorted(order) == list(range(n_rows))
    for row, source in enumerate(order):
        head, place = divmod(row, head_dim)
        assert source == head * head_dim + place // 2 + (place % 2) * head_dim // 2


def test_rotary_order_is_the_permutation_of_llama_cpps_converter() -> None:
    rows = np.random.default_rng(0).normal(size=(8 * 24, 5))
    # LlamaModel.permute in llama.cpp's converter
    permuted = rows.reshape(8, 2, rows.shape[0] // 8 // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(rows[rotary_order(8 * 24, 8).in_source], permuted)


def test_only_query_and_key_rows_are_reordered(run_cli: RunCli, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", dtype=torch.float16)
    file = tmp_path / "f16.gguf"
    done = run_cli("convert", source, "--types", "F16", "--bits", 16, "--no-imatrix", "-q", "-o", file)
    assert done.exit_code == 0, done.stderr
    weights = load_file(source / "model.safetensors")
    written = {t.name: np.array(t.data, dtype=np.float32) for t in gguf.GGUFReader(file).tensors}
    differing = {
        t.role
        for t in ModelDirectory(source).spec.tensors
        if not np.array_equal(written[t.name], weights[str(t.source_name)].float().numpy())
    }
    assert differing == {"attn_q", "attn_k"}

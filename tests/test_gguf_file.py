import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.command import RunCli
from support.models import write_model

from lieq_gguf import pipeline
from lieq_gguf.errors import FormatError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.gguf_header import HeaderWriter, float_tensor, write_gguf
from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The smallest file that has everything: one layer of one matrix, a norm, an embedding."""
    file = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_array("lieq.layer_scores", [0.5])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    values = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    writer.add_tensor("token_embd.weight", values[:2].astype(np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", values[0])
    data = ggml.quantize(values, QUANT_TYPES["Q4_K"])
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Turn a loop without end into a failure."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_reads_what_was_written(conversion: pipeline.Conversion) -> None:
    file, planned = GgufFile(conversion.output), conversion.prepared
    assert (file.architecture, file.n_layers) == ("llama", 3)
    assert file.types == planned.plan.types
    assert file.file_bytes == conversion.output.stat().st_size


def test_bit_meter_of_the_file_is_that_of_the_plan(conversion: pipeline.Conversion) -> None:
    assert GgufFile(conversion.output).bit_meter() == conversion.prepared.header.meter


def test_computed_tensors_are_no_weights(run_cli: RunCli, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    source = write_model(tmp_path / "model", rope_parameters=rope, dtype=torch.float16)
    made = run_cli("convert", source, "--types", "Q4_K", "--bits", 4.5, "--no-imatrix", "-q", "--json",
                   "-o", tmp_path / "out.gguf")  # fmt: skip
    file = GgufFile(tmp_path / "out.gguf")
    assert "rope_freqs.weight" in file.types
    assert file.bit_meter().n_weights == json.loads(made.stdout)["n_weights"]


def test_shapes_have_rows_first(small: Path) -> None:
    shapes = {t.spec.name: t.spec.shape for t in GgufFile(small).tensors}
    assert shapes == {
        "token_embd.weight": (2, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.attn_q.weight": (4, 256),
    }


def test_data_are_rows_of_bytes(small: Path) -> None:
    shapes = {t.spec.name: t.data.shape for t in GgufFile(small).tensors}
    assert shapes == {
        "token_embd.weight": (2, 512),
        "blk.0.attn_norm.weight": (1, 1024),
        "blk.0.attn_q.weight": (4, 144),
    }


def test_only_tensors_of_a_layer_have_its_index(small: Path) -> None:
    assert [t.spec.layer for t in GgufFile(small).tensors] == [None, 0, 0]


def test_value_falls_back_to_the_default(small: Path) -> None:
    file = GgufFile(small)
    assert (file.value("llama.context_length", 7), file.value("llama.block_count", 7)) == (128, 7)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04" + bytes(100), b"text\n" * 9])
def test_refuses_what_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=f"not a complete GGUF file \\({len(content)} bytes"):
        GgufFile(file)


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist or is not a file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="is a folder"):
        GgufFile(tmp_path)


def test_refuses_every_cut(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for n_bytes in range(0, len(data), 7):
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(FormatError, match="not a complete GGUF"):
            GgufFile(cut)


@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_damage_in_the_header_raises_nothing_but_format_errors(small: Path, tmp_path: Path, value: int) -> None:
    data = small.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    unexpected: dict[int, BaseException] = {}
    for place in range(gguf.GGUFReader(small).data_offset):
        damaged.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            with at_most(5):
                GgufFile(damaged).bit_meter()
        except FormatError:
            pass
        except Exception as error:
            unexpected[place] = error
    assert unexpected == {}


def test_refuses_a_type_without_a_name_here(tmp_path: Path) -> None:
    file = tmp_path / "integers.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 256), dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.weight has the type I32, which is not supported"):
        GgufFile(file)


def test_an_importance_matrix_is_no_language_model(conversion: pipeline.Conversion, tmp_path: Path) -> None:
    assert conversion.prepared.measured.importance is not None
    save_importance(conversion.prepared.measured.importance, tmp_path / "imatrix.gguf")
    with pytest.raises(FormatError, match=r"imatrix\.gguf"):
        GgufFile(tmp_path / "imatrix.gguf").bit_meter()


def test_inspect_agrees_with_the_plan(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    done = run_cli("inspect", conversion.output, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    report, planned = json.loads(done.stdout), conversion.prepared
    assert report["types"] == planned.plan.types
    assert {name: report[name] for name in planned.header.meter.to_json()} == planned.header.meter.to_json()
    assert report["n_layers"] == 3


def test_inspect_shows_each_layers_own_types_and_bits(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    report = json.loads(run_cli("inspect", conversion.output, "--json").stdout)
    tensors = {t.spec.name: t for t in GgufFile(conversion.output).tensors}
    for layer in report["layers"]:
        own = [tensors[f"blk.{layer['layer']}.{role}.weight"] for role in layer["types"]]
        assert list(layer["types"].values()) == [t.quant_type.name for t in own]
        assert layer["bpw"] == 8 * sum(t.data.nbytes for t in own) / sum(t.spec.n_weights for t in own)
        assert len(own) == 7


def test_inspect_tells_where_the_file_comes_from(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    provenance = json.loads(run_cli("inspect", conversion.output, "--json").stdout)["provenance"]
    assert provenance["command_line"] == "lieq-gguf convert tiny --bits 3.4"
    assert (provenance["method"], provenance["scorer"]) == ("best", "energy-gain")


def test_inspect_counts_the_cache_and_what_a_token_reads(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    report = json.loads(run_cli("inspect", conversion.output, "--json").stdout)
    # two heads of 64, keys and values, three layers, two bytes each, the model's 1024 tokens
    assert (report["n_ctx"], report["kv_cache_bytes"]) == (1024, 2 * 64 * 2 * 3 * 2 * 1024)
    assert report["bytes_per_token"] == sum(int(t.n_bytes) for t in gguf.GGUFReader(conversion.output).tensors)


def test_metadata_is_that_of_ggufs_reader(conversion: pipeline.Conversion) -> None:
    file, reader = GgufFile(conversion.output), gguf.GGUFReader(conversion.output)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert len(keys) > 20
    for key in keys:
        assert file.value(key) == reader.fields[key].contents(), key


def test_tensors_are_those_of_ggufs_reader(conversion: pipeline.Conversion) -> None:
    theirs = gguf.GGUFReader(conversion.output).tensors
    ours = GgufFile(conversion.output).tensors
    assert [t.spec.name for t in ours] == [t.name for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.data.tobytes() == b.data.tobytes()
        assert list(a.spec.shape) == list(reversed(b.shape.tolist()))


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = GgufFile(file).tensors
    np.testing.assert_array_equal(tensor.data.view(np.float32), [[0, 1, 2]])


def add_one_of_each(writer: gguf.GGUFWriter) -> None:
    """Every kind of value, by every kind of function: scalars, arrays, a model card, a vocabulary; one twice."""
    writer.add_type(gguf.GGUFType.MODEL)
    gguf.Metadata(name="Tiny", tags=["a", "b"], license="mit", size_label="1M").set_gguf_meta_model(writer)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"some.{kind}", 7)
    writer.add_float32("some.float32", 0.1)
    writer.add_float64("some.float64", 0.1)
    writer.add_bool("some.bool", True)
    writer.add_string("some.empty", "")
    writer.add_array("some.array", [1, 2])
    writer.add_array("some.array", [0.1, 1e-9])
    writer.add_block_count(2)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_token_list(["ä".encode(), b"\xff"])
    writer.add_token_scores([0.0, -1.5])
    writer.add_token_types([gguf.TokenType.NORMAL, gguf.TokenType.BYTE])
    writer.add_token_merges(["a b", "ä b"])
    writer.add_precompiled_charsmap(bytes(range(256)))
    writer.add_chat_template("{{ messages }}")
    writer.add_sliding_window_pattern([True, False])


def test_written_file_is_that_of_ggufs_writer(tmp_path: Path) -> None:
    """Also when a new version of gguf no longer leads every ``add_`` function to ``add_key_value``."""
    arrays = {"a.weight": np.ones((3, 5), dtype=np.float32), "b": np.arange(2, dtype=np.float32)}
    theirs, ours = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama"), HeaderWriter("llama")
    add_one_of_each(theirs)
    for name, values in arrays.items():
        theirs.add_tensor(name, values)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    add_one_of_each(ours)
    write_gguf(tmp_path / "ours.gguf", ours.values, [float_tensor(name, values) for name, values in arrays.items()])
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("value", [[1, 1.5], [None], ["\ud800"], [1 << 40], [], 7])
def test_value_that_no_header_can_have_is_one_line(value: Any) -> None:
    with pytest.raises(FormatError, match="cannot be stored in a GGUF header") as refused:
        HeaderWriter("").add_key_value("some.array", value, gguf.GGUFValueType.ARRAY)
    assert "\n" not in str(refused.value)


def test_number_too_large_for_its_type_is_one_line() -> None:
    with pytest.raises(FormatError, match=r"1e\+39 cannot be stored"):
        HeaderWriter("").add_float32("some.float32", 1e39)

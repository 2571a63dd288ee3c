from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lieq_gguf.errors import BudgetError, CalibrationError, FormatError, OutputError
from lieq_gguf.formats.imatrix_file import load_importance, save_importance
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.bits import BitBudget, measure_bits, padded, parse_size
from lieq_gguf.records.files import SCHEMA_VERSION, check_output, replaced_when_complete
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec, TensorSpec

TENSORS = (
    TensorSpec("token_embd.weight", "e", (4, 256)),
    TensorSpec("rope_freqs.weight", None, (32,)),
    TensorSpec("blk.0.attn_norm.weight", "a", (256,), 0),
    TensorSpec("blk.0.attn_q.weight", "q", (2, 256), 0),
    TensorSpec("blk.0.ffn_down.weight", "d", (3, 512), 0),
)
SPEC = ModelSpec("hand-made", "llama", {}, 1, TENSORS, True)
TYPES = {
    "token_embd.weight": "Q8_0",
    "rope_freqs.weight": "F32",
    "blk.0.attn_norm.weight": "F32",
    "blk.0.attn_q.weight": "Q2_K",
    "blk.0.ffn_down.weight": "Q4_K",
}
SCORES = LayerScores(
    model="hand-made",
    n_tokens=512,
    dataset="text",
    seed=7,
    by_scorer={"lieq": (0.1,), "lim": (-1 / 3,)},
    type_errors={"blk.0.attn_q.weight": {"Q2_K": 0.07}, "blk.0.ffn_down.weight": {"Q2_K": 1e-7}},
)
PLAN = QuantPlan("hand-made", "best", "lieq", BitBudget("bits", 3.7), (2.625, 4.5), TYPES, (0.1,))
IMPORTANCE = ImportanceMatrix(
    {
        "blk.0.attn_q.weight": np.linspace(0.1, 9, 256, dtype=np.float32),
        "blk.0.ffn_down.weight": np.geomspace(1e-6, 1e6, 512, dtype=np.float32),
    },
    n_tokens=1024,
    chunk_size=512,
    dataset="text",
)


def save_scores(file: Path) -> None:
    SCORES.save(file, "lieq")


def save_plan(file: Path) -> None:
    PLAN.save(file, {"layer_bpw": 3.6})


RECORDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "scores": (save_scores, LayerScores.load),
    "plan": (save_plan, QuantPlan.load),
}


def one_line_refusal(load: Callable[[Path], object], file: Path) -> str:
    with pytest.raises(FormatError) as refusal:
        load(file)
    message = str(refusal.value)
    assert "\n" not in message and str(file) in message
    return message


def keys(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every key of a JSON document, with the first item of each list."""
    if isinstance(document, list):
        return keys(document[0], (*prefix, 0)) if document else []
    if not isinstance(document, dict):
        return []
    return [path for key, value in document.items() for path in [(*prefix, key), *keys(value, (*prefix, key))]]


def required_keys(kind: str) -> list[tuple[Any, ...]]:
    """Keys that carry data, without those for people and the names of tensors and scorers that may be any."""
    if kind == "scores":
        return [
            ("model",), ("n_tokens",), ("dataset",), ("seed",), ("layers",), ("layers", 0, "lim"), ("scorers",),
            ("type_errors",),
        ]  # fmt: skip
    return [
        ("model",), ("method",), ("scorer",), ("target",), ("target", "kind"), ("target", "value"), ("reachable",),
        ("reachable", "min_layer_bpw"), ("reachable", "max_layer_bpw"), ("layer_scores",), ("types",),
    ]  # fmt: skip


def test_scores_are_the_same_after_a_round_trip(tmp_path: Path) -> None:
    save_scores(tmp_path / "scores.json")
    assert LayerScores.load(tmp_path / "scores.json") == SCORES


def test_plan_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    save_plan(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == PLAN


def test_nominal_target_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    plan = replace(PLAN, budget=BitBudget("nominal", 2.05))
    plan.save(tmp_path / "plan.json", {})
    assert QuantPlan.load(tmp_path / "plan.json") == plan


def test_chosen_scorer_is_the_score_of_the_document() -> None:
    document = SCORES.to_json("lim")
    assert (document["scorer"], document["layers"]) == (
        "lim",
        [{"layer": 0, "score": -1 / 3, "lieq": 0.1, "lim": -1 / 3}],
    )


@pytest.mark.parametrize("kind", RECORDS)
def test_file_that_is_missing_is_refused(tmp_path: Path, kind: str) -> None:
    assert "does not exist" in one_line_refusal(RECORDS[kind][1], tmp_path / "none.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'"scores"', pytest.param(b"[" * 100_000, id="too deep")]
)
@pytest.mark.parametrize("kind", RECORDS)
def test_file_that_is_no_record_is_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    one_line_refusal(RECORDS[kind][1], tmp_path / "r.json")


@pytest.mark.parametrize("kind", RECORDS)
def test_record_of_the_other_kind_is_refused(tmp_path: Path, kind: str) -> None:
    other = "plan" if kind == "scores" else "scores"
    RECORDS[other][0](tmp_path / "r.json")
    assert f"not a {kind} file" in one_line_refusal(RECORDS[kind][1], tmp_path / "r.json")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, None, "1"])
@pytest.mark.parametrize("kind", RECORDS)
def test_other_schema_version_is_refused(tmp_path: Path, kind: str, version: object) -> None:
    RECORDS[kind][0](tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text()) | {"schema_version": version}
    (tmp_path / "r.json").write_text(json.dumps(document))
    assert f"schema version {version}, expected {SCHEMA_VERSION}" in one_line_refusal(
        RECORDS[kind][1], tmp_path / "r.json"
    )


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind in RECORDS for path in required_keys(kind)], ids=lambda value: str(value)
)
def test_record_without_a_key_is_refused(tmp_path: Path, kind: str, path: tuple[Any, ...]) -> None:
    RECORDS[kind][0](tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    (tmp_path / "r.json").write_text(json.dumps(document))
    assert "not a complete" in one_line_refusal(RECORDS[kind][1], tmp_path / "r.json")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("scores", {"layers": [{"layer": 0, "score": 1, "lieq": "high", "lim": 1}]}),
        ("scores", {"layers": [{"layer": 0, "score": 1, "lieq": float("nan"), "lim": 1}]}),
        ("scores", {"layers": None}),
        ("scores", {"scorers": []}),
        ("scores", {"type_errors": []}),
        ("scores", {"type_errors": {"blk.0.attn_q.weight": {"Q2_K": float("nan")}}}),
        ("plan", {"types": []}),
        ("plan", {"types": {"blk.0.attn_q.weight": "Q9_K"}}),
        ("plan", {"target": {"kind": "bytes", "value": 3}}),
        ("plan", {"layer_scores": ["a"]}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_record_with_a_damaged_value_is_refused(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    RECORDS[kind][0](tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text()) | changes
    (tmp_path / "r.json").write_text(json.dumps(document))
    one_line_refusal(RECORDS[kind][1], tmp_path / "r.json")


def test_types_in_a_plan_may_be_written_in_lower_case(tmp_path: Path) -> None:
    lower = replace(PLAN, types={name: t.lower() for name, t in TYPES.items()})
    lower.save(tmp_path / "plan.json", {})
    assert QuantPlan.load(tmp_path / "plan.json").types == TYPES


def test_plan_belongs_to_its_model() -> None:
    PLAN.check(SPEC)


@pytest.mark.parametrize(
    ("types", "words"),
    [
        (TYPES | {"blk.1.attn_q.weight": "Q2_K"}, r"blk\.1\.attn_q\.weight: hand-made has no such tensor"),
        (
            {n: t for n, t in TYPES.items() if n != "blk.0.attn_q.weight"},
            r"blk\.0\.attn_q\.weight: the plan has no type",
        ),
        (TYPES | {"blk.0.attn_norm.weight": "Q2_K"}, r"blk\.0\.attn_norm\.weight .* Q2_K,"),
        (TYPES | {"rope_freqs.weight": "Q4_0"}, r"rope_freqs\.weight .* Q4_0,"),
    ],
    ids=["a tensor too many", "a tensor too few", "a quantised norm", "a quantised vector"],
)
def test_plan_of_another_model_is_refused(types: dict[str, str], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        replace(PLAN, types=types).check(SPEC)


def test_type_that_does_not_fit_the_rows_is_refused() -> None:
    spec = replace(SPEC, tensors=(TensorSpec("blk.0.attn_q.weight", "q", (2, 96), 0),))
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.weight .* Q2_K,"):
        replace(PLAN, types={"blk.0.attn_q.weight": "Q2_K"}).check(spec)


def test_plan_knows_whether_it_needs_an_importance_matrix() -> None:
    assert not PLAN.needs_imatrix
    assert replace(PLAN, types=TYPES | {"blk.0.attn_q.weight": "IQ2_XXS"}).needs_imatrix


def test_scores_belong_to_their_model() -> None:
    SCORES.check(SPEC)


def test_scores_of_other_layers_are_refused() -> None:
    with pytest.raises(FormatError, match="1 layers; hand-made has 2"):
        SCORES.check(replace(SPEC, n_layers=2))


def test_scores_of_other_matrices_are_refused() -> None:
    with pytest.raises(FormatError, match="score it again"):
        replace(SCORES, type_errors={"blk.0.attn_q.weight": {"Q2_K": 0.1}}).check(SPEC)


def test_importance_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    save_importance(IMPORTANCE, tmp_path / "i.gguf")
    loaded = load_importance(tmp_path / "i.gguf")
    assert (loaded.n_tokens, loaded.chunk_size, loaded.n_chunks, loaded.dataset) == (1024, 512, 2, "text")
    assert loaded.in_sum2.keys() == IMPORTANCE.in_sum2.keys()
    for name, sums in IMPORTANCE.in_sum2.items():
        np.testing.assert_array_equal(loaded.in_sum2[name], sums)


def test_importance_file_has_the_metadata_of_llama_imatrix(tmp_path: Path) -> None:
    save_importance(IMPORTANCE, tmp_path / "i.gguf")
    fields = gguf.GGUFReader(tmp_path / "i.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert found == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }


def test_importance_file_has_the_tensors_of_llama_imatrix(tmp_path: Path) -> None:
    save_importance(IMPORTANCE, tmp_path / "i.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    assert {name: t.shape.tolist() for name, t in tensors.items()} == {  # innermost first, as ggml counts
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.attn_q.weight.in_sum2": [256, 1],
        "blk.0.ffn_down.weight.counts": [1, 1],
        "blk.0.ffn_down.weight.in_sum2": [512, 1],
    }
    assert {t.tensor_type for t in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    assert float(tensors["blk.0.attn_q.weight.counts"].data.item()) == 1024


def test_importance_mean_is_per_token() -> None:
    mean = IMPORTANCE.mean("blk.0.attn_q.weight")
    assert mean is not None
    np.testing.assert_allclose(mean, np.linspace(0.1, 9, 256) / 1024, rtol=1e-6)
    assert IMPORTANCE.mean("token_embd.weight") is None


def write_importance(file: Path, arrays: dict[str, list[float]], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(file, "")
    writer.add_type(kind)
    for name, values in arrays.items():
        writer.add_tensor(name, np.array([values], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_matrices_with_different_counts_keep_their_means(tmp_path: Path) -> None:
    file = write_importance(
        tmp_path / "i.gguf",
        {"a.in_sum2": [8.0, 16.0], "a.counts": [4.0], "b.in_sum2": [8.0, 16.0], "b.counts": [8.0]},
    )
    loaded = load_importance(file)
    means = {name: loaded.mean(name) for name in "ab"}
    np.testing.assert_allclose(np.array(means["a"]), [2.0, 4.0])
    np.testing.assert_allclose(np.array(means["b"]), [1.0, 2.0])


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"a.in_sum2": [1.0]},
        {"a.in_sum2": [1.0], "b.counts": [1.0]},
        {"a.in_sum2": [1.0], "a.counts": [0.0]},
        {"a.in_sum2": [1.0], "a.counts": [3.0, 3.0]},
        {"a.in_sum2": [1.0], "a.counts": [float("nan")]},
        {"a.in_sum2": [float("nan")], "a.counts": [3.0]},
        {"a.in_sum2": [-1.0], "a.counts": [3.0]},
    ],
    ids=["nothing", "no counts", "other counts", "zero", "experts", "no number", "sums no number", "negative sums"],
)
def test_unusable_importance_is_refused(tmp_path: Path, arrays: dict[str, list[float]]) -> None:
    one_line_refusal(load_importance, write_importance(tmp_path / "i.gguf", arrays))


def test_importance_of_another_type_than_llama_imatrix_writes_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", np.ones((1, 4), dtype=np.float16))
    writer.add_tensor("a.counts", np.ones((1, 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "a.in_sum2 is F16, expected F32" in one_line_refusal(load_importance, tmp_path / "i.gguf")


@pytest.mark.parametrize("chunk_size", [0, 0.5])
def test_importance_without_a_usable_chunk_size_is_refused(tmp_path: Path, chunk_size: float) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "")
    writer.add_type("imatrix")
    writer.add_key_value("imatrix.chunk_size", chunk_size, gguf.GGUFValueType.get_type(chunk_size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "imatrix.chunk_size is 0" in one_line_refusal(load_importance, tmp_path / "i.gguf")


def test_gguf_of_another_kind_is_no_importance_matrix(tmp_path: Path) -> None:
    file = write_importance(tmp_path / "i.gguf", {"a.in_sum2": [1.0], "a.counts": [1.0]}, kind="model")
    assert "not an importance matrix" in one_line_refusal(load_importance, file)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf at all", b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_damaged_importance_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i.gguf").write_bytes(content)
    one_line_refusal(load_importance, tmp_path / "i.gguf")


def test_importance_file_cut_short_is_refused(tmp_path: Path) -> None:
    save_importance(IMPORTANCE, tmp_path / "i.gguf")
    content = (tmp_path / "i.gguf").read_bytes()
    (tmp_path / "i.gguf").write_bytes(content[: len(content) // 2])
    one_line_refusal(load_importance, tmp_path / "i.gguf")


def test_missing_importance_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in one_line_refusal(load_importance, tmp_path / "none.gguf")


def test_importance_belongs_to_its_model() -> None:
    IMPORTANCE.check(SPEC)


def test_partial_importance_is_refused_by_a_missing_matrix() -> None:
    part = {name: sums for name, sums in IMPORTANCE.in_sum2.items() if "ffn_down" not in name}
    with pytest.raises(CalibrationError, match=r"lacks 1 of the model's 2 matrices, .* blk\.0\.ffn_down\.weight"):
        replace(IMPORTANCE, in_sum2=part).check(SPEC)


def test_importance_of_another_width_is_refused() -> None:
    other = dict(IMPORTANCE.in_sum2) | {"blk.0.attn_q.weight": np.ones(128, dtype=np.float32)}
    with pytest.raises(CalibrationError, match=r"128 columns for blk\.0\.attn_q\.weight, the model has 256"):
        replace(IMPORTANCE, in_sum2=other).check(SPEC)


def test_meter_of_a_hand_example() -> None:
    meter = measure_bits(TENSORS, TYPES, file_bytes=3500)
    # Q2_K: 84 bytes for 256 weights; Q4_K: 144 bytes for 256; Q8_0: 34 bytes for 32
    assert meter.layers_bytes == 2 * 84 + 3 * 2 * 144
    assert meter.layer_bpw == 8 * (168 + 864) / (512 + 1536)
    assert meter.nominal_bits == (2 * 512 + 4 * 1536) / 2048
    assert meter.embedding_bytes == 4 * 8 * 34
    assert meter.n_weights == 1024 + 256 + 512 + 1536  # rope_freqs is computed, no weight of the source
    assert (meter.file_bytes, meter.file_bpw) == (3500, 8 * 3500 / 3328)


def test_stored_budget_counts_bytes() -> None:
    budget = BitBudget("bits", 2.625)
    assert budget.cost(QUANT_TYPES["Q2_K"], TENSORS[3]) == 8 * 168
    assert budget.limit(SPEC) == 2.625 * 2048


def test_nominal_budget_counts_digits() -> None:
    budget = BitBudget("nominal", 2.5)
    assert budget.cost(QUANT_TYPES["IQ2_XXS"], TENSORS[3]) == 2 * 512
    assert budget.limit(SPEC) == 2.5 * 2048


def test_limit_takes_the_target_as_the_decimal_it_is_written_as() -> None:
    spec = replace(SPEC, tensors=(TensorSpec("blk.0.attn_q.weight", "q", (100, 256), 0),))
    assert BitBudget("bits", 2.01).limit(spec) == 201 * 256  # 2.01 in binary is a little less
    assert BitBudget("bits", 2.0101).limit(spec) == 51458  # 51458.56, never exceeded


@pytest.mark.parametrize(("n_bytes", "stored"), [(0, 0), (1, 32), (32, 32), (33, 64), (84, 96)])
def test_tensors_are_padded_to_32_bytes(n_bytes: int, stored: int) -> None:
    assert padded(n_bytes) == stored


def test_file_takes_its_place_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    target.write_text("old")
    with replaced_when_complete(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "r.json"
    target.write_text("old")

    def fail() -> None:
        with replaced_when_complete(target) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_output_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "none" / "r.json", force=False)


def test_output_over_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_output_over_a_device_is_refused(force: bool) -> None:
    """A file would take its place."""
    with pytest.raises(OutputError, match="is a device or pipe"):
        check_output(Path(os.devnull), force)


def test_output_over_a_file_needs_force(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    with pytest.raises(OutputError, match="--force"):
        check_output(tmp_path / "r.json", force=False)
    check_output(tmp_path / "r.json", force=True)


def dat_file(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """What llama-imatrix wrote before it wrote GGUF: means times calls, by name."""
    content = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        content += np.array(values, dtype="<f4").tobytes()
    return content + tail


def test_older_importance_matrix_is_read(tmp_path: Path) -> None:
    file = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 4, 8) + b"wiki.raw"
    file.write_bytes(dat_file({"blk.0.attn_q.weight": (4, [8.0, 4.0]), "blk.0.ffn_up.weight": (2, [8.0])}, tail))
    found = load_importance(file)
    assert (found.n_chunks, found.dataset) == (4, "wiki.raw")
    for name, means in (("blk.0.attn_q.weight", [2.0, 1.0]), ("blk.0.ffn_up.weight", [4.0])):
        assert np.array_equal(np.asarray(found.mean(name)), means)


def test_oldest_importance_matrix_ends_after_its_entries(tmp_path: Path) -> None:
    file = tmp_path / "imatrix.dat"
    file.write_bytes(dat_file({"a.weight": (3, [3.0])}))
    found = load_importance(file)
    assert (found.n_chunks, found.dataset) == (3, "unknown")
    assert np.array_equal(np.asarray(found.mean("a.weight")), [1.0])


def test_every_cut_of_an_older_importance_matrix_is_refused(tmp_path: Path) -> None:
    content = dat_file({"a.weight": (3, [3.0, 1.0]), "b.weight": (3, [1.0])})
    for n_bytes in range(len(content)):
        (tmp_path / "cut.dat").write_bytes(content[:n_bytes])
        with pytest.raises(FormatError, match="is not an importance matrix"):
            load_importance(tmp_path / "cut.dat")


@pytest.mark.parametrize("values", [[float("nan")], [-1.0], []])
def test_older_importance_matrix_of_no_squares_is_refused(tmp_path: Path, values: list[float]) -> None:
    (tmp_path / "bad.dat").write_bytes(dat_file({"a.weight": (3, values)}))
    with pytest.raises(FormatError, match=r"a\.weight"):
        load_importance(tmp_path / "bad.dat")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80000000", 80_000_000),
        ("80MB", 80_000_000),
        ("80M", 80_000_000),
        ("0.4GiB", 429_496_729),
        ("1.5 kb", 1500),
        ("380MiB", 380 * 2**20),
        (".5GB", 500_000_000),
    ],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "80XB", "0", "0.0001B", "1e6", "80 MB of it"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="is not a size"):
        parse_size(text)


def test_plans_of_every_kind_of_target_are_read_back(tmp_path: Path) -> None:
    for kind, value in (("bits", 3.7), ("nominal", 2.05), ("file-bits", 4.5), ("size", 80e6)):
        plan = replace(PLAN, budget=BitBudget(kind, value), profile="edge", expected_kld=0.25)  # type: ignore[arg-type]
        plan.save(tmp_path / "plan.json", {})
        assert QuantPlan.load(tmp_path / "plan.json") == plan

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
from support.specs import COSTS, make_spec

from lieq_gguf.allocation.decode_costs import DecodeCosts, decode_costs
from lieq_gguf.errors import FormatError, OutputError
from lieq_gguf.quant_types import DEFAULT_LADDER, QUANT_TYPES
from lieq_gguf.records.folders import cache_root, data_root


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64", "riscv64"])
def test_a_table_comes_along_for_every_machine(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    costs = decode_costs()
    assert not costs.is_own
    assert all(costs.picoseconds.get(q.name, 1) > 0 for q in DEFAULT_LADDER)
    assert {q.name for q in DEFAULT_LADDER} <= costs.picoseconds.keys()
    assert ("ARM" in costs.machine) == (machine in ("aarch64", "arm64"))


def test_own_table_comes_first() -> None:
    kept = COSTS.save()
    assert decode_costs() == replace(COSTS, is_own=True)
    kept.write_text(json.dumps(COSTS.to_json() | {"picoseconds_per_weight": {"Q2_K": 1}}))
    with pytest.raises(FormatError, match="Q8_0"):
        decode_costs()


def test_own_table_is_no_cache() -> None:
    assert COSTS.save().parent == data_root() != cache_root()
    assert list(cache_root().iterdir()) == []


def test_table_that_was_kept_in_the_cache_folder_is_still_read() -> None:
    (cache_root() / "decode-costs.json").write_text(json.dumps(COSTS.to_json()))
    assert decode_costs() == replace(COSTS, is_own=True)
    newer = replace(COSTS, machine="this machine, measured again")
    newer.save()
    assert decode_costs() == replace(newer, is_own=True)


def test_data_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("LIEQ_GGUF_DATA", str(tmp_path / "file" / "below"))
    with pytest.raises(OutputError, match="LIEQ_GGUF_DATA"):
        COSTS.save()


def test_a_token_reads_every_matrix_once_but_an_embedding_that_is_no_output() -> None:
    for tied in (True, False):
        spec = make_spec(2, tied=tied)
        types = {t.name: "Q4_K" for t in spec.tensors if t.is_matrix}
        read = spec.n_layer_weights + 1000 * 256
        assert COSTS.seconds(spec.tensors, types) == pytest.approx(read * 28e-12)


def test_a_type_without_a_figure_costs_by_its_bytes() -> None:
    spec = make_spec(1)
    matrix = spec.layer_matrices[0][0]
    of_q8 = COSTS.matrix_seconds(matrix, QUANT_TYPES["Q8_0"], True)
    assert COSTS.matrix_seconds(matrix, QUANT_TYPES["F16"], True) == pytest.approx(of_q8 * 16 / 8.5)


@pytest.mark.parametrize("damage", [{"machine": None}, {"picoseconds_per_weight": {"Q8_0": -1}}, {"source": None}])
def test_incomplete_tables_are_refused(damage: dict[str, object]) -> None:
    document = {k: v for k, v in (COSTS.to_json() | damage).items() if v is not None}
    with pytest.raises(FormatError, match="bench --types"):
        DecodeCosts.from_json(document, "a table", is_own=True)

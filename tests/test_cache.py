from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.command import RunCli

from lieq_gguf.errors import OutputError
from lieq_gguf.measure import cache, forward_pass, measuring
from lieq_gguf.measure.cache import _MAX_ENTRIES, CacheEntry, passes_folder
from lieq_gguf.records.folders import cache_root
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.scorers import Scorer, scorers
from lieq_gguf.sources.model_directory import ModelDirectory

IMPORTANCE = ImportanceMatrix({"blk.0.attn_q.weight": np.ones(4, dtype=np.float32)}, 16, 16, "text")
SCORES = LayerScores("tiny", 16, "text", 0, {"lim": (0.5,)}, {"blk.0.attn_q.weight": {"Q2_K": 0.1}})


@pytest.fixture
def n_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many passes were made so far."""
    made: list[object] = []
    real = forward_pass.run_pass

    def counted(*arguments: object, **options: object) -> object:
        made.append(arguments)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(forward_pass, "run_pass", counted)
    return lambda: len(made)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def options(calibration_text: Path) -> list[object]:
    return ["--calibration", calibration_text, "--n-tokens", 256, "--types", "Q2_K,Q4_K", "--threads", 1, "--json"]


def test_second_budget_starts_at_allocation(
    run_cli: RunCli, model: Path, options: list[object], n_passes: Callable[[], int], tmp_path: Path
) -> None:
    first = run_cli("convert", model, "--bits", 3.4, "-o", tmp_path / "a.gguf", *options)
    assert "using what an earlier pass measured" not in first.stderr
    second = run_cli("convert", model, "--bits", 4, "-o", tmp_path / "b.gguf", *options)
    assert (first.exit_code, second.exit_code, n_passes()) == (0, 0, 1)
    assert "using what an earlier pass measured" in second.stderr


def test_scores_from_the_cache_make_the_same_file(
    run_cli: RunCli, model: Path, options: list[object], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert run_cli("convert", model, "--bits", 3.4, "-o", tmp_path / "x.gguf", "-f", *options).exit_code == 0
        shutil.copy(tmp_path / "x.gguf", tmp_path / name)
    assert (tmp_path / "a").read_bytes()[-1000:] == (tmp_path / "b").read_bytes()[-1000:]
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size


@pytest.mark.parametrize(
    "change", [["--no-cache"], ["--seed", 1], ["--n-tokens", 128], ["--types", "Q2_K,Q3_K"], ["--no-imatrix"]], ids=str
)
def test_what_the_result_depends_on_makes_a_pass_anew(
    run_cli: RunCli, model: Path, options: list[object], n_passes: Callable[[], int], change: list[object]
) -> None:
    for changed in ([], change):
        assert run_cli("plan", model, "--bits", 3, *options, *changed).exit_code == 0
    assert n_passes() == 2


def test_a_score_that_is_installed_later_makes_a_pass_anew(
    run_cli: RunCli,
    model: Path,
    options: list[object],
    n_passes: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_cli("plan", model, "--bits", 3, *options).exit_code == 0
    later = {**scorers(), "mine": Scorer("lieq_gguf.scorers.lim:score")}
    monkeypatch.setattr(measuring, "scorers", lambda: later)
    assert run_cli("plan", model, "--bits", 3, *options).exit_code == 0
    assert n_passes() == 2


def test_other_weights_make_a_pass_anew(
    run_cli: RunCli, model: Path, options: list[object], n_passes: Callable[[], int]
) -> None:
    assert run_cli("plan", model, "--bits", 3.4, *options).exit_code == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert run_cli("plan", model, "--bits", 3.4, *options).exit_code == 0
    assert n_passes() == 2


def test_no_cache_keeps_nothing(run_cli: RunCli, model: Path, options: list[object]) -> None:
    assert run_cli("plan", model, "--bits", 3.4, "--no-cache", *options).exit_code == 0
    assert not any(cache_root().iterdir())


def test_scores_of_the_model_before_it_was_changed_are_refused_by_name(
    run_cli: RunCli, model: Path, options: list[object], tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    assert run_cli("score", model, "-o", scores, *options).exit_code == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    done = run_cli("plan", model, "--bits", 3.4, "--scores-file", scores, "--types", "Q2_K,Q4_K")
    assert done.exit_code == 1
    assert "scores are for another model" in done.stderr


def test_fingerprint_depends_on_the_weights_and_not_on_the_place(model: Path, tiny_model: Path) -> None:
    assert ModelDirectory(model).fingerprint == ModelDirectory(tiny_model).fingerprint
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}), encoding="utf-8")
    assert ModelDirectory(model).fingerprint != ModelDirectory(tiny_model).fingerprint


def test_what_is_kept_comes_back() -> None:
    entry = CacheEntry.of(model="a")
    assert entry.load() is None
    entry.save(SCORES, IMPORTANCE)
    found = CacheEntry.of(model="a").load()
    assert found is not None
    assert found[0] == SCORES
    np.testing.assert_array_equal(found[1].in_sum2["blk.0.attn_q.weight"], 1)
    assert CacheEntry.of(model="b").load() is None


@pytest.mark.parametrize("name", ["scores.json", "imatrix.gguf"])
def test_damaged_entry_is_as_good_as_none(name: str) -> None:
    entry = CacheEntry.of(model="a")
    entry.save(SCORES, IMPORTANCE)
    (entry.folder / name).write_bytes(b"damaged")
    assert entry.load() is None


def test_entries_used_longest_ago_are_dropped() -> None:
    first = CacheEntry.of(n=0)
    first.save(None, IMPORTANCE)
    os.utime(first.folder, (1, 1))
    for n in range(1, _MAX_ENTRIES + 1):
        CacheEntry.of(n=n).save(None, IMPORTANCE)
    assert first.load() is None
    assert len(list(passes_folder().iterdir())) == _MAX_ENTRIES


def test_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("LIEQ_GGUF_CACHE", str(tmp_path / "file"))
    CacheEntry.of(model="a").save(SCORES, IMPORTANCE)
    assert CacheEntry.of(model="a").load() is None


def fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Save three entries where two are kept; the folders of all three, oldest first."""
    monkeypatch.setattr(cache, "_MAX_ENTRIES", 2)
    entries = [CacheEntry.of(n=n) for n in range(3)]
    for n, entry in enumerate(entries):
        entry.save(SCORES, IMPORTANCE)
        os.utime(entry.folder, (n, n))
    CacheEntry.of(n=2).save(SCORES, IMPORTANCE)
    return [entry.folder for entry in entries]


def content(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, links not followed."""
    below = [file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()]
    return {str(f.relative_to(folder)): os.fsencode(f.readlink()) if f.is_symlink() else f.read_bytes() for f in below}


def with_another_file(entry: Path) -> None:
    (entry / "notes.txt").write_text("mine", encoding="utf-8")


def with_a_folder(entry: Path) -> None:
    (entry / "photographs").mkdir()
    (entry / "photographs" / "one.jpg").write_bytes(b"mine")


def with_scores_of_another_kind(entry: Path) -> None:
    (entry / "scores.json").write_text('{"player": 12}', encoding="utf-8")


def with_another_name(entry: Path) -> None:
    entry.rename(entry.with_name("experiment-7"))


def with_a_link_for_a_file(entry: Path) -> None:
    elsewhere = entry.parent.parent / "elsewhere.json"
    (entry / "scores.json").rename(elsewhere)
    (entry / "scores.json").symlink_to(elsewhere)


def as_a_link(entry: Path) -> None:
    elsewhere = entry.parent.parent / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere, target_is_directory=True)


def emptied(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()


CHANGES = (
    with_another_file, with_a_folder, with_scores_of_another_kind, with_another_name, with_a_link_for_a_file, as_a_link,
    emptied,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_certainly_an_entry_is_never_removed(
    change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CacheEntry.of(n="changed")
    entry.save(SCORES, IMPORTANCE)
    change(entry.folder)
    for folder in passes_folder().iterdir():
        os.utime(folder, (0, 0))
    folders, before = set(passes_folder().iterdir()), content(cache_root())
    oldest, *_ = fill_the_cache(monkeypatch)
    assert not oldest.exists()  # so the folder was looked through
    assert folders < set(passes_folder().iterdir())
    assert before.items() <= content(cache_root()).items()


def test_a_folder_that_is_the_users_own_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its folders have the names and files of entries, as the cache itself had before it got its own folder."""
    for n in range(45):
        folder = cache_root() / f"{n:032x}"
        folder.mkdir()
        SCORES.save(folder / "scores.json", "lim")
        (folder / "diary.txt").write_text("mine", encoding="utf-8")
        os.utime(folder, (0, 0))
    before = content(cache_root())
    fill_the_cache(monkeypatch)
    assert before.items() <= content(cache_root()).items()
    assert {path.name for path in cache_root().iterdir()} == {*(f"{n:032x}" for n in range(45)), "passes"}


def test_behind_a_link_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    passes_folder().symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert all(folder.is_dir() for folder in fill_the_cache(monkeypatch))
    assert CacheEntry.of(n=0).load() is not None


def test_nothing_is_written_into_a_links_target(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("mine", encoding="utf-8")
    entry = CacheEntry.of(n=0)
    passes_folder().mkdir()
    entry.folder.symlink_to(tmp_path, target_is_directory=True)
    entry.save(SCORES, IMPORTANCE)
    assert content(tmp_path) == {"scores.json": b"mine"}


def fail(*_arguments: object) -> None:
    raise OutputError("the disk is full")


def test_failed_save_leaves_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "save_importance", fail)
    entry = CacheEntry.of(n=0)
    entry.save(SCORES, IMPORTANCE)
    assert not entry.folder.exists()


@pytest.mark.parametrize("change", [with_another_file, with_a_folder, with_a_link_for_a_file])
def test_failed_save_removes_nothing_but_an_entry(
    change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CacheEntry.of(n=0)
    entry.save(None, IMPORTANCE)
    SCORES.save(entry.folder / "scores.json", "lim")
    change(entry.folder)
    before = content(entry.folder)
    monkeypatch.setattr(cache, "save_importance", fail)
    entry.save(None, IMPORTANCE)
    assert content(entry.folder) == before


def test_what_a_killed_process_leaves_goes_with_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = CacheEntry.of(n="killed")
    entry.folder.mkdir(parents=True)
    (entry.folder / ".imatrix.gguf.k3_x9a.partial").write_bytes(b"")
    os.utime(entry.folder, (0, 0))
    fill_the_cache(monkeypatch)
    assert not entry.folder.exists()

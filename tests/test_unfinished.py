"""A conversion that is interrupted anywhere goes on there, with the same bytes."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.requests import on_text, request_of

from lieq_gguf.errors import QuantizationError
from lieq_gguf.pipeline import Conversion, convert
from lieq_gguf.writing import unfinished
from lieq_gguf.writing.feedback_pass import FeedbackPass
from lieq_gguf.writing.unfinished import Unfinished


@pytest.fixture(autouse=True)
def every_layer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "SECONDS_BETWEEN", 0.0)


def converted(model: Path, output: Path, text: Path, *, use_cache: bool = True) -> Conversion:
    options = replace(on_text(text, 1024), use_cache=use_cache)
    return convert(request_of(model, 2.8, output, "Q2_K,IQ3_XXS", options))


@pytest.fixture
def folder() -> Path:
    return Path(os.environ["LIEQ_GGUF_CACHE"]) / "unfinished"


class Encoded:
    """Which layers are encoded, and an exception at the beginning of one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        self.at: int | None = None
        self.failure: BaseException = KeyboardInterrupt()
        original = FeedbackPass._encode_layer

        def encode_layer(feedback: FeedbackPass, index: int, states: Any) -> Any:
            if index == self.at:
                raise self.failure
            self.layers.append(index)
            return original(feedback, index, states)

        monkeypatch.setattr(FeedbackPass, "_encode_layer", encode_layer)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    return Encoded(monkeypatch)


def test_goes_on_where_it_was_interrupted(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, encoded: Encoded, folder: Path
) -> None:
    output = tmp_path / "model.gguf"
    whole = converted(tiny_model, output, calibration_text)
    expected, n_layers = output.read_bytes(), len(encoded.layers)
    assert list(folder.iterdir()) == []  # nothing is left of what is complete
    output.unlink()
    for at in range(n_layers):
        encoded.at = at
        with pytest.raises(KeyboardInterrupt):
            converted(tiny_model, output, calibration_text)
        assert not output.exists()
    encoded.layers.clear()
    encoded.at = None
    again = converted(tiny_model, output, calibration_text)
    assert encoded.layers == [n_layers - 1]
    assert output.read_bytes() == expected
    assert again.block_errors == whole.block_errors
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["rows", "states", "state.json", "missing"])
def test_a_damaged_state_is_not_used(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, encoded: Encoded, folder: Path, damage: str
) -> None:
    output = tmp_path / "model.gguf"
    encoded.at = 1
    with pytest.raises(KeyboardInterrupt):
        converted(tiny_model, output, calibration_text)
    file = next(iter(folder.glob(f"*/{'rows-1' if damage == 'missing' else damage}*")))
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    encoded.at = None
    encoded.layers.clear()
    converted(tiny_model, output, calibration_text)
    assert encoded.layers[0] == 0
    assert list(folder.iterdir()) == []


def test_nothing_is_kept_of_a_failure_or_without_cache(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, encoded: Encoded, folder: Path
) -> None:
    encoded.at, encoded.failure = 1, QuantizationError("no")
    with pytest.raises(QuantizationError):
        converted(tiny_model, tmp_path / "model.gguf", calibration_text)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    encoded.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        converted(tiny_model, tmp_path / "model.gguf", calibration_text, use_cache=False)
    assert not folder.exists()


def test_another_process_with_the_same_work_is_left_alone() -> None:
    kept = Unfinished.of(model="a")
    assert kept.open() is None
    folder = Path(os.environ["LIEQ_GGUF_CACHE"]) / "unfinished"
    [own] = folder.iterdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (own / "lock").write_text(str(other.pid))
        second = Unfinished.of(model="a")
        assert second.open() is None
        with second.until_done():
            pass
        assert (own / "lock").read_text() == str(other.pid)
        other.communicate(b"\n")
    third = Unfinished.of(model="a")  # of a process that is gone
    third.open()
    with third.until_done():
        pass
    assert list(folder.iterdir()) == []


def test_what_nobody_went_on_with_is_removed_after_weeks(folder: Path) -> None:
    for name, age in (("0" * 32, 15), ("1" * 32, 13), ("notes", 15)):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
        when = (folder / name).stat().st_mtime - age * 86400
        os.utime(folder / name, (when, when))
    kept = Unfinished.of(model="b")
    kept.open()
    with kept.until_done():
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["1" * 32, "notes"]


def on_a_full_disk(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """``mkstemp`` that fails for one file."""

    def mkstemp(*arguments: Any, prefix: str, **named: Any) -> Any:
        if name in prefix:
            raise OSError(28, "No space left on device")
        return original(*arguments, prefix=prefix, **named)

    return mkstemp


@pytest.mark.parametrize("where", ["_append", "_save", "state.json"])
def test_a_full_disk_costs_no_conversion(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, where: str
) -> None:
    def write(*_arguments: object, **_named: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "state.json":
        monkeypatch.setattr(tempfile, "mkstemp", on_a_full_disk(where, tempfile.mkstemp))
    else:
        monkeypatch.setattr(Unfinished, where, write)
    output = tmp_path / "model.gguf"
    converted(tiny_model, output, calibration_text)
    assert output.is_file()
    assert list(folder.iterdir()) == []

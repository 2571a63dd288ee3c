"""Everything is decided from headers: one set of defaults, and no heavy import before the pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.command import RunCli, run_apart
from support.requests import on_text, request_of

from lieq_gguf import pipeline
from lieq_gguf.errors import LieqError
from lieq_gguf.job import output_of, resolve
from lieq_gguf.progress import Progress
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.options import WritingOptions
from lieq_gguf.request import ImatrixRequest, Request, ScoreRequest


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command line asks of the pipeline."""
    seen: list[Any] = []

    def refuse(request: object, *_: object) -> None:
        seen.append(request)
        raise LieqError("asked")

    for name in ("convert", "plan", "score", "imatrix"):
        monkeypatch.setattr(pipeline, name, refuse)
    return seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("convert", "m", "--bits", 2.7), Request("m", BitBudget("bits", 2.7))),
        (("convert", "m", "--size", "80MB", "--dry-run"), Request("m", BitBudget("size", 80_000_000))),
        (("convert", "m", "--plan", "p.json"), Request("m", Path("p.json"))),
        (("plan", "m", "--nominal", "--bits", 2.06), Request("m", BitBudget("nominal", 2.06))),
        (("score", "m"), ScoreRequest("m")),
        (("imatrix", "m", "-o", "i.gguf"), ImatrixRequest("m")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_defaults_are_the_same_from_python_and_from_the_command_line(
    run_cli: RunCli, asked: list[Any], arguments: tuple[object, ...], expected: object
) -> None:
    run_cli(*arguments)
    if isinstance(expected, Request):
        line = " ".join(["lieq-gguf", *map(str, arguments)])
        expected = Request(expected.model, expected.target, writing=WritingOptions(command_line=line))
    assert asked == [expected]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("convert", "MODEL", "--bits", "1.1"), 1),
        (("convert", "MODEL", "--bits", "3", "--calibration", "not-there.txt"), 1),
        (("convert", "MODEL", "--bits", "3", "--imatrix", "not-there.gguf"), 1),
        (("convert", "MODEL", "--bits", "3", "--scores-file", "not-there.json"), 1),
        (("convert", "MODEL", "--bits", "3", "--pre-tokenizer", "nobodys"), 1),
        (("plan", "MODEL", "--bits", "3", "--pin", "nothing=Q4_K"), 1),
        (("convert", "MODEL", "--bits", "3", "--min-tokens-per-sec", "1e9"), 1),
        (("convert", "not-there", "--bits", "3"), 1),
        (("convert", "MODEL", "--bits", "3", "--layer-score", "magic"), 2),
        (("--help",), 0),
        (("convert", "--help"), 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_and_refusals_load_no_torch(
    tiny_model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    given = [str(tiny_model) if a == "MODEL" else a for a in arguments]
    result, loaded = run_apart(given, tmp_path)
    assert (result.exit_code, loaded) == (code, []), result.stderr
    assert code == 0 or len(result.stderr.strip().splitlines()) == 1 or code == 2


def test_a_job_is_decided_without_a_weight(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("lieq_gguf.sources.model_directory.ModelDirectory.read", fail)
    monkeypatch.setattr("lieq_gguf.sources.model_directory.ModelDirectory.rows", fail)
    job = resolve(request_of(tiny_model, 3.0, tmp_path / "a.gguf", "Q2_K,Q4_K"), Progress())
    assert job.measuring.engine.name == "transformers"
    assert job.measuring.needs_pass
    assert job.problem is not None and job.problem.error_feedback
    assert job.plan is None


def test_text_is_tokenised_once(
    tiny_model: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The pass and error feedback share the tokens."""
    from lieq_gguf.measure import measuring, text

    made: list[object] = []
    real = text.tokenize

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(measuring, "tokenize", counted)
    pipeline.convert(request_of(tiny_model, 3.0, tmp_path / "a.gguf", "Q2_K,Q4_K", on_text(calibration_text, 256)))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (BitBudget("bits", 2.7), "model-2.7bpw.gguf"),
        (BitBudget("nominal", 2.06), "model-2.06-nominal.gguf"),
        (BitBudget("file-bits", 4), "model-4bpw-file.gguf"),
        (BitBudget("size", 80_000_000), "model-80MB.gguf"),
        (Path("some/plan.json"), "model-plan.gguf"),
    ],
    ids=str,
)
def test_file_is_named_after_model_and_target(target: BitBudget | Path, name: str) -> None:
    assert output_of(Request("folder/model", target)).name == name

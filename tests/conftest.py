"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# Tests run beside each other: one thread unless a test asks for more, and threads that wait leave their core to others.
# Read when the libraries are loaded, so before the imports below.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch
from support.command import CliResult, RunCli
from support.converter import CACHE
from support.llama_cpp_source import llama_cpp_source
from support.models import write_model
from support.requests import on_text, request_of

from lieq_gguf import pipeline
from lieq_gguf.cli.commands import main


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that the others fill up the time that one process would work alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def folders_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees what another has kept, nor the user's own cache and data."""
    for variable in ("LIEQ_GGUF_CACHE", "LIEQ_GGUF_DATA"):
        monkeypatch.setenv(variable, str(tmp_path_factory.mktemp("folder")))


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run have in common, for what ``made_once`` makes."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of three layers whose rows fit 256-weight blocks; read-only."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text for passes that need not measure well."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. Numbers: 1 2 3 5 8 13 21.\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """Folder with llama.cpp's converter, which neither comes with its package nor can be made without the network."""
    try:
        return llama_cpp_source(CACHE)
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[RunCli]:
    """Run ``lieq-gguf`` with arguments in this process; what C libraries print is captured as well."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> CliResult:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lieq-gguf", *(str(a) for a in arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        return CliResult(code if isinstance(code, int) else int(code is not None), printed.out, printed.err)

    yield run
    signal.signal(signal.SIGTERM, handler)  # main sets its own


@pytest.fixture(scope="session")
def conversion(
    tiny_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> pipeline.Conversion:
    """``tiny_model`` converted to a mix of Q2_K, Q3_K and Q4_K, every block by itself; its file is read-only."""
    output, text = tmp_path_factory.mktemp("converted") / "tiny.gguf", on_text(calibration_text, 512)
    request = request_of(tiny_model, 3.4, output, "Q2_K,Q3_K,Q4_K", text, error_feedback=False)
    writing = replace(request.writing, command_line="lieq-gguf convert tiny --bits 3.4")
    return pipeline.convert(replace(request, writing=writing))

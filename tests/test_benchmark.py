from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.command import RunCli

from lieq_gguf import pipeline
from lieq_gguf.evaluation.benchmark import Benchmark, Rate, bench, read_bandwidth
from lieq_gguf.evaluation.devices import DEVICES
from lieq_gguf.evaluation.inspection import inspect

GOOD = Benchmark(
    file=Path("model.gguf"), file_bytes=10**9, n_threads=4, n_prompt=512, n_generate=128, prompt=Rate(100, 1),
    generation=Rate(10, 0.1), load_seconds=1.0, resident_bytes=2 * 10**9, bytes_per_token=8 * 10**8,
    memory_bandwidth=16e9, needed_bytes=3 * 10**9, n_ctx=4096, predicted=9.0, predicted_for="a test",
)  # fmt: skip


def test_bandwidth_is_what_generation_reads() -> None:
    assert GOOD.bandwidth == 8e9


def test_estimates_keep_the_share_of_the_bandwidth() -> None:
    for estimate in GOOD.estimates():
        assert estimate.tokens_per_sec == pytest.approx(0.5 * estimate.device.bandwidth / 8e8)


def test_no_estimate_is_above_the_published_bandwidth() -> None:
    cached = replace(GOOD, generation=Rate(1000, 1))
    for estimate in cached.estimates():
        assert estimate.tokens_per_sec == pytest.approx(estimate.device.bandwidth / 8e8)


def test_a_model_that_fills_the_memory_does_not_fit() -> None:
    n_bytes = min(d.memory_bytes for d in DEVICES)
    assert not all(e.fits for e in replace(GOOD, needed_bytes=n_bytes).estimates())
    assert all(e.fits for e in replace(GOOD, needed_bytes=n_bytes // 2).estimates())
    assert not any(e.fits for e in replace(GOOD, needed_bytes=10**12).estimates())


def test_figures_of_a_real_file(conversion: pipeline.Conversion) -> None:
    one, two = bench(conversion.output, 16, 4, 2, (1, 2))
    facts = inspect(conversion.output)
    assert (one.n_threads, two.n_threads) == (1, 2)
    assert one.bytes_per_token == facts.bytes_per_token
    assert one.needed_bytes >= facts.meter.file_bytes + facts.kv_cache_bytes
    assert one.load_seconds > 0
    assert one.load_seconds == two.load_seconds
    assert 1e8 < one.memory_bandwidth < 1e13


def test_memory_is_read_at_a_plausible_rate() -> None:
    assert 1e8 < read_bandwidth(1) < 1e12


def test_bench_runs_every_number_of_threads(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    done = run_cli("bench", conversion.output, "-p", 8, "-n", 2, "-r", 1, "-t", "1,2,1", "--json")
    found = json.loads(done.stdout)
    assert [entry["n_threads"] for entry in found] == [1, 2]
    assert [e["device"] for e in found[0]["estimates"]] == [d.name for d in DEVICES]


@pytest.mark.parametrize("threads", ["0", "1,", "two", "-1"])
def test_bad_numbers_of_threads_are_wrong_usage(run_cli: RunCli, threads: str) -> None:
    done = run_cli("bench", "x.gguf", "--threads", threads)
    assert done.exit_code == 2
    assert "expected for example 1,2,4" in " ".join(done.stderr.replace("│", " ").split())


def test_table_marks_estimates(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    shown = run_cli("bench", conversion.output, "-p", 8, "-n", 2, "-r", 1, "-t", 1).stdout
    assert "estimated" in shown
    assert "Raspberry Pi 5" in shown
    assert "~" in shown

"""The main job on SmolLM2-135M, padded to a width that every type fits, from the package index."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from support.plain_solvers import greedy, lagrangian, totals
from support.requests import TWO_THREADS, convert_plainly, measured, on_text, request_of
from support.shared import made_once
from support.tolerances import F16_LOGITS, assert_logits_close
from support.whole_model import lieq_scores
from transformers import AutoModelForCausalLM

from lieq_gguf.allocation.build import build_problem
from lieq_gguf.allocation.knapsack import GAP, solve
from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.allocation.time_limit import options as choices
from lieq_gguf.evaluation.divergence import ComparisonOptions, evaluate, read_text
from lieq_gguf.evaluation.generation import stream
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.passes import PassOptions
from lieq_gguf.measure.text import CHUNK_SIZE, read_calibration_texts, tokenize
from lieq_gguf.measure.torch_setup import has_fast_bfloat16
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.pipeline import convert, plan
from lieq_gguf.quant_types import DEFAULT_LADDER
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.options import ComputeOptions, GenerationOptions, MeasuringOptions
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.request import Request
from lieq_gguf.scorers import lieq, score_layers
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import load_source_tokenizer, tokenizer_differences

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
N_THREADS = 2


@pytest.fixture(scope="module")
def model() -> Path:
    """Kept under build/, so that it is made once."""
    path = ROOT / "build" / "models" / "smollm2-135m-768"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        subprocess.run([sys.executable, ROOT / "tools" / "make_demo_model.py", path, "--pad"], check=True)
    return path


def with_layers(model: Path, path: Path, n_layers: int) -> Path:
    """The model without its later layers: what works layer by layer needs no more of them."""
    path = Path(shutil.copytree(model, path, copy_function=os.symlink))
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": n_layers}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def twelve_layers(model: Path, shared: Path) -> Path:
    """Enough of them to divide bits among."""
    return made_once(shared / "twelve", lambda folder: with_layers(model, folder / "model", 12)) / "model"


@pytest.fixture(scope="module")
def files(twelve_layers: Path, shared: Path) -> MeasuringOptions:
    """Scores and importance matrix of twelve layers from one pass, as files."""

    def measure(folder: Path) -> None:
        found = measured(ModelDirectory(twelve_layers), DEFAULT_LADDER, on_text(None, 512))
        assert found.scores is not None
        assert found.importance is not None
        found.scores.save(folder / "scores.json", "lieq")
        save_importance(found.importance, folder / "imatrix.gguf")

    folder = made_once(shared / "measured", measure)
    return on_text(None, 4096, scores_file=folder / "scores.json", imatrix_file=folder / "imatrix.gguf")


def plain_request(model: Path, files: MeasuringOptions, output: Path | None, bits: float, **options: Any) -> Request:
    """Without error feedback: half the time, and the same to the tests that look at sizes and types."""
    allocation = AllocationOptions(**options)
    return request_of(model, bits, output, measuring=files, error_feedback=False, allocation=allocation)


@pytest.fixture(scope="module")
def f16_file(model: Path, shared: Path) -> Path:
    return made_once(shared / "f16", lambda folder: convert_plainly(model, folder / "f16.gguf")) / "f16.gguf"


@pytest.fixture
def first_layers(model: Path, tmp_path: Path) -> Path:
    return with_layers(model, tmp_path / "first-layers", 4)


@pytest.mark.parametrize("bits", [2.1, 2.7, 3.5, 4.5])
def test_every_budget_is_met_within_one_percent(twelve_layers: Path, files: MeasuringOptions, bits: float) -> None:
    planned = plan(plain_request(twelve_layers, files, None, bits))
    assert 0.99 * bits <= planned.header.meter.layer_bpw <= bits


def test_the_papers_rule_leaves_two_types_one_per_layer(twelve_layers: Path, files: MeasuringOptions) -> None:
    planned = plan(plain_request(twelve_layers, files, None, 2.7, method="lieq"))
    layers = [{planned.plan.types[t.name] for t in layer} for layer in planned.job.source.spec.layer_matrices]
    assert all(len(types) == 1 for types in layers)
    assert len(set.union(*layers)) == 2
    assert 0.99 * 2.7 <= planned.header.meter.layer_bpw <= 2.7


def test_error_feedback_brings_a_file_closer_to_the_model(first_layers: Path, tmp_path: Path) -> None:
    """What each type gains in a matrix is in test_error_feedback."""
    exact = convert_plainly(first_layers, tmp_path / "exact.gguf")
    made = {fed: tmp_path / f"{fed}.gguf" for fed in (False, True)}
    measuring = on_text(None, 4096)  # what 1536 tokens tell of 768 columns is mostly chance
    for fed, file in made.items():
        convert(request_of(first_layers, 2.625, file, "Q2_K", measuring, error_feedback=fed))
    options = ComparisonOptions(256, 12, N_THREADS)  # with three sequences the ratio is chance by a tenth
    without, with_feedback = evaluate(list(made.values()), exact, read_text(None), options)
    assert with_feedback.kld.value < 0.8 * without.kld.value


@pytest.mark.parametrize("size", [45_000_000, 55_000_000, 66_000_000])
def test_no_plain_solver_finds_better_types(twelve_layers: Path, files: MeasuringOptions, size: int) -> None:
    assert files.scores_file is not None
    scores = LayerScores.load(files.scores_file)
    options = AllocationOptions("block-error")
    spec = ModelDirectory(twelve_layers).spec
    problem = build_problem(spec, BitBudget("size", size), options, header_bytes=2_000_000)
    groups = choices(problem, lambda group, quant_type: group.block_error(scores, quant_type))
    chosen = solve(groups, problem.limit)
    best, used, _ = totals(groups, chosen)
    assert 0.999 * problem.limit < used <= problem.limit
    for solver in (greedy, lagrangian):
        assert best <= totals(groups, solver(groups, problem.limit))[0] * (1 + 2 * GAP)


@pytest.mark.parametrize("profile", ["cpu", "quality", "edge"])
def test_plan_for_a_given_size_fills_it(twelve_layers: Path, files: MeasuringOptions, profile: str) -> None:
    size = 53_000_000
    request = plain_request(twelve_layers, files, None, 1, profile=profile)
    planned = plan(replace(request, target=BitBudget("size", size)))
    assert 0.999 * size < planned.header.meter.file_bytes <= size
    types = {name for name in planned.plan.types.values() if name.startswith("IQ")}
    assert profile == "cpu" or bool(types) == (profile == "quality")  # of cpu it depends on the measurements


def test_file_of_a_given_size_is_no_larger(twelve_layers: Path, files: MeasuringOptions, tmp_path: Path) -> None:
    output, size = tmp_path / "out.gguf", 53_000_000
    request = plain_request(twelve_layers, files, output, 1, profile="edge")
    result = convert(replace(request, target=BitBudget("size", size)))
    assert 0.999 * size < output.stat().st_size <= size
    assert GgufFile(output).bit_meter() == result.prepared.header.meter


def test_a_quantised_file_speaks(model: Path, tmp_path: Path) -> None:
    output = convert_plainly(model, tmp_path / "out.gguf", "Q4_0")
    answer = stream(output, "The capital of France is", GenerationOptions(8, raw=True, n_threads=N_THREADS))
    assert "".join(answer).strip()


def test_streamed_scores_are_those_of_whole_models_and_of_bfloat16(first_layers: Path) -> None:
    source = ModelDirectory(first_layers)
    tokens = tokenize(read_calibration_texts(), load_source_tokenizer(first_layers), 5 * CHUNK_SIZE)
    exact = run_pass(source, tokens, PassOptions(compute=ComputeOptions(n_threads=N_THREADS, in_float32=True)))
    assert lieq.score(exact.measurements) == pytest.approx(lieq_scores(first_layers, tokens.ids, seed=0), abs=1e-4)
    if not has_fast_bfloat16(torch.device("cpu")):
        pytest.skip("the processor has no bfloat16; emulation takes minutes")
    rounded = run_pass(source, tokens, PassOptions(compute=TWO_THREADS))
    by_scorer, expected = score_layers(rounded.measurements), score_layers(exact.measurements)
    for name, values in expected.items():
        spread = max(values) - min(values)  # a score that is nearly nothing has no percent to stay within
        assert by_scorer[name] == pytest.approx(values, rel=0.01, abs=0.01 * spread), name


def test_f16_logits_agree_with_transformers(model: Path, f16_file: Path) -> None:
    [text] = read_calibration_texts()
    ids = load_source_tokenizer(model).encode(text.content, add_special_tokens=False)[:500]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with open_model(f16_file, n_ctx=500, n_threads=N_THREADS) as ours, torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        # thirty layers are 120 products, so twice what thirty make; 0.009 with AVX2, and neighbours are 0.8 away
        assert_logits_close(ours.logits(ids), expected, 2 * F16_LOGITS)


def test_a_gguf_file_is_scored_and_planned_as_its_directory(first_layers: Path, tmp_path: Path) -> None:
    exact = convert_plainly(first_layers, tmp_path / "exact.gguf")
    of_file, of_directory = (plan(request_of(path, 3.5, types="Q2_K,Q4_K,Q6_K")) for path in (exact, first_layers))
    assert of_file.measured.scores is not None and of_directory.measured.scores is not None
    for name, expected in of_directory.measured.scores.by_scorer.items():
        assert of_file.measured.scores.by_scorer[name] == pytest.approx(expected, rel=0.01), name
    assert of_file.header.meter.file_bytes == of_directory.header.meter.file_bytes
    assert of_file.plan.types == of_directory.plan.types


def test_both_tokenizers_give_the_same_ids(model: Path, f16_file: Path) -> None:
    assert tokenizer_differences(load_source_tokenizer(model), f16_file) == []

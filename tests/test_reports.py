"""Every condition of ``support.reports``: the file computes what transformers does, or the model is refused at once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file
from support.command import RunCli
from support.families import TINY_MODELS
from support.reports import CONDITIONS, PLAIN, Condition, difference, edit_json
from support.requests import measured, on_text
from support.tolerances import F16_LOGITS, MIXTURE_LOGITS, MIXTURE_SHARE

from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.sources.model_directory import ModelDirectory

RIGHT = {name: condition for name, condition in CONDITIONS.items() if not condition.refusal}
REFUSED = {name: condition for name, condition in CONDITIONS.items() if condition.refusal}


@pytest.mark.parametrize("condition", RIGHT.values(), ids=RIGHT)
def test_the_file_is_the_model_that_transformers_loads(condition: Condition, tmp_path: Path, run_cli: RunCli) -> None:
    path, file = condition.write(tmp_path / "model"), tmp_path / "out.gguf"
    done = run_cli("convert", path, *PLAIN, "-o", file)
    assert done.exit_code == 0, done.stderr
    assert condition.says in done.stderr
    distances, same_tokens = difference(condition, path, file)
    bound, share = (MIXTURE_LOGITS, MIXTURE_SHARE) if condition.model == "qwen3moe" else (F16_LOGITS, 1.0)
    assert (distances < bound).mean() >= share, distances
    assert same_tokens


@pytest.mark.parametrize("condition", REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(condition: Condition, tmp_path: Path, run_cli: RunCli) -> None:
    path, file = condition.write(tmp_path / "model"), tmp_path / "out.gguf"
    done = run_cli("convert", path, "--bits", 4.5, "-o", file)
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert condition.refusal in line
    assert list(tmp_path.iterdir()) == [path]


TEMPLATES = {
    "unclosed": "{% for m in messages %}",
    "of none": "{{ tools | length }}",
    "unknown function": "{{ today() }}",
    "out of range": "{{ messages[5].content }}",
    "division": "{{ 1 / 0 }}",
    "include": "{% include 'a' %}",
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["smollm2"].write(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_run_says_what_a_template_did(smollm2: Path, template: str, tmp_path: Path, run_cli: RunCli) -> None:
    """C9: textgen 6675, llama.cpp 11866, llama-cpp-python 2225."""
    path, file = Path(shutil.copytree(smollm2, tmp_path / "model")), tmp_path / "out.gguf"
    edit_json("tokenizer_config.json", chat_template=template)(path)
    assert run_cli("convert", path, *PLAIN, "-o", file).exit_code == 0
    done = run_cli("run", file, "Hello", "-n", 2)
    [line] = done.stderr.splitlines()
    assert done.exit_code == 1
    assert "the chat template of" in line
    assert "--raw continues the text without it" in line
    assert run_cli("run", file, "Hello", "-n", 2, "--raw").exit_code == 0


@pytest.mark.parametrize(("part", "shown"), [(1.0, "100%"), (0.5, "50%")])
def test_an_importance_matrix_of_zeros_writes_no_zeros(
    smollm2: Path, calibration_text: Path, tmp_path: Path, run_cli: RunCli, part: float, shown: str
) -> None:
    """C7: llama.cpp 8661, 20460, 19861."""
    importance = measured(ModelDirectory(smollm2), (), on_text(calibration_text, 512), scores=False).importance
    assert importance is not None
    name = "blk.1.ffn_down.weight"
    sums = importance.in_sum2[name].copy()
    sums[: int(part * len(sums))] = 0
    save_importance(replace(importance, in_sum2={**importance.in_sum2, name: sums}), tmp_path / "zeros.gguf")
    options = (
        "--bits",
        4.5,
        "--types",
        "Q4_K",
        "--imatrix",
        tmp_path / "zeros.gguf",
        "--calibration",
        calibration_text,
    )
    done = run_cli("convert", smollm2, *options, "--calibration", calibration_text, "-o", tmp_path / "out.gguf")
    assert done.exit_code == 0, done.stderr
    assert f"the importance matrix has zeros for {shown} of the columns of {name}" in done.stderr
    weights = load_file(smollm2 / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float().numpy()
    [found] = [t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == name]
    error = gguf.quants.dequantize(found.data, found.tensor_type) - weights
    half = weights.shape[1] // 2
    for columns in (slice(half), slice(half, None)):
        assert np.square(error[:, columns]).sum() < 0.05 * np.square(weights[:, columns]).sum()


IDLE = ["C13 block", "C13 query", "C13 up", "C13 value"]


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "best") for name in IDLE), ("C13 block", "weighted-error"), ("C13 block", "zd")]
)
def test_a_layer_that_does_nothing_costs_nothing(
    name: str, method: str, calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    path = CONDITIONS[name].write(tmp_path / "model")
    text = ("--calibration", calibration_text, "--n-tokens", 512)
    done = run_cli("convert", path, "--bits", 4.5, "--method", method, *text, "-o", tmp_path / "out.gguf")
    assert done.exit_code == 0, done.stderr

"""The second pass on tiny models: the same file but for the values, and the values those that were computed."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.command import RunCli
from support.families import TINY_MODELS
from support.models import write_model
from support.requests import on_text, request_of
from transformers import LlamaForCausalLM

from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.passes import PassOptions
from lieq_gguf.measure.stream import additions, states_behind
from lieq_gguf.measure.text import CalibrationText, tokenize
from lieq_gguf.native import ggml
from lieq_gguf.pipeline import Conversion, convert
from lieq_gguf.pipeline import plan as planned
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import load_source_tokenizer
from lieq_gguf.writing import error_feedback, moved_weights
from lieq_gguf.writing.feedback_pass import FeedbackPass


def converted(source: Path, output: Path, text: Path, types: str = "Q2_K,IQ3_XXS") -> Conversion:
    return convert(request_of(source, 2.8, output, types, on_text(text, 1024)))


@pytest.fixture(scope="module")
def fed(tiny_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return converted(tiny_model, tmp_path_factory.mktemp("fed") / "fed.gguf", calibration_text)


def decoded(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.spec.name: ggml.dequantize(t.data, t.quant_type) for t in GgufFile(file).tensors}


def test_only_the_values_differ(fed: Conversion, run_cli: RunCli, tiny_model: Path, tmp_path: Path) -> None:
    plan, plain = tmp_path / "plan.json", tmp_path / "plain.gguf"
    fed.prepared.plan.save(plan, {})
    assert fed.prepared.measured.importance is not None
    save_importance(fed.prepared.measured.importance, tmp_path / "imatrix.gguf")
    done = run_cli(
        "convert",
        tiny_model,
        "--plan",
        plan,
        "--imatrix",
        tmp_path / "imatrix.gguf",
        "--no-error-feedback",
        "-q",
        "-o",
        plain,
    )
    assert done.exit_code == 0, done.stderr
    with_feedback, without = gguf.GGUFReader(fed.output), gguf.GGUFReader(plain)
    names = [(t.name, t.tensor_type, list(t.shape), t.n_bytes) for t in without.tensors]
    assert [(t.name, t.tensor_type, list(t.shape), t.n_bytes) for t in with_feedback.tensors] == names
    # the command line is part of the file, so its length is part of the size
    about_the_run = {"lieq.refine", "lieq.command_line", "lieq.file_bpw", "GGUF.kv_count", "quantize.imatrix.file"}
    for name, field in without.fields.items():
        if name not in about_the_run:
            assert with_feedback.fields[name].contents() == field.contents(), name
    differ = {
        a.name
        for a, b in zip(with_feedback.tensors, without.tensors, strict=True)
        if not np.array_equal(a.data, b.data)
    }
    # a row of 256 weights is one block of IQ3_XXS: there is no later one
    matrices = [t for layer in fed.prepared.job.source.spec.layer_matrices for t in layer]
    types = fed.prepared.plan.types
    assert differ == {t.name for t in matrices if types[t.name] == "Q2_K" or t.shape[1] > 256} | {"token_embd.weight"}


def test_file_holds_what_the_layers_were_run_with(
    tiny_model: Path, fed: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    assigned: dict[str, torch.Tensor] = {}
    original = LayerModel.assign

    def assign(layer: LayerModel, module: str, weight: torch.Tensor) -> None:
        original(layer, module, weight)
        assigned[layer.tensors[module].name] = layer.weight(module).clone()

    monkeypatch.setattr(LayerModel, "assign", assign)
    source = ModelDirectory(tiny_model)
    prepared = fed.prepared
    tokens = tokenize([CalibrationText("some words to run on " * 400, "test")], load_source_tokenizer(tiny_model), 512)
    written = {}
    for rows in FeedbackPass(source, prepared.plan, tokens, prepared.measured.importance, ComputeOptions()).encoded():
        quant_type = QUANT_TYPES[prepared.plan.types[rows.tensor.name]]
        written[rows.tensor.name] = (rows, ggml.dequantize(rows.data, quant_type))
    assert assigned.keys() == {t.name for layer in source.spec.layer_matrices for t in layer}
    for name, weight in assigned.items():
        rows, values = written[name]
        expected = weight.numpy()
        if rows.tensor.row_order is not None:
            expected = expected[rows.tensor.row_order.in_source]
        assert np.array_equal(values, expected), name


def test_layers_see_what_the_quantised_layers_before_them_make(
    tiny_model: Path, fed: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's moments are those of a whole model of the file's own weights up to that layer.

    Those of the embedding, which is the output matrix too, are of the intact model.
    """
    seen: list[torch.Tensor] = []
    original = error_feedback.coupling

    def coupling(moments: torch.Tensor, damping: float = error_feedback.DAMPING) -> error_feedback.Coupling:
        seen.append(moments.clone())
        return original(moments, damping)

    monkeypatch.setattr(error_feedback, "coupling", coupling)
    source, prepared = ModelDirectory(tiny_model), fed.prepared
    tokens = tokenize([CalibrationText("some words to run on " * 400, "test")], load_source_tokenizer(tiny_model), 512)
    exact = ComputeOptions(in_float32=True)
    feedback = FeedbackPass(source, prepared.plan, tokens, prepared.measured.importance, exact)
    parts: dict[str, list[npt.NDArray[np.float32]]] = {}
    for rows in feedback.encoded():
        decoded = ggml.dequantize(rows.data, QUANT_TYPES[prepared.plan.types[rows.tensor.name]])
        parts.setdefault(rows.tensor.name, []).append(decoded)
    written = {name: np.concatenate(of_tensor) for name, of_tensor in parts.items()}
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        x = model.model(torch.from_numpy(tokens.ids))[0].reshape(-1, 256)
    of_output = x.T @ x / len(x)
    state = model.state_dict()
    for tensor in source.spec.tensors:
        if tensor.layer in (None, 0) and tensor.is_matrix:
            values = written[tensor.name]
            if tensor.row_order is not None:
                back = np.empty_like(values)
                back[tensor.row_order.in_source] = values
                values = back
            state[str(tensor.source_name)].copy_(torch.from_numpy(values))  # tied embeddings share their storage
    inputs: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _m, x, _y: inputs.append(x[0]))
    with torch.inference_mode():
        model(torch.from_numpy(tokens.ids))
    x = inputs[0].reshape(-1, 256)
    torch.testing.assert_close(seen.pop(0), of_output, rtol=1e-3, atol=1e-4)
    per_layer = len(seen) // source.spec.n_layers
    torch.testing.assert_close(seen[per_layer], x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_block_errors_are_told_for_each_layer(fed: Conversion) -> None:
    errors = fed.to_json()["block_errors"]
    assert len(errors) == 3
    assert all(0 < e < 1 for e in errors)


def test_same_input_gives_the_same_bytes(
    fed: Conversion, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    again = converted(tiny_model, tmp_path / "again.gguf", calibration_text)
    assert again.output.read_bytes() == fed.output.read_bytes()


def test_untied_output_and_biases(calibration_text: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", tie_word_embeddings=False, attention_bias=True)
    done = converted(path, tmp_path / "a.gguf", calibration_text, types="Q3_K,Q2_K")
    assert len(done.block_errors) == 3
    assert np.isfinite(np.concatenate([v.ravel() for v in decoded(done.output).values()])).all()


def test_nothing_to_feed_back_in_plain_numbers(tiny_model: Path, tmp_path: Path, run_cli: RunCli) -> None:
    done = run_cli(
        "convert", tiny_model, "--bits", 16, "--types", "F16", "--error-feedback", "-q", "-o", tmp_path / "a.gguf",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["lieq.refine"].contents() == "none"


def test_cost_is_told_before_it_starts(
    run_cli: RunCli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    done = run_cli(
        "convert",
        tiny_model,
        "--bits",
        2.7,
        "--calibration",
        calibration_text,
        "--n-tokens",
        512,
        "-o",
        tmp_path / "a.gguf",
    )
    assert done.exit_code == 0, done.stderr
    assert "error feedback takes about" in done.stderr


@pytest.mark.parametrize("name", ["gemma4", "qwen35", "granite-h-moe"])
def test_its_time_is_estimated_before_anything_is_embedded(name: str, calibration_text: Path, tmp_path: Path) -> None:
    model = TINY_MODELS[name].write(tmp_path / "model")
    plan = planned(request_of(model, 4.5, None, "Q4_0", on_text(calibration_text, 256))).plan
    source = ModelDirectory(model)
    tokens = tokenize([CalibrationText("Some words. " * 200, "words")], source.load_tokenizer(), 256)
    assert FeedbackPass(source, plan, tokens, None, ComputeOptions(n_threads=2)).expected_seconds() > 0


ADDED = {
    "llama": {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0},
    "granite": {"self_attn.o_proj": 0.3, "mlp.down_proj": 0.3},
    "gemma3": {},  # a norm follows
    "falcon-h1": {"mamba.out_proj": 1.0, "self_attn.o_proj": 1.0, "feed_forward.down_proj": 1.0},
    "qwen3moe": {"self_attn.o_proj": 1.0, "mlp.experts": 1.0},
    "nemotron-3-super": {"mixer.out_proj": 1.0},
}


@pytest.mark.parametrize("name", list(ADDED))
def test_modules_that_add_to_the_hidden_states_are_found(name: str, tmp_path: Path) -> None:
    source = ModelDirectory(TINY_MODELS[name].write(tmp_path / "model"))
    layer = LayerModel.of(source, ComputeOptions(n_threads=2))
    states = layer.embed(source, np.arange(48).reshape(2, 24))
    layer.load(source, 0)
    with torch.no_grad():
        assert additions(layer, states) == pytest.approx(ADDED[name], rel=1e-3)


def test_states_behind_attention_are_those_before_the_feed_forward_network(tiny_model: Path) -> None:
    source = ModelDirectory(tiny_model)
    layer = LayerModel.of(source, ComputeOptions(n_threads=2, in_float32=True))
    states = layer.embed(source, np.arange(48).reshape(2, 24))
    layer.load(source, 0)
    seen: list[torch.Tensor] = []
    norm = layer.layer.get_submodule("post_attention_layernorm")
    with torch.no_grad():
        added = additions(layer, states)
        norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        with states_behind(added, layer) as behind:
            output = layer.forward(states)
    found = behind(output)
    torch.testing.assert_close(found["self_attn.o_proj"], seen[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["mlp.down_proj"], output)


def test_what_earlier_layers_lack_is_partly_made_good(
    tiny_model: Path, fed: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states behind the last layer are closer to the intact model's."""
    prepared, errors = fed.prepared, {}
    tokens = tokenize([CalibrationText("some words to run on " * 400, "test")], load_source_tokenizer(tiny_model), 2048)
    exact = ComputeOptions(n_threads=2, in_float32=True)
    for share in (0.0, 0.5):
        monkeypatch.setattr(moved_weights, "_SHARE_MADE_GOOD", share)
        feedback = FeedbackPass(ModelDirectory(tiny_model), prepared.plan, tokens, prepared.measured.importance, exact)
        for _ in feedback.encoded():
            pass
        errors[share] = feedback.block_errors
    assert errors[0.5][-1] < 0.95 * errors[0.0][-1]


def test_moments_of_the_measuring_pass_give_the_same_embedding(tiny_model: Path, fed: Conversion) -> None:
    """So the bytes do not depend on what is in the cache, which has no moments."""
    source, prepared, compute = ModelDirectory(tiny_model), fed.prepared, ComputeOptions(n_threads=2)
    text = CalibrationText("some words to run on " * 2000, "test")
    tokens = tokenize([text], load_source_tokenizer(tiny_model), 4096)
    known = run_pass(source, tokens, PassOptions(frozenset(), compute=compute, output_moments=True)).output_moments
    assert known is not None
    first = []
    for moments in (None, known):
        feedback = FeedbackPass(source, prepared.plan, tokens, prepared.measured.importance, compute, moments)
        rows = next(feedback.encoded())
        assert rows.tensor is source.spec.embedding
        first.append(rows.data)
    np.testing.assert_array_equal(first[0], first[1])

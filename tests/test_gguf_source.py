"""GGUF files as source: the same model as the directory they were made from, whatever the family."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.command import RunCli
from support.families import TINY_MODELS
from support.gguf_files import as_architecture, rewrite, split, with_unheard_of_value
from support.models import write_model
from support.requests import convert_plainly, measured, on_text, request_of
from support.tolerances import F16_PRODUCT, F16_SUMS, FLOAT32_LOGITS, assert_logits_close

from lieq_gguf import pipeline
from lieq_gguf.allocation.allocate import allocate
from lieq_gguf.allocation.build import build_problem
from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.errors import FormatError, OutputError, QuantizationError, SourceError, TokenizerError
from lieq_gguf.evaluation.inspection import inspect
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.gguf_header import HeaderWriter, TensorLayout, write_gguf
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.native import ggml, graph
from lieq_gguf.native.llama_cpp import LoadedModel, open_model
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import QUANT_TYPES, parse_types
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.options import ComputeOptions, SourceOptions, WritingOptions
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.request import Request
from lieq_gguf.sources import open_source
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.source import Source
from lieq_gguf.writing.writer import encode_tensors

SILENT = Progress(silent=True)


@pytest.fixture(scope="session")
def f16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights F16 holds exactly, with an initialiser of its own; read-only."""
    return write_model(tmp_path_factory.mktemp("f16") / "small", dtype=torch.float16, initializer_range=0.05)


@pytest.fixture(scope="session")
def f16_file(f16_model: Path) -> Path:
    """The same as a GGUF file; read-only."""
    return convert_plainly(f16_model, f16_model.parent / "small.gguf")


def logits(source: Source, ids: torch.Tensor) -> torch.Tensor:
    """What the streamed pass gives."""
    layer = LayerModel(source.transformers_config(), torch.device("cpu"))
    tensors = {t.name: t for t in source.spec.tensors}
    with torch.inference_mode():
        hidden = layer.embed(source, ids.numpy())
        for index in range(source.spec.n_layers):
            layer.load(source, index)
            hidden = layer.forward(hidden)
        matrix = source.read(tensors.get("output.weight", source.spec.embedding))
        return layer.output_head(source, matrix).logits(hidden)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_file_is_the_model_it_was_made_from(name: str, tmp_path: Path) -> None:
    directory = TINY_MODELS[name].write(tmp_path / "model", torch.float16)
    # weights of F16 times a factor are no longer F16's
    file = convert_plainly(directory, tmp_path / "model.gguf", "F32" if name.startswith("falcon") else "F16")
    expected, found = ModelDirectory(directory), open_source(file)
    assert isinstance(found, GgufSource)
    assert found.why_not_supported == ""
    assert found.spec.tensors == expected.spec.tensors
    assert (found.spec.n_weights, found.spec.has_tied_embeddings) == (
        expected.spec.n_weights,
        expected.spec.has_tied_embeddings,
    )
    # longer than the windows and the short contexts of these models
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, expected.spec.embedding.shape[0], (2, 300)))
    assert_logits_close(logits(found, ids), logits(expected, ids), FLOAT32_LOGITS)


@pytest.mark.parametrize("type_name", ["F16", "BF16", "F32"])
def test_rows_are_those_of_the_file_and_weights_those_of_the_model(
    type_name: str, f16_model: Path, tmp_path: Path
) -> None:
    directory, file = ModelDirectory(f16_model), GgufSource(convert_plainly(f16_model, tmp_path / "m.gguf", type_name))
    for tensor in file.spec.tensors:
        original = directory.read(tensor).float()
        if type_name == "BF16" and tensor.is_matrix:
            original = original.bfloat16().float()
        assert torch.equal(file.read(tensor).float(), original), tensor.name
        stored = next(t for t in GgufFile(file.path).tensors if t.spec.name == tensor.name)
        found = np.concatenate(list(file.rows(tensor)))
        assert np.array_equal(found, ggml.dequantize(stored.data, stored.quant_type)), tensor.name


def test_scores_plan_and_file_are_those_of_the_directory(
    f16_model: Path, f16_file: Path, calibration_text: Path, tmp_path: Path
) -> None:
    made = {
        source: pipeline.convert(
            request_of(source, 3.4, tmp_path / f"{source.name}.out", "Q2_K,Q3_K,Q4_K", on_text(calibration_text, 512))
        )
        for source in (f16_model, f16_file)
    }
    expected, found = (made[source].prepared for source in (f16_model, f16_file))
    assert found.plan.types == expected.plan.types
    assert found.plan.layer_scores == pytest.approx(expected.plan.layer_scores, rel=1e-5)
    assert found.plan.error_feedback
    # the same header, so every byte of the tensors as well
    assert made[f16_file].output.read_bytes() == made[f16_model].output.read_bytes()


def without_initializer_range(file: Path, target: Path) -> Path:
    """The file as llama.cpp's converter writes it: there is no key for what the twin is drawn with."""

    def change(values: dict[str, Any]) -> None:
        values["lieq.initializer_range"] = None

    return rewrite(file, target, change)


def test_the_twin_is_drawn_as_the_directory_says(
    f16_model: Path, f16_file: Path, calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """By a file of ours, which tells, and by a converter's with the option; without it, other scores are the same."""
    options = on_text(calibration_text, 512)
    types, converters = parse_types(["Q3_K"]), without_initializer_range(f16_file, tmp_path / "plain.gguf")

    def scores_of(path: Path, initializer_range: float | None = None) -> LayerScores:
        source = open_source(path, SourceOptions(initializer_range=initializer_range))
        scores = measured(source, types, options).scores
        assert scores is not None
        return scores

    expected = scores_of(f16_model)
    for found in (scores_of(f16_file), scores_of(converters, 0.05)):
        for name, scores in expected.by_scorer.items():
            assert found.by_scorer[name] == pytest.approx(scores, rel=1e-5), name
    untold = scores_of(converters)
    for name, scores in expected.by_scorer.items():
        is_same = untold.by_scorer[name] == pytest.approx(scores, rel=1e-5)
        assert is_same == (name not in ("lieq", "lieq-qkv", "energy-gain")), name
    assert untold.type_errors == expected.type_errors
    note, few = "does not store initializer_range", ("--calibration", calibration_text, "--n-tokens", 64)
    assert note in run_cli("score", converters, *few).stderr
    assert note not in run_cli("score", converters, *few, "--initializer-range", 0.05).stderr
    assert note not in run_cli("score", f16_file, *few).stderr
    assert note not in run_cli("imatrix", converters, *few, "-o", tmp_path / "imatrix.gguf").stderr


def test_initializer_range_is_refused_where_it_is_known_or_useless(
    f16_model: Path, f16_file: Path, run_cli: RunCli
) -> None:
    cases = {f16_model: "a model directory has", f16_file: "has initializer_range 0.05"}
    for path, words in cases.items():
        done = run_cli("plan", path, "--bits", 16, "--types", "F16", "--initializer-range", 0.02)
        assert (done.exit_code, done.stdout) == (1, "")
        assert words in done.stderr
        assert "leave out --initializer-range" in done.stderr


def test_an_initializer_range_that_is_no_number_is_refused(f16_file: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["lieq.initializer_range"] = "x"

    with pytest.raises(FormatError, match="initializer_range 'x'; expected a number"):
        open_source(rewrite(f16_file, tmp_path / "damaged.gguf", change))


def test_metadata_is_kept_value_by_value(f16_file: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["general.tags"] = ["one", "two"]
        values["some.unheard.of"] = 1.5
        values["tokenizer.chat_template"] = "{{ messages }}"
        values["general.alignment"] = None
        values["split.count"] = None
        values["quantize.imatrix.file"] = "old.dat"

    source = rewrite(f16_file, tmp_path / "source.gguf", change)
    output = convert_plainly(source, tmp_path / "output.gguf")
    before, after = GgufFile(source), GgufFile(output)
    own = ("general.file_type", "general.quantization_version", "general.alignment")
    kept = [key for key in before.keys if key not in own and not key.startswith(("quantize.", "lieq."))]
    assert "some.unheard.of" in kept
    assert [key for key in after.keys if key in kept] == kept
    for key in kept:
        assert after.value_bytes(key) == before.value_bytes(key), key
    added = set(after.keys) - set(kept)
    assert all(key in own or key.startswith("lieq.") for key in added)
    assert [t.spec.name for t in after.tensors] == [t.spec.name for t in before.tensors]


def test_a_value_nobody_reads_leaves_the_pass_to_llama_cpp(f16_file: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["llama.attention.clamp_kqv"] = 1.0

    source = GgufSource(rewrite(f16_file, tmp_path / "odd.gguf", change))
    assert not source.has_transformers_model
    assert "attention.clamp_kqv" in source.why_not_supported
    with pytest.raises(SourceError, match="cannot be run by transformers"):
        source.transformers_config()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", "x"),
        ("llama.context_length", [1, 2]),
        ("llama.attention.head_count", 2.5),
        ("llama.attention.head_count_kv", [1, -1]),
        ("llama.embedding_length", True),
        ("split.count", "x"),
    ],
)
def test_what_counts_nothing_is_refused(f16_file: Path, tmp_path: Path, key: str, value: object) -> None:
    def change(values: dict[str, Any]) -> None:
        values[key] = value

    damaged = rewrite(f16_file, tmp_path / "damaged.gguf", change)
    for read in (open_source, inspect):
        with pytest.raises(FormatError, match=f"{re.escape(key)} is .*expected a whole number"):
            read(damaged)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 2**30, "block_count is 1073741824, but found 3 layers"),
        ("llama.attention.head_count", 0, "attention.head_count is 0"),
        ("llama.rope.freq_base", "x", "rope.freq_base is 'x'"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
    ],
)
def test_what_transformers_cannot_have_leaves_the_pass_to_llama_cpp(
    f16_file: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    def change(values: dict[str, Any]) -> None:
        values[key] = value

    source = GgufSource(rewrite(f16_file, tmp_path / "odd.gguf", change))
    assert not source.has_transformers_model
    assert words in source.why_not_supported


def test_layers_come_one_after_the_other(f16_file: Path, tmp_path: Path) -> None:
    """The converter of llama.cpp writes them in the order of their names, 10 before 2."""
    names = [t.spec.name for t in GgufFile(f16_file).tensors]
    rewrite(f16_file, tmp_path / "shuffled.gguf", order=lambda name: (not name.startswith("blk.2"), names.index(name)))
    found = GgufSource(tmp_path / "shuffled.gguf")
    layers = [t.layer for t in found.spec.tensors if t.layer is not None]
    assert layers == sorted(layers)
    assert {t.name for t in found.spec.tensors} == set(names)
    expected = GgufSource(f16_file)
    for tensor in found.spec.tensors:
        assert torch.equal(found.read(tensor), expected.read(tensor))


def test_a_tensor_between_those_of_a_layer_goes_behind(f16_file: Path, tmp_path: Path) -> None:
    names = [t.spec.name for t in GgufFile(f16_file).tensors]
    place = names.index("blk.1.attn_k.weight")
    file = rewrite(
        f16_file,
        tmp_path / "between.gguf",
        order=lambda name: place + 0.5 if name == "output_norm.weight" else names.index(name),
    )
    layers = [t.layer for t in GgufSource(file).spec.tensors]
    assert [layer for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer] == [None, 0, 1, 2, None]


def test_the_output_matrix_may_come_first(tmp_path: Path, calibration_text: Path) -> None:
    model = TINY_MODELS["llama"].write(tmp_path / "llama", dtype=torch.float16)
    file = convert_plainly(model, tmp_path / "f16.gguf")
    turned = rewrite(file, tmp_path / "turned.gguf", order=lambda name: name != "output.weight")
    options = on_text(calibration_text, 256)
    types = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"])
    scores = [measured(GgufSource(f), types, options).scores for f in (file, turned)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[0].sensitivities == scores[1].sensitivities


def test_quantised_source(conversion: pipeline.Conversion, tmp_path: Path, run_cli: RunCli) -> None:
    output = tmp_path / "out.gguf"
    for command in (
        ("convert", "--bits", 3, "-o", output),
        ("plan", "--bits", 3),
        ("score",),
        ("imatrix", "-o", output),
    ):
        refused = run_cli(command[0], conversion.output, *command[1:])
        assert refused.exit_code == 1
        assert refused.stderr.count("\n") == 1
        assert "Q2_K" in refused.stderr
        assert "--allow-requantize" in refused.stderr
    options = ("--bits", 3, "--types", "Q2_K,Q3_K,Q4_K", "--no-imatrix", "--method", "zd", "-q")
    made = run_cli("convert", conversion.output, "-o", output, *options, "--allow-requantize", "--n-tokens", 64)
    assert made.exit_code == 0, made.stderr
    bpw = conversion.prepared.header.meter.layer_bpw
    assert f"{bpw:.2f} bits per weight" in made.stderr
    assert "errors add" in made.stderr
    assert GgufFile(output).bit_meter().layer_bpw <= 3


def test_parts_are_one_model(f16_file: Path, tmp_path: Path) -> None:
    parts = split(f16_file, tmp_path, 3)
    whole, found = GgufSource(f16_file), GgufSource(parts[0])
    assert found.spec.name == "whole"
    assert found.has_transformers_model
    assert set(found.spec.tensors) == set(whole.spec.tensors)
    for tensor in whole.spec.tensors:
        assert torch.equal(found.read(tensor), whole.read(tensor))
    text = "Parts of one model."
    assert found.load_tokenizer().encode(text, True) == whole.load_tokenizer().encode(text, True)
    output = convert_plainly(parts[0], tmp_path / "joined.gguf")
    assert not any(key.startswith("split.") for key in GgufFile(output).keys)


def test_parts_that_are_not_all_there(f16_file: Path, tmp_path: Path) -> None:
    parts = split(f16_file, tmp_path, 2)
    with pytest.raises(SourceError, match=f"part 00002 of 2; give the first, {parts[0].name}"):
        GgufSource(parts[1])
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(SourceError, match="but its name is not"):
        GgufSource(renamed)
    parts[1].unlink()
    with pytest.raises(SourceError, match=f"{parts[1].name} is missing"):
        GgufSource(parts[0])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(SourceError, match="expected 1 of 2"):
        GgufSource(parts[0])


@pytest.mark.parametrize(
    ("changes", "keep", "words"),
    [
        ({"general.type": "adapter"}, None, "of type 'adapter'"),
        ({"general.type": "imatrix"}, None, "of type 'imatrix'"),
        ({"general.type": "mmproj"}, None, "of type 'mmproj'"),
        ({"general.architecture": "clip"}, None, "vision or audio part"),
        ({}, "", "a vocabulary without weights"),
        ({}, "token_embd", "without decoder layers"),
        ({}, "blk.", "without a token embedding"),
    ],
)
def test_what_is_no_language_model_is_refused_in_a_line(
    changes: dict[str, str], keep: str | None, words: str, f16_file: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    file = rewrite(
        f16_file,
        tmp_path / "other.gguf",
        lambda values: values.update(changes),
        lambda name: keep is None or (keep != "" and name.startswith(keep)),
    )
    refused = run_cli("convert", file, "--bits", 4, "-o", tmp_path / "out.gguf")
    assert refused.exit_code == 1
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


def test_a_damaged_file_and_wrong_wishes(f16_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(f16_file.read_bytes()[:-5000])
    with pytest.raises(FormatError, match="not a complete GGUF"):
        open_source(cut)
    with pytest.raises(TokenizerError, match="leave out --pre-tokenizer"):
        GgufSource(f16_file).read_metadata("qwen2")
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(f16_file.read_bytes())
    with pytest.raises(OutputError, match="is the model to read"):
        pipeline.convert(Request(str(copy), BitBudget("bits", 16), writing=WritingOptions(copy, force=True)))
    assert copy.read_bytes() == f16_file.read_bytes()


def test_fingerprints_tell_models_and_tokenizers_apart(f16_file: Path, tmp_path: Path) -> None:
    def scaled(name: str, weights: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
        is_vector = "norm" in name
        changed = weights * np.float32(1.5) if name == "blk.1.attn_k.weight" else weights
        return (changed, 0) if is_vector else (changed.astype(np.float16), 1)

    first = GgufSource(f16_file)
    other_weights = GgufSource(rewrite(f16_file, tmp_path / "a.gguf", convert=scaled))
    other_template = GgufSource(
        rewrite(f16_file, tmp_path / "b.gguf", lambda values: values.update({"tokenizer.chat_template": "x"}))
    )
    other_name = GgufSource(rewrite(f16_file, tmp_path / "c.gguf", lambda values: values.update({"general.name": "x"})))
    assert other_weights.fingerprint != first.fingerprint == other_template.fingerprint == other_name.fingerprint
    assert other_template.tokenizer_fingerprint != first.tokenizer_fingerprint == other_name.tokenizer_fingerprint


def test_special_tokens_are_found_in_a_text(f16_model: Path, f16_file: Path) -> None:
    expected, found = ModelDirectory(f16_model).load_tokenizer(), GgufSource(f16_file).load_tokenizer()
    assert found.added_tokens == expected.added_tokens
    assert found.vocab_size == expected.vocab_size
    for text in ("a<|im_start|>b", "12 345", "naïve"):
        assert found.encode(text, False) == expected.encode(text, False)
        assert [found.piece(i) for i in found.encode(text, False)] == [
            expected.piece(i) for i in expected.encode(text, False)
        ]


def test_plan_has_the_name_of_the_file(f16_file: Path, tmp_path: Path, run_cli: RunCli) -> None:
    plan = tmp_path / "plan.json"
    made = run_cli("plan", f16_file, "--bits", 16, "--types", "F16", "-o", plan, "-q")
    assert made.exit_code == 0, made.stderr
    assert json.loads(plan.read_text())["model"] == "small"


@pytest.fixture(scope="session")
def gemma_file(f16_file: Path) -> Path:
    """An architecture that is none of ours: the first Gemma; read-only."""
    return rewrite(f16_file, f16_file.parent / "gemma.gguf", as_architecture("gemma"))


def test_llama_cpp_sees_the_inputs_that_transformers_sees(
    f16_file: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """The same Llama in both, one of them as a file with a value that nobody knows."""
    odd = GgufSource(rewrite(f16_file, tmp_path / "odd.gguf", with_unheard_of_value))
    assert not odd.has_transformers_model
    options, exact = on_text(calibration_text, 1024), ComputeOptions(n_threads=2, in_float32=True)
    types = parse_types(["Q3_K", "Q4_K"])
    expected, found = (measured(source, types, options, exact) for source in (GgufSource(f16_file), odd))
    assert expected.importance is not None and found.importance is not None
    assert expected.scores is not None and found.scores is not None
    assert found.importance.n_tokens == expected.importance.n_tokens
    assert found.importance.in_sum2.keys() == expected.importance.in_sum2.keys()
    for name, sums in expected.importance.in_sum2.items():
        assert np.abs(found.importance.in_sum2[name] - sums).sum() < F16_SUMS * sums.sum(), name
    assert found.scores.by_scorer.keys() == {"zd", "lim"}
    assert found.scores.by_scorer["zd"] == pytest.approx(expected.scores.by_scorer["zd"], abs=1e-12)
    assert found.scores.by_scorer["lim"] == pytest.approx(expected.scores.by_scorer["lim"], abs=1e-3)
    for name, errors in found.scores.type_errors.items():
        assert errors == pytest.approx({q: expected.scores.type_errors[name][q] for q in errors}, rel=0.15, abs=1e-3), (
            name
        )


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "gemma4", "ministral3", "granite-h", "falcon-h1"])
def test_importance_of_other_mixers_is_llama_cpps(name: str, calibration_text: Path, tmp_path: Path) -> None:
    """Also in the order of the file's columns, and of the tokens that share keys and values with earlier layers."""
    file = convert_plainly(TINY_MODELS[name].write(tmp_path / "model", torch.float16), tmp_path / "model.gguf")
    key = f"{TINY_MODELS[name].family}.unheard_of"
    odd = GgufSource(rewrite(file, tmp_path / "odd.gguf", lambda values: values.update({key: 1})))
    assert not odd.has_transformers_model
    options, exact = on_text(calibration_text, 512), ComputeOptions(n_threads=2, in_float32=True)
    expected, found = (measured(s, (), options, exact, scores=False).importance for s in (GgufSource(file), odd))
    assert expected is not None and found is not None
    assert found.in_sum2.keys() == expected.in_sum2.keys()
    for matrix, sums in expected.in_sum2.items():
        assert np.abs(found.in_sum2[matrix] - sums).sum() < 0.01 * sums.sum(), matrix


def test_unknown_architecture_is_planned_and_written(
    gemma_file: Path, calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    output, plan = tmp_path / "out.gguf", tmp_path / "plan.json"
    options = ("--bits", 3.4, "--calibration", calibration_text, "--n-tokens", 512, "-q")
    made = run_cli("convert", gemma_file, "-o", output, *options)
    assert made.exit_code == 0, made.stderr
    assert "the architecture gemma has no forward pass" in made.stderr
    before, after = GgufFile(gemma_file), GgufFile(output)
    assert 0.99 * 3.4 <= after.bit_meter().layer_bpw <= 3.4
    assert {before.value(key) == after.value(key) for key in before.keys if key.startswith("gemma.")} == {True}
    assert after.value("lieq.method") == "weighted-error"
    assert after.value("lieq.refine") == "none"
    assert {t.quant_type.name for t in after.tensors if "norm" in t.spec.name} == {"F32"}
    # the cheaper types are where the weighted error of the plan says
    assert run_cli("plan", gemma_file, "-o", plan, *options).exit_code == 0
    assert json.loads(plan.read_text())["types"] == after.types


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("convert", "--bits", 3, "--error-feedback"), "--no-error-feedback"),
        (("plan", "--bits", 3, "--layer-score", "lieq"), "expected zd or lim"),
        (("plan", "--bits", 3, "--method", "block-error"), "expected --method weighted-error, lim or zd"),
        (("plan", "--bits", 3, "--method", "lieq"), "expected --method weighted-error, lim or zd"),
        (("score", "--layer-score", "energy-gain"), "expected zd or lim"),
        (("imatrix", "--device", "meta", "-o", "x.gguf"), "leave out --device meta"),
    ],
)
def test_what_llama_cpp_cannot_give_is_refused_before_it_runs(
    command: tuple[object, ...], words: str, gemma_file: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "run", None)
    refused = run_cli(command[0], gemma_file, *command[1:], "-q")
    assert refused.exit_code == 1
    assert words in refused.stderr.splitlines()[-1]


def test_scores_of_an_unknown_architecture_take_no_pass_again(
    gemma_file: Path, calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    options = ("--calibration", calibration_text, "--n-tokens", 512, "-q", "--types", "Q2_K,Q3_K,Q4_K")
    scores, imatrix = tmp_path / "scores.json", tmp_path / "imatrix.gguf"
    assert run_cli("score", gemma_file, "-o", scores, *options).exit_code == 0
    assert run_cli("imatrix", gemma_file, "-o", imatrix, *options[:-2]).exit_code == 0
    spec = GgufSource(gemma_file).spec
    of_layers = {t.name for layer in spec.layer_matrices for t in layer}
    assert load_importance(imatrix).in_sum2.keys() == of_layers | {spec.output_matrix.name}
    for method in ("weighted-error", "lim", "zd", "lieq-ladder --layer-score lim"):
        wanted = ("--bits", 3.4, "--method", *method.split(), "--types", "Q2_K,Q4_K", "--scores-file", scores)
        made = run_cli("plan", gemma_file, *wanted, "-q", "--json")
        assert made.exit_code == 0, made.stderr
        assert json.loads(made.stdout)["layer_bpw"] <= 3.4


def test_what_llama_quantize_leaves_alone_keeps_type_and_bytes(tmp_path: Path) -> None:
    """Also where the type is one that cannot be made without an importance matrix."""
    rows = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    router = ggml.quantize(rows, QUANT_TYPES["IQ2_XXS"], np.ones(256, dtype=np.float32))
    writer = gguf.GGUFWriter(None, "gemma")
    writer.add_tensor("token_embd.weight", np.ones((8, 256), dtype=np.float16))
    writer.add_tensor("blk.0.ffn_gate_inp.weight", router, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.add_tensor("blk.0.ssm_a", np.ones((3, 256), dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 256), dtype=np.float16))
    writer.add_tensor("position_embd.weight", np.ones((4, 256), dtype=np.float16))
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "m.gguf", SourceOptions(allow_requantize=True))
    tensors = {t.name: t for t in source.spec.tensors}
    assert {name for name, t in tensors.items() if t.is_matrix} == {"token_embd.weight", "blk.0.attn_q.weight"}
    assert [tensors[n].fixed_type for n in ("blk.0.ffn_gate_inp.weight", "blk.0.ssm_a", "position_embd.weight")] == [
        "IQ2_XXS", "F32", "F16",
    ]  # fmt: skip
    options = AllocationOptions(types=parse_types(["Q2_K"]))
    plan = allocate(build_problem(source.spec, BitBudget("bits", 2.625), options), None)
    plan.check(source.spec)
    encoded = list(encode_tensors(source, [tensors["blk.0.ffn_gate_inp.weight"]], plan, None))
    assert np.array_equal(np.concatenate([rows.data for rows in encoded]), router)


def test_an_error_in_a_watcher_comes_out_of_llama_cpp(f16_file: Path) -> None:
    class Broken:
        n_calls = 0

        def wants(self, node: graph.Node) -> bool:
            return node.op == "MUL_MAT"

        def see(self, node: graph.Node) -> None:
            Broken.n_calls += 1
            raise ZeroDivisionError(node.name)

    with open_model(f16_file, n_ctx=16, watcher=Broken()) as model, pytest.raises(ZeroDivisionError):
        model.run([1, 2, 3])
    assert Broken.n_calls == 1


def test_nodes_are_read_as_numpy_computes_them(f16_file: Path) -> None:
    products: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    class Products:
        def wants(self, node: graph.Node) -> bool:
            weight = node.source(0)
            return node.op == "MUL_MAT" and weight is not None and weight.name.startswith("blk.")

        def see(self, node: graph.Node) -> None:
            weight, x = node.source(0), node.source(1)
            assert weight is not None and x is not None
            products.append((weight.name, x.read()[0, 0], node.read()[0, 0]))

    with open_model(f16_file, n_ctx=32, watcher=Products()) as model:
        model.run(list(range(20, 52)))
    source = GgufSource(f16_file)
    tensors = {t.name: t for t in source.spec.tensors}
    assert {name for name, _, _ in products} == {t.name for layer in source.spec.layer_matrices for t in layer}
    for name, x, output in products:
        expected = x @ np.concatenate(list(source.rows(tensors[name]))).T
        assert output == pytest.approx(expected, abs=F16_PRODUCT * float(np.abs(expected).max())), name


def test_tensors_of_another_layout_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inserted(ctypes.Structure):
        _fields_ = (("one_more", ctypes.c_int64), *graph._Tensor._fields_)

    graph._graph_functions.cache_clear()
    monkeypatch.setattr(graph, "_Tensor", Inserted)
    with pytest.raises(QuantizationError, match="has a tensor layout"):
        graph._graph_functions()
    graph._graph_functions.cache_clear()


def mixture(path: Path) -> Path:
    """A GGUF of two layers with four experts, two of which a token uses, by an architecture that is none of ours."""
    rng = np.random.default_rng(0)
    dense = GgufFile(path.parent / "dense.gguf")
    writer = HeaderWriter("llama")
    for key in dense.keys:
        if key != "general.architecture":
            writer.values[key] = dense.value_bytes(key)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    tensors = []

    def add(name: str, weights: np.ndarray[Any, Any]) -> None:
        kind = QUANT_TYPES["F32" if weights.dtype == np.float32 else "F16"].ggml_id
        tensors.append((TensorLayout(name, weights.shape, kind, weights.nbytes), weights))

    for t in dense.tensors:
        name, dtype = t.spec.name, np.float32 if t.quant_type.name == "F32" else np.float16
        weights = t.data.view(dtype).reshape(t.spec.shape)
        if ".ffn_" not in name or "norm" in name:
            add(name, weights)
            continue
        experts = np.stack([weights.astype(np.float16) * scale for scale in rng.uniform(0.5, 2, 4).astype(np.float16)])
        add(name.replace(".weight", "_exps.weight"), experts)
        if "gate" in name:
            router = rng.normal(size=(4, weights.shape[1])).astype(np.float32)
            add(name.replace("ffn_gate", "ffn_gate_inp"), router)
    write_gguf(path, writer.values, tensors)
    return path


def test_experts_are_measured_one_by_one(
    f16_file: Path, calibration_text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    (tmp_path / "dense.gguf").write_bytes(f16_file.read_bytes())
    file, output = mixture(tmp_path / "experts.gguf"), tmp_path / "out.gguf"
    source = GgufSource(file)
    assert not source.has_transformers_model
    options = on_text(calibration_text, 512)
    importance = measured(source, (), options, scores=False).importance
    assert importance is not None
    gate, up = (importance.in_sum2[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    assert np.array_equal(gate, up)
    assert gate.shape == (4, 256)
    assert importance.counts["blk.1.ffn_down_exps.weight"].sum() == 2 * importance.n_tokens
    # what reaches the router reaches two experts, and it has just been normed
    norm = source.read(next(t for t in source.spec.tensors if t.name == "blk.1.ffn_norm.weight")).numpy()
    assert gate.sum() / importance.n_tokens == pytest.approx(2 * float((norm**2).sum()), rel=0.3)
    made = run_cli(
        "convert", file, "--bits", 3, "--calibration", calibration_text, "--n-tokens", 512, "-o", output, "-q"
    )
    assert made.exit_code == 0, made.stderr
    types = GgufFile(output).types
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.ffn_down_exps.weight"] not in ("F32", "F16")

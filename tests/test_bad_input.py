import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import RunCli, assert_refused
from support.models import write_model

from lieq_gguf import pipeline
from lieq_gguf.errors import SourceError, VerificationError
from lieq_gguf.formats.imatrix_file import save_importance
from lieq_gguf.records.scores import LayerScores

QUICK = ("--types", "Q4_K", "--bits", 4.5, "--no-imatrix", "-q")
Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for the output."""
    path = tmp_path / "output"
    path.mkdir()
    return path


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: two layers, narrower."""
    return write_model(tmp_path_factory.mktemp("models") / "small", num_hidden_layers=2, intermediate_size=256)


@pytest.fixture
def documents(conversion: pipeline.Conversion, tmp_path: Path) -> Path:
    """A folder with good scores.json, plan.json and imatrix.gguf of the tiny model."""
    path = tmp_path / "documents"
    path.mkdir()
    prepared = conversion.prepared
    assert prepared.measured.importance is not None
    prepared.plan.save(path / "plan.json", {})
    save_importance(prepared.measured.importance, path / "imatrix.gguf")
    errors = {t: {"Q2_K": 0.1, "Q4_K": 0.01} for t in prepared.measured.importance.in_sum2}
    by_scorer = {"lim": (0.3, 0.2, 0.1), "energy-gain": (0.3, 0.2, 0.1)}
    scores = LayerScores("tiny", 512, "text", 0, by_scorer, errors, dict.fromkeys(errors, 1.0))
    scores.save(path / "scores.json", "lim")
    return path


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def cut(file: Path, share: float = 0.5) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])


# The source


@pytest.mark.parametrize("command", ["convert", "plan", "score", "imatrix"])
def test_missing_source(run_cli: RunCli, folder: Path, command: str) -> None:
    bits = ("--bits", 4) if command in ("convert", "plan") else ()
    done = run_cli(command, folder / "no\nmodel", *bits, "-q", "-o", folder / "out")
    assert_refused(done, "does not exist; expected a model directory", folder)


def test_source_is_a_file(run_cli: RunCli, folder: Path, tiny_model: Path) -> None:
    done = run_cli("convert", tiny_model / "model.safetensors", *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, "is a file, but not a GGUF file; expected a model directory", folder)


def empty_folder(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def other_shape(model: Path) -> None:
    edit_weights(model, lambda w: w.update({"model.norm.weight": torch.ones(128)}))


def without_a_tensor(model: Path) -> None:
    edit_weights(model, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))


def nan_weight(model: Path) -> None:
    edit_weights(model, lambda w: w["model.layers.1.mlp.up_proj.weight"][5].fill_(torch.nan))


def integers(model: Path) -> None:
    edit_weights(model, lambda w: w.update({"model.norm.weight": torch.ones(256, dtype=torch.int8)}))


def config(**changes: Any) -> Change:
    return lambda model: edit_json(model / "config.json", **changes)


def without_key(key: str) -> Change:
    def change(model: Path) -> None:
        document = json.loads((model / "config.json").read_text())
        del document[key]
        (model / "config.json").write_text(json.dumps(document))

    return change


def config_text(content: bytes) -> Change:
    return lambda model: (model / "config.json").write_bytes(content)


def index_text(content: str) -> Change:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(content)

    return change


BAD_MODELS: dict[str, tuple[Change, str]] = {
    "empty folder": (empty_folder, "has no config.json"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds no weights; expected model.safetensors"),
    "only pickles": (only_pickles, "only pickled weights (pytorch_model.bin)"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
    "cut weights": (lambda m: cut(m / "model.safetensors"), "is damaged or incomplete"),
    "cut header": (lambda m: cut(m / "model.safetensors", 0.0001), "is damaged or incomplete"),
    "empty weights": (lambda m: cut(m / "model.safetensors", 0), "is damaged or incomplete (0 bytes"),
    "garbage weights": (lambda m: (m / "model.safetensors").write_bytes(bytes(range(256)) * 9), "is damaged"),
    "a tensor missing": (without_a_tensor, "has no tensor model.layers.1.mlp.up_proj.weight"),
    "another shape": (other_shape, "model.norm.weight in"),
    "integers": (integers, "is I8; expected BF16, F16, F32"),
    "NaN": (nan_weight, "blk.1.ffn_up.weight: the weights hold NaN"),
    "more layers": (config(num_hidden_layers=4), "has no tensor model.layers.3.input_layernorm.weight"),
    "another width": (config(intermediate_size=768), "by config.json expected (768, 256)"),
    "architecture": (config(architectures=["GPT2LMHeadModel"]), "unsupported architecture GPT2LMHeadModel, "),
    "architectures a number": (config(architectures=1), "unsupported architecture 1, "),
    "architectures of numbers": (config(architectures=[1]), "unsupported architecture 1, "),
    "too large a number": (config(max_position_embeddings=1 << 40), "cannot be stored in a GGUF header"),
    "no architecture": (config(architectures=None), "unsupported architecture model_type llama"),
    "quantised": (config(quantization_config={"quant_method": "hqq"}), "is quantised with hqq, which cannot be read"),
    "quantised, odd": (config(quantization_config="awq"), "config.json is 'awq'; expected an object"),
    "config cut": (lambda m: cut(m / "config.json"), "config.json cannot be read"),
    "config empty": (config_text(b""), "config.json cannot be read"),
    "config binary": (config_text(b"\xff\xfe\x00"), "config.json cannot be read"),
    "config a list": (config_text(b"[]"), "holds a list; expected a JSON object"),
    "config deep": (config_text(b"[" * 100_000), "config.json cannot be read"),
    "index empty": (index_text(""), "is damaged; expected a JSON object with a 'weight_map'"),
    "index a list": (index_text("[]"), "is damaged; expected a JSON object with a 'weight_map'"),
    "index without map": (index_text("{}"), "is damaged; expected a JSON object with a 'weight_map'"),
    "map a list": (index_text('{"weight_map": []}'), "is damaged; expected a JSON object with a 'weight_map'"),
    "no hidden_size": (without_key("hidden_size"), "has no 'hidden_size'"),
    "no intermediate_size": (without_key("intermediate_size"), "has no 'intermediate_size'"),
    "no vocab_size": (without_key("vocab_size"), "has no 'vocab_size'"),
    "no num_attention_heads": (without_key("num_attention_heads"), "has no 'num_attention_heads'"),
    "no num_hidden_layers": (without_key("num_hidden_layers"), "has no 'num_hidden_layers'"),
    "no rms_norm_eps": (without_key("rms_norm_eps"), "has no 'rms_norm_eps'"),
    "no max_position_embeddings": (without_key("max_position_embeddings"), "has no 'max_position_embeddings'"),
    "layers a text": (config(num_hidden_layers="3"), "num_hidden_layers"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "width nothing": (config(hidden_size=None), "hidden_size in config.json is None"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads in config.json is 0"),
    "rope a text": (config(rope_parameters="llama3"), "rope"),
    "rope without factor": (config(rope_parameters={"rope_type": "linear"}), "factor"),
    "llama3 without factor": (config(rope_parameters={"rope_type": "llama3"}), "factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(run_cli: RunCli, model: Path, folder: Path, name: str) -> None:
    damage, words = BAD_MODELS[name]
    damage(model)
    assert_refused(run_cli("convert", model, *QUICK, "-o", folder / "out.gguf"), words, folder)


@pytest.fixture
def sharded_model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "sharded", max_shard_size="1MB")


def a_shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[1]


def test_truncated_shard(run_cli: RunCli, sharded_model: Path, folder: Path) -> None:
    cut(a_shard(sharded_model))
    done = run_cli("convert", sharded_model, *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, f"{a_shard(sharded_model)} is damaged or incomplete", folder)


def test_shard_missing(run_cli: RunCli, sharded_model: Path, folder: Path) -> None:
    missing = a_shard(sharded_model)
    missing.unlink()
    done = run_cli("convert", sharded_model, *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, f"{missing.name} is missing", folder)


def test_tensor_missing_from_its_shard(run_cli: RunCli, sharded_model: Path, folder: Path) -> None:
    shard = a_shard(sharded_model)
    weights = load_file(shard)
    missing = next(iter(weights))
    del weights[missing]
    save_file(weights or {"other": torch.zeros(1)}, shard, metadata={"format": "pt"})
    done = run_cli("convert", sharded_model, *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, f"{shard} has no tensor {missing}", folder)


# The target of the bits


@pytest.mark.parametrize("command", ["convert", "plan"])
@pytest.mark.parametrize("bits", [2.6249, 4.51])
def test_bits_out_of_reach(run_cli: RunCli, tiny_model: Path, folder: Path, command: str, bits: float) -> None:
    done = run_cli(command, tiny_model, "--types", "Q2_K,Q4_K", "--bits", bits, "-q", "-o", folder / "out")
    assert_refused(done, f"--bits {bits} is out of reach: tiny can have 2.6250 to 4.5000 bits per weight", folder)


def test_nominal_bits_out_of_reach(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("convert", tiny_model, "--types", "Q2_K,Q4_K", "--bits", 1.9, "--nominal", "-q",
                   "-o", folder / "out")  # fmt: skip
    assert_refused(done, "tiny can have 2.0000 to 4.0000 bits per weight", folder)


def test_types_that_would_widen_the_range_are_named(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("convert", tiny_model, "--bits", 1.6, "-q", "-o", folder / "out")
    assert_refused(done, "--types allows smaller types, for example IQ1_S", folder)


def test_width_that_fits_no_k_type(run_cli: RunCli, tmp_path: Path, folder: Path) -> None:
    source = write_model(tmp_path / "model", hidden_size=320, num_attention_heads=5, num_key_value_heads=5)
    done = run_cli("convert", source, "--types", "Q2_K", "--bits", 3, "-q", "-o", folder / "out")
    assert_refused(done, "none of the types Q2_K fits rows of 320", folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--types", "IQ2_XXS,IQ2_XS", "--no-imatrix"), "all types you asked for (IQ2_XXS, IQ2_XS) need"),
        (
            ("--types", "Q4_K", "--no-imatrix", "--embedding-type", "IQ2_XXS"),
            "needs an importance matrix, which embedding",
        ),
        (("--device", "cuda:7"), "device 'cuda:7' cannot be used"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
        (("--pre-tokenizer", "none-such"), "none-such"),
    ],
)
def test_options_that_name_nothing(
    run_cli: RunCli, tiny_model: Path, folder: Path, options: tuple[str, ...], words: str
) -> None:
    done = run_cli("convert", tiny_model, "--bits", 4.5, *options, "-q", "-o", folder / "out.gguf")
    assert_refused(done, words, folder)


@pytest.mark.parametrize(
    ("option", "name"), [("--types", "Q9_K"), ("--embedding-type", ""), ("--output-type", "Q4_K_M")]
)
def test_a_name_that_is_no_type_is_wrong_usage(run_cli: RunCli, tiny_model: Path, option: str, name: str) -> None:
    done = run_cli("convert", tiny_model, "--bits", 4.5, option, name)
    assert done.exit_code == 2
    assert f"'{name}' is not a tensor type" in " ".join(done.stderr.replace("│", " ").split())


def test_one_matrix_cannot_have_two_types(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("convert", tiny_model, *QUICK, "--embedding-type", "Q4_0", "--output-type", "Q8_0",
                   "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, "cannot be both Q4_0 and Q8_0", folder)


@pytest.mark.parametrize("given", [("--seed", 3), ("--no-error-feedback", "--n-tokens", 512)])
def test_options_of_a_pass_that_is_not_made_are_refused(
    run_cli: RunCli, tiny_model: Path, given: tuple[object, ...]
) -> None:
    done = run_cli("convert", tiny_model, "--bits", 4.5, "--scores-file", "s.json", "--imatrix", "i.gguf", *given)
    assert done.exit_code == 2
    assert str(given[-2]) in done.stderr


@pytest.mark.parametrize("option", [("--n-tokens", 512), ("--calibration", "t.txt"), ("--float32",)])
def test_options_of_a_pass_that_the_plan_leaves_out_are_refused(
    run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path, option: tuple[object, ...]
) -> None:
    edited = json.loads((documents / "plan.json").read_text()) | {"refine": "none"}
    (documents / "plan.json").write_text(json.dumps(edited))
    done = run_cli("convert", tiny_model, "--plan", documents / "plan.json", "--imatrix", documents / "imatrix.gguf",
                   *option, "-o", folder / "out.gguf")  # fmt: skip
    assert done.exit_code == 2
    assert str(option[0]) in done.stderr
    assert not any(folder.iterdir())


@pytest.mark.parametrize("change", [{"attention_dropout": "x"}, {"use_cache": 3}])
def test_a_configuration_that_transformers_does_not_take(
    run_cli: RunCli, tmp_path: Path, folder: Path, change: dict[str, Any]
) -> None:
    model = write_model(tmp_path / "model")
    edit_json(model / "config.json", **change)
    done = run_cli("score", model, "--n-tokens", 64, "-q", "-o", folder / "scores.json")
    assert_refused(done, f"transformers cannot read {model / 'config.json'}: ", folder)


def test_a_model_card_that_cannot_be_parsed_stops_nothing(run_cli: RunCli, tmp_path: Path, folder: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "README.md").write_text("---\nname: a: b: c\n---\n", encoding="utf-8")
    done = run_cli("convert", model, *QUICK, "-o", folder / "out.gguf")
    assert done.exit_code == 0, done.stderr


def test_a_bias_that_the_configuration_denies(run_cli: RunCli, tmp_path: Path, folder: Path) -> None:
    model = write_model(tmp_path / "model", attention_bias=True)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"attention_bias": False}))
    done = run_cli("convert", model, *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, "attention_bias in config.json is not set", folder)


# The output


@pytest.mark.parametrize("command", ["convert", "plan", "score", "imatrix"])
def test_existing_output_stays_without_force(run_cli: RunCli, tiny_model: Path, folder: Path, command: str) -> None:
    output = folder / "precious"
    output.write_text("precious")
    options = QUICK if command in ("convert", "plan") else ("-q",)
    assert_refused(run_cli(command, tiny_model, *options, "-o", output), "exists already; choose another name")
    assert [p.name for p in folder.iterdir()] == ["precious"]
    assert output.read_text() == "precious"


def test_force_replaces_an_existing_output(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    output = folder / "old.gguf"
    output.write_text("old")
    assert run_cli("convert", tiny_model, *QUICK, "--force", "-o", output).exit_code == 0
    assert output.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("command", ["convert", "plan", "score", "imatrix"])
def test_output_in_a_missing_folder(run_cli: RunCli, tiny_model: Path, folder: Path, command: str) -> None:
    options = QUICK if command in ("convert", "plan") else ("-q",)
    done = run_cli(command, tiny_model, *options, "-o", folder / "missing" / "out")
    assert_refused(done, f"the folder {folder / 'missing'} does not exist", folder)


def test_output_below_a_file(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("convert", tiny_model, *QUICK, "-o", tiny_model / "config.json" / "out.gguf")
    assert_refused(done, "does not exist", folder)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write into")
def test_output_in_an_unwritable_folder(run_cli: RunCli, tiny_model: Path) -> None:
    assert_refused(run_cli("convert", tiny_model, *QUICK, "-o", "/proc/out.gguf"), "cannot write into /proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_output_in_a_folder_without_permission(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    folder.chmod(0o500)
    done = run_cli("convert", tiny_model, *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, f"cannot write into {folder}", folder)


def test_output_is_a_folder(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("convert", tiny_model, *QUICK, "--force", "-o", folder)
    assert_refused(done, f"{folder} is a folder; expected the name of a file", folder)


def test_output_name_too_long(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("convert", tiny_model, *QUICK, "-o", folder / ("n" * 256))
    assert_refused(done, "name too long", folder)


def test_longest_output_name(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    assert run_cli("convert", tiny_model, *QUICK, "-o", folder / ("n" * 255)).exit_code == 0
    assert [len(p.name) for p in folder.iterdir()] == [255]


def test_full_disk(run_cli: RunCli, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: Path, *_arguments: object) -> None:
        target.write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lieq_gguf.pipeline.write_file", fail)
    done = run_cli("convert", tiny_model, *QUICK, "-o", folder / "out.gguf")
    assert_refused(done, "No space left on device; check space", folder)


def test_failed_verification_leaves_the_old_output(
    run_cli: RunCli, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise VerificationError("differs from the plan")

    monkeypatch.setattr("lieq_gguf.pipeline.verify", fail)
    output = folder / "old.gguf"
    output.write_text("old")
    assert_refused(run_cli("convert", tiny_model, *QUICK, "--force", "-o", output), "differs from the plan")
    assert [p.name for p in folder.iterdir()] == ["old.gguf"]
    assert output.read_text() == "old"


# The calibration text


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"caf\xe9 au lait", "text.txt is not UTF-8 text (byte 3)"), (b"too short", "expected at least 16")],
    ids=["latin-1", "short"],
)
@pytest.mark.parametrize("command", ["convert", "score", "imatrix"])
def test_bad_calibration_text(
    run_cli: RunCli, tiny_model: Path, tmp_path: Path, folder: Path, command: str, content: bytes, words: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    options = ("--types", "Q2_K,Q4_K", "--bits", 3) if command == "convert" else ()
    done = run_cli(command, tiny_model, *options, "--calibration", text, "-q", "-o", folder / "out")
    assert_refused(done, words, folder)


def test_calibration_text_is_a_folder(run_cli: RunCli, tiny_model: Path, folder: Path) -> None:
    done = run_cli("imatrix", tiny_model, "--calibration", folder, "-q", "-o", folder / "out")
    assert_refused(done, "cannot be read", folder)


# Records: scores, plans, importance matrices


def write(content: bytes) -> Change:
    return lambda file: file.write_bytes(content)


def edit(**changes: Any) -> Change:
    return lambda file: edit_json(file, **changes)


def without(key: str) -> Change:
    def change(file: Path) -> None:
        document = json.loads(file.read_text())
        del document[key]
        file.write_text(json.dumps(document))

    return change


def in_types(**types: str | None) -> Change:
    """Change a plan's types; the names have _ for the dot."""

    def change(file: Path) -> None:
        document = json.loads(file.read_text())
        for name, quant_type in types.items():
            key = name.replace("__", ".")
            if quant_type is None:
                del document["types"][key]
            else:
                document["types"][key] = quant_type
        file.write_text(json.dumps(document))

    return change


# every other damage to these files is in test_records.py
BAD_JSON: dict[str, tuple[Change, str]] = {
    "missing": (lambda f: f.unlink(), "does not exist"),
    "cut": (cut, "cannot be read as JSON"),
    "another schema": (edit(schema_version=99), "has schema version 99, expected 1"),
}
BAD_PLANS = BAD_JSON | {
    "target of another kind": (edit(target={"kind": "weight", "value": 3}), "target of kind 'weight'"),
    "unknown type": (in_types(blk__0__attn_q__weight="Q9_K"), "the unknown type Q9_K"),
    "a tensor missing": (in_types(blk__0__attn_q__weight=None), "blk.0.attn_q.weight: the plan has no type for it"),
    "a tensor too many": (in_types(blk__3__attn_q__weight="Q4_K"), "has no such tensor"),
    "a norm quantised": (in_types(output_norm__weight="Q4_K"), "output_norm.weight of shape (256,) the type Q4_K"),
    "scores of other layers": (edit(layer_scores=[0.5]), "layer_scores"),
    "target no number": (edit(target={"kind": "bits", "value": None}), "is not a complete plan"),
}  # fmt: skip
BAD_SCORES = BAD_JSON | {
    "layers of another kind": (edit(layers=[{"layer": 0}]), "is not a complete scores file"),
    "fewer layers": (edit(scorers=["lim"], layers=[{"layer": 0, "lim": 1.0}]), "with 1 layers"),
    "other matrices": (edit(type_errors={"blk.0.attn_q.weight": {"Q2_K": 0.1}}), "whose matrices differ from those"),
    "scorer missing": (edit(scorers=["zd"], layers=[{"zd": 0.1}] * 3), "the scores have no 'energy-gain'; they"),
    "sensitivity not finite": (edit(sensitivities={"blk.0.attn_q.weight": float("inf")}), "sensitivities"),
    "no sensitivities": (edit(sensitivities={}), "the scores have no block error of blk.0.attn_q.weight"),
    "score not finite": (edit(scorers=["lim"], layers=[{"lim": float("nan")}] * 3), "lim"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plan(run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path, name: str) -> None:
    change, words = BAD_PLANS[name]
    change(documents / "plan.json")
    done = run_cli("convert", tiny_model, "--plan", documents / "plan.json", "--no-imatrix", "-q",
                   "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, words, folder)


def test_plan_of_another_model(run_cli: RunCli, small_model: Path, documents: Path, folder: Path) -> None:
    done = run_cli("convert", small_model, "--plan", documents / "plan.json", "-q", "-o", folder / "out.gguf")
    assert_refused(done, "the plan for tiny does not belong to small", folder)


def test_plan_that_needs_importance_and_gets_none(
    run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path
) -> None:
    in_types(blk__0__attn_q__weight="IQ2_XXS")(documents / "plan.json")
    done = run_cli("convert", tiny_model, "--plan", documents / "plan.json", "--no-imatrix", "-q",
                   "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, "has types that need an importance matrix; drop --no-imatrix", folder)


def test_plan_that_gives_the_embedding_a_type_that_needs_importance(
    run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path
) -> None:
    in_types(token_embd__weight="IQ2_XXS")(documents / "plan.json")
    done = run_cli("convert", tiny_model, "--plan", documents / "plan.json", "--imatrix", documents / "imatrix.gguf",
                   "-q", "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, "token_embd.weight", folder)


@pytest.mark.parametrize("name", BAD_SCORES)
def test_bad_scores(run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path, name: str) -> None:
    change, words = BAD_SCORES[name]
    change(documents / "scores.json")
    done = run_cli("plan", tiny_model, "--scores-file", documents / "scores.json", "--no-imatrix", "-q",
                   "--types", "Q2_K,Q4_K", "--bits", 3, "-o", folder / "plan.json")  # fmt: skip
    assert_refused(done, words, folder)


def test_scores_lack_a_type_on_offer(run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path) -> None:
    done = run_cli("plan", tiny_model, "--scores-file", documents / "scores.json", "--no-imatrix", "-q",
                   "--types", "Q2_K,Q6_K", "--bits", 3, "-o", folder / "plan.json")  # fmt: skip
    assert_refused(done, "the scores have no errors for Q6_K; score again with --types Q2_K,Q4_K,Q6_K", folder)


def test_scores_of_another_model(run_cli: RunCli, small_model: Path, documents: Path, folder: Path) -> None:
    done = run_cli("plan", small_model, "--scores-file", documents / "scores.json", "--no-imatrix", "-q",
                   "--types", "Q2_K,Q4_K", "--bits", 3, "-o", folder / "plan.json")  # fmt: skip
    assert_refused(done, "the scores are for tiny with 3 layers; small has 2", folder)


def edit_imatrix(change: Callable[[str, np.ndarray[Any, Any]], np.ndarray[Any, Any] | None]) -> Change:
    """Write an importance matrix anew with other arrays; None leaves one out."""

    def rewrite(file: Path) -> None:
        arrays = {t.name: change(t.name, np.array(t.data)) for t in gguf.GGUFReader(file).tensors}
        writer = gguf.GGUFWriter(file, "")
        writer.add_type("imatrix")
        for name, array in arrays.items():
            if array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return rewrite


def only(name: str, value: float | None) -> Change:
    return edit_imatrix(lambda n, a: a if n != name else None if value is None else np.full_like(a, value))


def into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BAD_IMATRICES: dict[str, tuple[Change, str]] = {
    "missing": (lambda f: f.unlink(), "does not exist; expected an importance matrix"),
    "a folder": (into_folder, "is not an importance matrix"),
    "numbers": (write(np.arange(500, dtype=np.int32).tobytes()), "is not an importance matrix ("),
    "cut": (cut, "is not an importance matrix in GGUF form"),
    "no counts": (only("blk.1.attn_q.weight.counts", None), "expected in_sum2 and counts"),
    "no sums": (only("blk.1.attn_q.weight.in_sum2", None), "expected in_sum2 and counts"),
    "narrow": (edit_imatrix(lambda _, a: a[..., :128]), "columns for blk.0.attn_q.weight, the model has 256"),
    "a matrix missing": (
        edit_imatrix(lambda n, a: None if n.startswith("blk.2.ffn_up") else a),
        "lacks 1 of the model's 21 matrices, for example blk.2.ffn_up.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMATRICES)
def test_bad_imatrix(run_cli: RunCli, tiny_model: Path, documents: Path, folder: Path, name: str) -> None:
    change, words = BAD_IMATRICES[name]
    change(documents / "imatrix.gguf")
    done = run_cli("convert", tiny_model, "--types", "Q4_K", "--bits", 4.5, "-q",
                   "--imatrix", documents / "imatrix.gguf", "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, words, folder)


def test_imatrix_is_a_model(run_cli: RunCli, tiny_model: Path, conversion: pipeline.Conversion, folder: Path) -> None:
    done = run_cli("convert", tiny_model, "--types", "Q4_K", "--bits", 4.5, "-q", "--imatrix", conversion.output,
                   "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, "is a GGUF file, but not an importance matrix", folder)


def test_imatrix_of_another_model(run_cli: RunCli, small_model: Path, documents: Path, folder: Path) -> None:
    done = run_cli("convert", small_model, "--types", "Q4_K", "--bits", 4.5, "-q",
                   "--imatrix", documents / "imatrix.gguf", "-o", folder / "out.gguf")  # fmt: skip
    assert_refused(done, "columns for blk.0.ffn_down.weight, the model has 256", folder)


# Files to read


READERS = {"inspect": (), "verify": ("-q",), "bench": ("-q",), "run": ("hello",)}


@pytest.mark.parametrize("command", READERS)
def test_reading_what_is_not_there(run_cli: RunCli, tmp_path: Path, command: str) -> None:
    done = run_cli(command, tmp_path / "model.gguf", *READERS[command])
    assert_refused(done, "does not exist or is not a file", tmp_path)


@pytest.mark.parametrize("command", READERS)
def test_reading_a_cut_file(run_cli: RunCli, conversion: pipeline.Conversion, tmp_path: Path, command: str) -> None:
    file = Path(shutil.copy(conversion.output, tmp_path / "model.gguf"))
    cut(file, 0.9)
    assert_refused(run_cli(command, file, *READERS[command]), "is not a complete GGUF file")


@pytest.mark.parametrize("command", READERS)
def test_reading_an_importance_matrix_as_a_model(run_cli: RunCli, documents: Path, command: str) -> None:
    assert_refused(run_cli(command, documents / "imatrix.gguf", *READERS[command]), "imatrix.gguf")


def test_prompt_too_long(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    done = run_cli("run", conversion.output, "word " * 3000, "-n", 2)
    assert_refused(done, "llama.cpp cannot answer with")


# Wrong usage


CONVERT = ("convert", "MODEL")
WRONG_USAGE: dict[str, tuple[object, ...]] = {
    "unknown option": (*CONVERT, "--bits", 4, "--colour"),
    "no bits": CONVERT,
    "bits a word": (*CONVERT, "--bits", "abc"),
    "bits nan": (*CONVERT, "--bits", "nan"),
    "bits infinite": (*CONVERT, "--bits", "inf"),
    "bits zero": (*CONVERT, "--bits", 0),
    "bits negative": (*CONVERT, "--bits", -1),
    "bits and plan": (*CONVERT, "--bits", 4, "--plan", "plan.json"),
    "nominal without bits": (*CONVERT, "--nominal"),
    "imatrix and none": (*CONVERT, "--bits", 4, "--imatrix", "i.gguf", "--no-imatrix"),
    "unknown method": (*CONVERT, "--bits", 4, "--method", "magic"),
    "unknown scorer": (*CONVERT, "--bits", 4, "--layer-score", "magic"),
    "unknown granularity": (*CONVERT, "--bits", 4, "--granularity", "block"),
    "negative threads": (*CONVERT, "--bits", 4, "--threads", -1),
    "few tokens": (*CONVERT, "--bits", 4, "--n-tokens", 3),
    "no source": ("convert", "--bits", 4),
    "two sources": (*CONVERT, "OTHER", "--bits", 4),
    "plan without bits": ("plan", "MODEL"),
    "plan, bits nan": ("plan", "MODEL", "--bits", "nan"),
    "imatrix without output": ("imatrix", "MODEL"),
    "score, unknown scorer": ("score", "MODEL", "--layer-score", "magic"),
    "bench without file": ("bench",),
    "bench, no tokens": ("bench", "FILE", "-n", 0),
    "run, negative temperature": ("run", "FILE", "hi", "--temperature", -1),
    "unknown command": ("transmogrify", "MODEL"),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage(run_cli: RunCli, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = run_cli(*WRONG_USAGE[name])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Error" in done.stderr
    assert list(folder.iterdir()) == []


def test_no_command_shows_the_help(run_cli: RunCli) -> None:
    done = run_cli()
    assert done.exit_code == 2
    assert "convert" in done.stdout + done.stderr


def test_debug_shows_the_traceback(run_cli: RunCli, folder: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        run_cli("convert", folder / "none", *QUICK, "--debug", "-o", folder / "out.gguf")


# Interruptions


def test_interrupt_leaves_nothing(
    run_cli: RunCli, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial: list[str] = []

    def interrupt(*_arguments: object) -> None:
        partial.extend(p.name for p in folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("lieq_gguf.pipeline.verify", interrupt)
    done = run_cli("convert", tiny_model, *QUICK, "-o", folder / "out.gguf")
    assert [name.endswith(".partial") for name in partial] == [True]
    assert list(folder.iterdir()) == []
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr


SLEEP_IN_VERIFY = """
import signal, sys, time
from lieq_gguf import pipeline
from lieq_gguf.cli import commands

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored

def wait(*_arguments):
    print("verifying", flush=True)
    time.sleep(60)

pipeline.verify = wait
commands.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_leaves_nothing(tiny_model: Path, folder: Path, number: signal.Signals, exit_code: int) -> None:
    root = str(Path(__file__).parents[1])
    options = [str(option) for option in QUICK]
    command = [
        sys.executable,
        "-c",
        SLEEP_IN_VERIFY,
        "convert",
        str(tiny_model),
        *options,
        "-o",
        str(folder / "o.gguf"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "verifying\n"
            assert [p.suffix for p in folder.iterdir()] == [".partial"]
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == exit_code
    assert list(folder.iterdir()) == []
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "option", [["--types", "Q2_K"], ["--method", "lieq"], ["--nominal"], ["--output-type", "Q6_K"]]
)
def test_what_a_plan_decides_is_not_an_option_beside_it(run_cli: RunCli, tiny_model: Path, option: list[str]) -> None:
    done = run_cli("convert", tiny_model, "--plan", "plan.json", *option)
    assert done.exit_code == 2
    assert option[0] in done.stderr

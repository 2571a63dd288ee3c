from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.command import CliResult, RunCli, run_apart
from support.models import write_model
from support.tokenizer_fixtures import CHATML, write_smollm2
from typer.main import get_command

import lieq_gguf
from lieq_gguf import pipeline
from lieq_gguf.cli.commands import app
from lieq_gguf.evaluation import bench_types
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.measure import forward_pass
from lieq_gguf.measure.passes import PassResult
from lieq_gguf.quant_types import parse_types

COMMANDS = ("convert", "score", "imatrix", "plan", "inspect", "verify", "eval", "bench", "run")
FIGURES = {"layer_bpw", "file_bpw", "nominal_bits", "file_bytes"}
CONVERT_KEYS = FIGURES | {"schema_version", "output", "method", "n_layers", "types", "seconds", "peak_rss_bytes"}


KNOWN = ("--types", "Q2_K,Q3_K,Q4_K")  # what goes with scores and importance from files


@pytest.fixture
def cheap(calibration_text: Path) -> list[object]:
    """Options that make a pass take a second."""
    return ["--calibration", calibration_text, "--n-tokens", 512, "--types", "Q2_K,Q3_K,Q4_K", "--threads", 1]


@pytest.fixture
def cheap_pass(cheap: list[object]) -> list[object]:
    """The same without the types, which a plan decides."""
    return [*cheap[:4], *cheap[6:]]


@pytest.fixture
def converted(conversion: pipeline.Conversion) -> Path:
    return conversion.output


@pytest.fixture
def measured_files(run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path) -> list[object]:
    """Scores and importance matrix in files, as options."""
    succeed(run_cli("score", tiny_model, "-o", tmp_path / "scores.json", *cheap))
    without_types = [*cheap[:4], *cheap[6:]]
    succeed(run_cli("imatrix", tiny_model, "-o", tmp_path / "imatrix.gguf", *without_types))
    return ["--scores-file", tmp_path / "scores.json", "--imatrix", tmp_path / "imatrix.gguf"]


def succeed(result: CliResult) -> CliResult:
    assert result.exit_code == 0, result.stderr
    return result


def document(result: CliResult) -> Any:
    """stdout as the one JSON document it must be."""
    return json.loads(succeed(result).stdout)


def tensors(file: Path) -> dict[str, tuple[int, bytes]]:
    return {t.name: (int(t.tensor_type), t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def words(text: str) -> str:
    """Text without the lines and colours that help is drawn with."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def test_every_command_is_tested_here() -> None:
    assert set(COMMANDS) == set(getattr(get_command(app), "commands"))  # noqa: B009


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example(run_cli: RunCli, command: str, option: str) -> None:
    shown = words(succeed(run_cli(command, option)).stdout)
    assert f"Example: lieq-gguf {command} " in shown.replace("`", "")


def test_help_lists_the_commands(run_cli: RunCli) -> None:
    shown = words(succeed(run_cli("--help")).stdout)
    assert all(re.search(rf"\b{command}\b", shown) for command in COMMANDS)


def test_help_shows_an_example(run_cli: RunCli) -> None:
    assert "lieq-gguf convert " in words(succeed(run_cli("--help")).stdout)


def test_version_is_shown(run_cli: RunCli) -> None:
    assert succeed(run_cli("--version")).stdout == f"lieq-gguf {lieq_gguf.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["inspect", "FILE"], ["inspect", "FILE", "--json"]]
)
def test_quick_commands_do_not_load_torch(converted: Path, arguments: list[str]) -> None:
    assert heavy_modules([str(converted) if a == "FILE" else a for a in arguments]) == []


def test_plan_from_files_does_not_load_torch(tiny_model: Path, measured_files: list[object]) -> None:
    options = ["--bits", "3.4", "--types", "Q2_K,Q3_K,Q4_K", "--threads", "1", *map(str, measured_files)]
    assert heavy_modules(["plan", str(tiny_model), *options]) == []


def heavy_modules(arguments: list[str]) -> list[str]:
    """Which of the slow packages a command has loaded when it ends."""
    result, loaded = run_apart(arguments)
    succeed(result)
    return loaded


def test_convert_json(run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    found = document(run_cli("convert", tiny_model, "--bits", 3.4, "-o", output, "--json", *cheap))
    assert found.keys() >= CONVERT_KEYS
    assert (found["schema_version"], found["output"], found["n_layers"]) == (1, str(output), 3)
    assert (found["method"], found["file_bytes"]) == ("best", output.stat().st_size)
    assert found["types"] == {t.name: t.tensor_type.name for t in gguf.GGUFReader(output).tensors}
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert {"calibrate", "allocate", "write", "verify"} <= found["seconds"].keys()
    assert found["peak_rss_bytes"] > 1e8  # torch alone is more


def test_score_json(run_cli: RunCli, tiny_model: Path, cheap: list[object]) -> None:
    found = document(run_cli("score", tiny_model, "--layer-score", "lim", "--json", *cheap))
    assert found.keys() >= {"schema_version", "model", "scorer", "layers"}
    assert (found["schema_version"], found["model"], found["scorer"]) == (1, tiny_model.name, "lim")
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    assert all(layer["score"] == layer["lim"] for layer in found["layers"])


def test_score_json_is_what_score_keeps(run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path) -> None:
    found = document(run_cli("score", tiny_model, "--json", "-o", tmp_path / "scores.json", *cheap))
    assert json.loads((tmp_path / "scores.json").read_text()) == found


def test_plan_json(run_cli: RunCli, tiny_model: Path, cheap: list[object]) -> None:
    found = document(run_cli("plan", tiny_model, "--bits", 3.4, "--json", *cheap))
    assert found.keys() >= CONVERT_KEYS - {"output"} | {"reachable"}
    assert found["reachable"] == {"min_layer_bpw": 2.625, "max_layer_bpw": 4.5}
    assert "output" not in found


def test_inspect_json(run_cli: RunCli, converted: Path) -> None:
    found = document(run_cli("inspect", converted, "--json"))
    assert found.keys() >= FIGURES | {"schema_version", "architecture", "n_layers", "types", "layers"}
    assert (found["architecture"], found["n_layers"]) == ("llama", 3)
    assert found["types"] == {t.name: t.tensor_type.name for t in gguf.GGUFReader(converted).tensors}
    for layer in found["layers"]:
        assert layer.keys() == {"layer", "bpw", "types"}
        assert layer["types"]["attn_q"] == found["types"][f"blk.{layer['layer']}.attn_q.weight"]


def test_inspect_reads_the_figures_that_convert_printed(run_cli: RunCli, conversion: pipeline.Conversion) -> None:
    printed = conversion.to_json()
    found = document(run_cli("inspect", conversion.output, "--json"))
    assert {key: found[key] for key in FIGURES} == {key: printed[key] for key in FIGURES}


def test_bench_json(run_cli: RunCli, converted: Path) -> None:
    found = document(run_cli("bench", converted, converted, "-p", 8, "-n", 2, "-r", 1, "--threads", 1, "--json"))
    assert [entry["file"] for entry in found] == [str(converted)] * 2
    for entry in found:
        assert entry["file_bytes"] == converted.stat().st_size
        assert entry["n_threads"] == 1
        assert entry["prompt_tokens_per_sec"] > 0
        assert entry["generation_tokens_per_sec"] > 0


@pytest.mark.parametrize("command", ["convert", "plan", "score", "verify", "bench"])
def test_progress_is_on_stderr_beside_the_json(
    run_cli: RunCli, tiny_model: Path, converted: Path, cheap: list[object], tmp_path: Path, command: str
) -> None:
    arguments: dict[str, list[object]] = {
        "convert": [tiny_model, "--bits", 3.4, "-o", tmp_path / "out.gguf", *cheap],
        "plan": [tiny_model, "--bits", 3.4, *cheap],
        "score": [tiny_model, *cheap],
        "verify": [converted],
        "bench": [converted, "-p", 4, "-n", 1, "-r", 1],
    }
    loud = run_cli(command, *arguments[command], "--json")
    assert document(loud) and "100%" in loud.stderr
    force = ["--force"] if command == "convert" else []
    quiet = run_cli(command, *arguments[command], *force, "--json", "--quiet")
    assert document(quiet) and quiet.stderr == ""


def test_unweighted_conversion_measures_unweighted_errors(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def run_pass(*arguments: Any, **options: Any) -> PassResult:
        asked.append(arguments[2].weigh_errors)
        return real(*arguments, **options)

    real = forward_pass.run_pass
    monkeypatch.setattr(forward_pass, "run_pass", run_pass)
    for options in ([], ["--no-imatrix"]):
        succeed(run_cli("plan", tiny_model, "--bits", 3.4, "-o", tmp_path / "p.json", "--force", *cheap, *options))
    assert asked == [True, False]


def test_measured_files_make_the_same_tensors(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], measured_files: list[object], tmp_path: Path
) -> None:
    plain = ("--no-error-feedback",)
    succeed(run_cli("convert", tiny_model, "--bits", 3.4, "-o", tmp_path / "measured.gguf", *cheap, *plain))
    succeed(
        run_cli("convert", tiny_model, "--bits", 3.4, "-o", tmp_path / "again.gguf", *KNOWN, *measured_files, *plain)
    )
    assert tensors(tmp_path / "again.gguf") == tensors(tmp_path / "measured.gguf")


def test_measured_files_need_no_forward_pass(
    run_cli: RunCli,
    tiny_model: Path,
    measured_files: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward_pass, "run_pass", no_pass)
    known = (*KNOWN, *measured_files, "--no-error-feedback")
    succeed(run_cli("convert", tiny_model, "--bits", 3.4, "-o", tmp_path / "out.gguf", *known))


def test_plan_from_scores_alone_needs_no_forward_pass(
    run_cli: RunCli, tiny_model: Path, measured_files: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_pass, "run_pass", no_pass)
    succeed(run_cli("plan", tiny_model, "--bits", 3.4, *KNOWN, *measured_files[:2]))
    succeed(run_cli("convert", tiny_model, "--bits", 3.4, "--dry-run", *KNOWN, *measured_files[:2]))


def no_pass(*_arguments: object, **_options: object) -> None:
    pytest.fail("a forward pass was made")


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "1.5"],
        ["--bits", "3", "--embedding-type", "IQ2_XXS"],
        ["--bits", "3", "--output-type", "IQ2_S"],
        ["--bits", "5", "--method", "lieq", "--types", "Q3_K,Q5_K,Q6_K"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused_before_the_forward_pass(
    run_cli: RunCli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(forward_pass, "run_pass", no_pass)
    result = run_cli("convert", tiny_model, "-o", tmp_path / "out.gguf", *options)
    assert result.exit_code == 1


def test_dry_run_writes_nothing_and_knows_the_size(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["convert", tiny_model, "--bits", 3.4, "-o", "out.gguf", "--json", *cheap]
    foreseen = document(run_cli(*command, "--dry-run"))
    assert list(tmp_path.iterdir()) == []
    made = document(run_cli(*command))
    assert foreseen["types"] == made["types"]
    # the file keeps its command line, which --dry-run lengthens by ten characters and perhaps one more 32-byte pad
    assert foreseen["file_bytes"] == pytest.approx(made["file_bytes"], abs=64)


def test_output_is_named_after_model_and_target(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed(run_cli("convert", tiny_model, "--bits", 3.4, *cheap))
    assert [file.name for file in tmp_path.iterdir()] == [f"{tiny_model.name}-3.4bpw.gguf"]


def test_plan_that_was_kept_is_carried_out(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], cheap_pass: list[object], tmp_path: Path
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "out.gguf"
    planned = document(run_cli("plan", tiny_model, "--bits", 3.4, "-o", plan, "--json", *cheap))
    made = document(run_cli("convert", tiny_model, "--plan", plan, "-o", output, "--json", *cheap_pass))
    assert made["types"] == planned["types"] == json.loads(plan.read_text())["types"]
    assert {name: t.name for name, t in ((t.name, t.tensor_type) for t in gguf.GGUFReader(output).tensors)} == (
        planned["types"]
    )


@pytest.mark.parametrize("profile", ["cpu", "quality", "edge"])
def test_file_of_a_given_size_is_no_larger(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path, profile: str
) -> None:
    size = 900_000
    out = tmp_path / "out.gguf"
    document = json.loads(
        succeed(
            run_cli("convert", tiny_model, "--size", size, "--profile", profile, *cheap, "-q", "--json", "-o", out)
        ).stdout
    )
    assert 0.97 * size < document["file_bytes"] == out.stat().st_size <= size
    assert document["profile"] == profile
    assert document["predicted"]["generation_tokens_per_sec"] > 0
    assert document["expected_kld"] > 0


def test_plan_for_a_size_is_carried_out_within_it(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], cheap_pass: list[object], tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / ("long" * 40 + ".gguf")
    succeed(run_cli("plan", tiny_model, "--size", "900kB", *cheap, "-q", "-o", plan))
    succeed(run_cli("convert", tiny_model, "--plan", plan, *cheap_pass, "-q", "-o", out))
    assert out.stat().st_size <= 900_000


def test_bits_of_the_file_are_met_from_below(run_cli: RunCli, tiny_model: Path, cheap: list[object]) -> None:
    document = json.loads(succeed(run_cli("plan", tiny_model, "--file-bits", 3.5, *cheap, "-q", "--json")).stdout)
    assert 0.97 * 3.5 < document["file_bpw"] <= 3.5


def test_pinned_tensors_have_their_type(run_cli: RunCli, tiny_model: Path, cheap: list[object]) -> None:
    arguments = ["plan", tiny_model, "--bits", 3.5, *cheap, "--pin", r"blk\.1\.ffn_down=Q4_K", "--pin", "attn_v=q3_k"]
    types = json.loads(succeed(run_cli(*arguments, "-q", "--json")).stdout)["types"]
    assert types["blk.1.ffn_down.weight"] == "Q4_K"
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(3)} == {"Q3_K"}


def test_tensor_type_file_anchors_and_escapes_every_name(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], tmp_path: Path
) -> None:
    arguments = ["plan", tiny_model, "--bits", 3.5, *cheap, "-q"]
    types = json.loads(succeed(run_cli(*arguments, "--json")).stdout)["types"]
    printed = succeed(run_cli(*arguments, "--format", "tensor-type-file")).stdout
    file = tmp_path / "types.txt"
    succeed(run_cli(*arguments, "--format", "tensor-type-file", "-o", file))
    assert file.read_text() == printed
    rules = [line.split("=") for line in printed.split()]
    for name, quant_type in types.items():
        found = [t for pattern, t in rules if re.search(pattern, name)]
        assert found == ([] if quant_type == "F32" else [quant_type])


def test_costs_measured_here_are_used_from_then_on(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lieq_gguf.quant_types.DEFAULT_LADDER", parse_types(["Q2_K", "Q4_K"]))
    monkeypatch.setattr(bench_types, "_N_LAYERS", 4)  # a quarter of the weights, less often: seconds, and noisier
    monkeypatch.setattr(bench_types, "_RUNS", 2)
    document = json.loads(succeed(run_cli("bench", "--types", "-t", 1, "-q", "--json")).stdout)
    assert document["picoseconds_per_weight"].keys() == {"Q2_0", "Q2_K", "Q4_K", "Q8_0"}
    assert all(0.1 < cost < 1e5 for cost in document["picoseconds_per_weight"].values())
    planned = json.loads(succeed(run_cli("plan", tiny_model, "--bits", 3.5, *cheap, "-q", "--json")).stdout)
    assert planned["predicted"]["machine"] == document["machine"]


def test_a_type_of_two_bits_for_widths_that_k_types_do_not_fit(
    run_cli: RunCli, cheap_pass: list[object], tmp_path: Path
) -> None:
    """Asked for with a plus; the error that the usual types give names it. llama.cpp loads and runs the file."""
    model, output = write_model(tmp_path / "model", hidden_size=192, intermediate_size=320), tmp_path / "out.gguf"
    refused = run_cli("convert", model, "--bits", 3, "-o", output, *cheap_pass)
    assert refused.exit_code == 1
    assert "--types +Q2_0" in refused.stderr
    made = document(
        run_cli("convert", model, "--bits", 3, "--types", "+Q2_0", "-o", output, "--json", "--error-feedback",
                *cheap_pass)
    )  # fmt: skip
    assert "Q2_0" in made["types"].values()
    assert set(made["types"].values()) - {"Q2_0"}
    assert 2.9 < made["layer_bpw"] <= 3
    succeed(run_cli("verify", output))
    assert "Q2_0" in succeed(run_cli("inspect", output)).stdout


def test_plan_edited_by_hand_is_carried_out(
    run_cli: RunCli, tiny_model: Path, cheap: list[object], cheap_pass: list[object], tmp_path: Path
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "out.gguf"
    succeed(run_cli("plan", tiny_model, "--bits", 3.4, "-o", plan, *cheap))
    edited = json.loads(plan.read_text())
    edited["types"]["blk.1.attn_v.weight"] = "q8_0"
    plan.write_text(json.dumps(edited))
    made = document(run_cli("convert", tiny_model, "--plan", plan, "-o", output, "--json", *cheap_pass))
    assert made["types"]["blk.1.attn_v.weight"] == "Q8_0"
    succeed(run_cli("verify", output, "--plan", plan))


def test_tables_for_people_name_every_layer(run_cli: RunCli, converted: Path) -> None:
    shown = succeed(run_cli("inspect", converted)).stdout
    assert re.findall(r"^ +(\d) ", shown, re.MULTILINE) == ["0", "1", "2"]


@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_run_prints_an_answer(run_cli: RunCli, converted: Path, raw: bool) -> None:
    options = ["--raw"] if raw else []
    result = succeed(run_cli("run", converted, "The quick brown", "-n", 8, "--threads", 1, *options))
    assert result.stdout.strip()
    assert result.stderr == ""


def test_run_uses_the_chat_template_unless_raw(run_cli: RunCli, converted: Path) -> None:
    chat, raw = (
        succeed(run_cli("run", converted, "The quick brown", "-n", 16, "--threads", 1, *options)).stdout
        for options in ([], ["--raw"])
    )
    assert chat != raw


def test_run_needs_none_of_the_other_templates(run_cli: RunCli, cheap: list[object], tmp_path: Path) -> None:
    """Named ones may be for programs that know more tags than llama.cpp."""
    model = write_model(tmp_path / "model", write_tokenizer=write_tokenizer_with_a_template_of_transformers)
    output = tmp_path / "out.gguf"
    succeed(run_cli("convert", model, "--bits", 3.4, "-o", output, *cheap))
    assert GgufFile(output).value("tokenizer.chat_templates") == ["training"]
    result = succeed(run_cli("run", output, "The quick brown", "-n", 8, "--threads", 1))
    assert result.stdout.strip()
    assert result.stderr == ""


def write_tokenizer_with_a_template_of_transformers(path: Path) -> int:
    vocab_size = write_smollm2(path)
    (path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (path / "additional_chat_templates").mkdir()
    training = "{% generation %}" + CHATML + "{% endgeneration %}"
    (path / "additional_chat_templates" / "training.jinja").write_text(training, encoding="utf-8")
    return vocab_size


def test_run_of_a_file_without_chat_template_continues_the_text(
    run_cli: RunCli, cheap: list[object], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", write_tokenizer=write_tokenizer_without_template)
    output = tmp_path / "out.gguf"
    succeed(run_cli("convert", model, "--bits", 3.4, "-o", output, *cheap))
    plain, raw = (
        succeed(run_cli("run", output, "The quick brown", "-n", 8, "--threads", 1, *options)).stdout
        for options in ([], ["--raw"])
    )
    assert plain.strip()
    assert plain == raw


def write_tokenizer_without_template(path: Path) -> int:
    vocab_size = write_smollm2(path)
    config = path / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["chat_template"]
    config.write_text(json.dumps(content), encoding="utf-8")
    return vocab_size


def test_run_is_the_same_every_time(run_cli: RunCli, converted: Path) -> None:
    first, second = (
        succeed(run_cli("run", converted, "Once", "-n", 8, "--temperature", 1.5, "--seed", 3, "--threads", 1)).stdout
        for _ in range(2)
    )
    assert first == second

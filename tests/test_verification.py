import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.command import RunCli

from lieq_gguf import pipeline
from lieq_gguf.errors import FormatError, VerificationError
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.writing.verification import verify

Damage = Callable[[str, int, bytes], Path]
NAN_F16 = np.array(np.nan, dtype=np.float16).tobytes()
INF_F16 = np.array(np.inf, dtype=np.float16).tobytes()
# Where the float16 scales of a block are.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q6_K": (208,)}


@pytest.fixture
def damage(conversion: pipeline.Conversion, tmp_path: Path) -> Damage:
    """A copy of the converted file with some bytes of a tensor replaced."""

    def write_damaged(name: str, offset: int, content: bytes) -> Path:
        copy = tmp_path / "damaged.gguf"
        tensor = next(t for t in gguf.GGUFReader(conversion.output).tensors if t.name == name)
        assert offset + len(content) <= tensor.n_bytes
        data = bytearray(conversion.output.read_bytes())
        start = int(tensor.data_offset) + offset
        data[start : start + len(content)] = content
        copy.write_bytes(data)
        return copy

    return write_damaged


def a_matrix_of(conversion: pipeline.Conversion, quant_type: str) -> str:
    return next(name for name, kind in conversion.prepared.plan.types.items() if kind == quant_type)


def test_a_good_file_passes(conversion: pipeline.Conversion, tiny_model: Path) -> None:
    spec = ModelDirectory(tiny_model).spec
    result = verify(conversion.output, conversion.prepared.plan.types, {t.name: t.shape for t in spec.tensors})
    assert (result.n_tensors, result.n_weights) == (len(spec.tensors), spec.n_weights)
    assert result.n_vocab == spec.config["vocab_size"]


def test_progress_adds_up_to_all_weights(conversion: pipeline.Conversion) -> None:
    steps: list[float] = []
    assert verify(conversion.output, advance=steps.append).n_weights == sum(steps)


def test_catches_another_type(conversion: pipeline.Conversion) -> None:
    types = dict(conversion.prepared.plan.types)
    name = a_matrix_of(conversion, "Q2_K")
    types[name] = "Q3_K"
    with pytest.raises(VerificationError, match=f"{name} is Q2_K, planned Q3_K"):
        verify(conversion.output, types)


def test_catches_a_missing_tensor(conversion: pipeline.Conversion) -> None:
    types = dict(conversion.prepared.plan.types) | {"output.weight": "Q6_K"}
    with pytest.raises(VerificationError, match=r"output\.weight is missing, planned Q6_K"):
        verify(conversion.output, types)


def test_catches_a_tensor_too_many(conversion: pipeline.Conversion) -> None:
    types = dict(conversion.prepared.plan.types)
    del types["output_norm.weight"]
    with pytest.raises(VerificationError, match=r"output_norm\.weight is F32, planned no such tensor"):
        verify(conversion.output, types)


def test_catches_another_shape(conversion: pipeline.Conversion, tiny_model: Path) -> None:
    shapes = {t.name: t.shape for t in ModelDirectory(tiny_model).spec.tensors}
    shapes["blk.0.ffn_up.weight"] = (256, 512)
    with pytest.raises(VerificationError, match=r"ffn_up\.weight .* has shape \(512, 256\); planned \(256, 512\)"):
        verify(conversion.output, shapes=shapes)


@pytest.mark.parametrize("value", [NAN_F16, INF_F16], ids=["NaN", "infinite"])
@pytest.mark.parametrize("quant_type", SCALES)
def test_catches_a_scale_that_is_not_finite(
    conversion: pipeline.Conversion, damage: Damage, quant_type: str, value: bytes
) -> None:
    name = a_matrix_of(conversion, quant_type)
    for place in SCALES[quant_type]:
        file = damage(name, 5 * QUANT_TYPES[quant_type].block_bytes + place, value)
        with pytest.raises(VerificationError, match=f"{name} .* holds NaN or infinite values as {quant_type}"):
            verify(file, conversion.prepared.plan.types)


def test_catches_a_norm_that_is_not_finite(damage: Damage) -> None:
    file = damage("blk.2.ffn_norm.weight", 4 * 255, np.float32(np.nan).tobytes())
    with pytest.raises(VerificationError, match=r"blk\.2\.ffn_norm\.weight .* holds NaN"):
        verify(file)


def test_catches_logits_that_are_not_finite(damage: Damage) -> None:
    file = damage("output_norm.weight", 0, np.full(256, 3e38, dtype=np.float32).tobytes())
    with pytest.raises(VerificationError, match="logits are not finite"):
        verify(file)


def test_catches_a_truncated_file(conversion: pipeline.Conversion, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(conversion.output.read_bytes()[:-1])
    with pytest.raises(FormatError, match="not a complete GGUF"):
        verify(file)


def test_catches_garbage_behind_a_good_header(conversion: pipeline.Conversion, tmp_path: Path) -> None:
    file = tmp_path / "garbage.gguf"
    data = conversion.output.read_bytes()
    start = gguf.GGUFReader(conversion.output).data_offset
    file.write_bytes(data[:start] + np.random.default_rng(0).bytes(len(data) - start))
    with pytest.raises(VerificationError, match="holds NaN or infinite"):
        verify(file, conversion.prepared.plan.types)


def test_quotes_llama_cpp_when_it_refuses_the_file(conversion: pipeline.Conversion, tmp_path: Path) -> None:
    data = conversion.output.read_bytes()
    start = data.index(b"llama", data.index(b"general.architecture"))
    file = tmp_path / "unknown.gguf"
    file.write_bytes(data[:start] + b"lhama" + data[start + 5 :])
    with pytest.raises(VerificationError, match=r"cannot load .*unknown model architecture: 'lhama'"):
        verify(file)


def test_command_passes_a_good_file_against_its_plan(
    run_cli: RunCli, conversion: pipeline.Conversion, tmp_path: Path
) -> None:
    conversion.prepared.plan.save(tmp_path / "plan.json", {})
    done = run_cli("verify", conversion.output, "--plan", tmp_path / "plan.json", "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "29 tensors read back, all finite" in done.stdout


def test_command_fails_on_another_plan(run_cli: RunCli, conversion: pipeline.Conversion, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    conversion.prepared.plan.save(plan, {})
    name = a_matrix_of(conversion, "Q4_K")
    plan.write_text(plan.read_text().replace(f'"{name}": "Q4_K"', f'"{name}": "Q2_K"'))
    done = run_cli("verify", conversion.output, "--plan", plan, "-q")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{name} is Q4_K, planned Q2_K" in done.stderr


def test_command_answers_in_json(run_cli: RunCli, conversion: pipeline.Conversion, tiny_model: Path) -> None:
    done = run_cli("verify", conversion.output, "-q", "--json")
    found = json.loads(done.stdout)
    assert found.pop("health")["n_prompts"] > 0
    assert found == {
        "schema_version": 1,
        "file": str(conversion.output),
        "ok": True,
        "n_tensors": 29,
        "n_weights": ModelDirectory(tiny_model).spec.n_weights,
        "n_vocab": ModelDirectory(tiny_model).spec.config["vocab_size"],
    }

"""A written file is compared with its model: faults of every kind are found, and right files of every kind pass."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.command import RunCli
from support.families import LLAMA_3_ROPE, TINY_MODELS, YARN_ROPE
from support.gguf_files import rewrite, with_unheard_of_value
from support.reports import PLAIN, edit_json, edit_weights, negate_up, untie_head
from support.requests import convert_plainly, on_text, request_of
from support.tokenizer_fixtures import write_glm_4_with_prefix

from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.falcon_h1 import FalconH1
from lieq_gguf.architectures.gemma3 import Gemma3
from lieq_gguf.architectures.granite_hybrid import GraniteHybrid
from lieq_gguf.architectures.llama import Llama
from lieq_gguf.architectures.modules import ATTENTION
from lieq_gguf.errors import VerificationError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.gguf_header import HeaderWriter, TensorLayout, write_gguf
from lieq_gguf.pipeline import convert
from lieq_gguf.quant_types import F32, QUANT_TYPES
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.options import ComputeOptions, SourceOptions
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources import open_source
from lieq_gguf.sources.file_order import FloatArray
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.sources.tensor_names import HEAD
from lieq_gguf.writing.compared_weights import ComparedWeights
from lieq_gguf.writing.equality import check_equality

TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all. " * 8
Patch = Callable[[pytest.MonkeyPatch], object]


def transposed_rows(self: ModelDirectory, tensor: TensorSpec) -> Iterator[FloatArray]:
    """The rows of a directory, but for one expert's gate, which is transposed."""
    weights = self.read(tensor).float().numpy()
    if tensor.name == "blk.1.ffn_gate_exps.weight":
        weights[3] = weights[3].T.copy()
    yield from weights.reshape(-1, 1, weights.shape[-1]) + np.float32(tensor.offset)


def without_scaling(self: Decoder, config: Any, writer: Any) -> None:
    writer.add_rope_freq_base(self.rope(config)["rope_theta"])


WRITERS_FAULTS: dict[str, tuple[str, dict[str, Any], Patch, str]] = {
    "rows of query and key": (
        "smollm2", {}, lambda m: m.setattr(Llama, "modules", tuple(_plain(x) for x in Llama.modules)),
        "computes embedding or layer 0 otherwise",
    ),
    "norms without their one": (
        "gemma3", {}, lambda m: m.setattr(Gemma3, "norm_offset", 0.0), "computes embedding or layer 0 otherwise",
    ),
    "yarn left out": (
        "qwen2", {"rope_parameters": YARN_ROPE}, lambda m: m.setattr(Decoder, "add_rope", without_scaling),
        "rotary_emb.attention_scaling is 1, not 1.27726",
    ),
    "llama3 left out": (
        "llama", {"rope_parameters": LLAMA_3_ROPE}, lambda m: m.setattr(Llama, "computed_lengths", lambda *_: {}),
        "is rotated otherwise",
    ),
    "epsilon": (
        "smollm2", {}, lambda m: m.setattr(HeaderWriter, "add_layer_norm_rms_eps", _other_epsilon),
        "layers.0.input_layernorm.variance_epsilon is 1e-05, not 1e-06",
    ),
    "window": (
        "gemma2", {}, lambda m: m.setattr(HeaderWriter, "add_sliding_window", _wider_window),
        "sliding_window is 64, not 32",
    ),
    "numbers of activations": (
        "apertus", {}, lambda m: m.setattr(HeaderWriter, "add_xielu_alpha_n", _same_in_all_layers),
        "mlp.act_fn.alpha_n has other numbers",
    ),
    "an expert transposed": (
        "qwen3moe", {}, lambda m: m.setattr(ModelDirectory, "rows", transposed_rows),
        "blk.1.ffn_gate_exps.weight has other weights",
    ),
    "factors left out": (
        "falcon-h1", {}, lambda m: m.setattr(FalconH1, "factors", lambda *_: ()),
        "computes embedding or layer 0 otherwise",
    ),
    "factor of the output": (
        "falcon-h1", {}, lambda m: m.setattr(FalconH1, "factors", _factors_of_layers), "computes the logits otherwise",
    ),
    "decay of Mamba-2": (
        "granite-h", {}, lambda m: m.setattr(GraniteHybrid, "layer_modules", _layer_without_exponent),
        "computes embedding or layer 0 otherwise",
    ),
}  # fmt: skip

_factors, _layer_modules = FalconH1.factors, GraniteHybrid.layer_modules


def _layer_without_exponent(self: GraniteHybrid, config: Any, layer: int) -> Any:
    return tuple(replace(module, is_negated_exp=False) for module in _layer_modules(self, config, layer))


def _factors_of_layers(self: FalconH1, config: Any, name: str) -> Any:
    return () if name == HEAD else _factors(self, config, name)


def _plain(module: Any) -> Any:
    """As if llama.cpp rotated halves, as transformers does."""
    return next((plain for plain in ATTENTION if plain.role == module.role), module)


def _other_epsilon(self: HeaderWriter, value: float) -> None:
    self.add_float32(f"{self.arch}.attention.layer_norm_rms_epsilon", 10 * value)


def _same_in_all_layers(self: HeaderWriter, values: list[float]) -> None:
    self.add_array("xielu.alpha_n", [values[0]] * len(values))


def _wider_window(self: HeaderWriter, value: int) -> None:
    self.add_uint32(f"{self.arch}.attention.sliding_window", 2 * value)


@pytest.mark.parametrize("type_name", ["Q2_K", "Q8_0"])
@pytest.mark.parametrize(("model", "settings", "patch", "says"), WRITERS_FAULTS.values(), ids=WRITERS_FAULTS)
def test_a_fault_of_the_writer_leaves_no_file(
    model: str,
    settings: dict[str, Any],
    patch: Patch,
    says: str,
    type_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = TINY_MODELS[model].write(tmp_path / "model", **settings)
    patch(monkeypatch)
    with pytest.raises(VerificationError, match="the file is not the model of") as caught:
        convert_plainly(path, tmp_path / "out.gguf", type_name)
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("type_name", ["Q2_K", "Q8_0"])
def test_a_head_that_the_writer_drops(type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TINY_MODELS["qwen2"].write(tmp_path / "model")
    untie_head(path)
    monkeypatch.setattr(ModelDirectory, "_names_in_use", lambda self, _config: self._weights.names - {HEAD})
    with pytest.raises(VerificationError, match="the output matrix has other weights"):
        convert_plainly(path, tmp_path / "out.gguf", type_name)
    assert list(tmp_path.iterdir()) == [path]


def drop_template(path: Path) -> None:
    """A tokenizer that adds nothing."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    edit_json("tokenizer.json", post_processor=byte_level)(path)


def swap_experts(weights: dict[str, torch.Tensor]) -> None:
    one, other = (f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in (0, 7))
    weights[one], weights[other] = weights[other], weights[one]


def swap_biases(weights: dict[str, torch.Tensor]) -> None:
    biases = weights["model.layers.1.mlp.experts.gate_up_proj_bias"]
    weights["model.layers.1.mlp.experts.gate_up_proj_bias"] = biases.flip(0)


def swap_scales_of_experts(weights: dict[str, torch.Tensor]) -> None:
    scales = weights["model.layers.1.router.per_expert_scale"]
    scales.copy_(scales.flip(0))


def stretch_channel(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][:, 7] *= 20


def stretch_norm(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"].mul_(1.1)


OTHER_MODELS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "head": ("qwen2", untie_head, "output.weight is missing"),
    "tokens": ("llama3", drop_template, "transformers adds the tokens ([], []) before and after a text, llama.cpp"),
    "experts": ("qwen3moe", edit_weights(swap_experts), "blk.1.ffn_up_exps.weight has other weights"),
    "biases of experts": ("gpt-oss", edit_weights(swap_biases), "blk.1.ffn_gate_exps.bias has other numbers"),
    "scales of experts": (
        "gemma4-moe", edit_weights(swap_scales_of_experts), "blk.1.ffn_down_exps.scale has other numbers",
    ),
    "experts of a token": ("gemma4-moe", edit_json("config.json", top_k_experts=4), "llama.cpp computes"),
    "norm": (
        "smollm2", edit_weights(stretch_norm),
        "output_norm.weight has other numbers",
    ),
    "theta": ("qwen3", edit_json("config.json", rope_parameters={"rope_theta": 5e5}), "is rotated otherwise"),
    "cap": ("gemma2", edit_json("config.json", final_logit_softcapping=20.0), "final_logit_softcapping is 30, not 20"),
    "scale": ("granite", edit_json("config.json", embedding_multiplier=6.0), "embedding"),
}  # fmt: skip


@pytest.mark.parametrize("type_name", ["Q2_K", "Q8_0"])
@pytest.mark.parametrize(("model", "change", "says"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_the_file_of_another_model_is_told(
    model: str, change: Callable[[Path], object], says: str, type_name: str, tmp_path: Path, run_cli: RunCli
) -> None:
    path = TINY_MODELS[model].write(tmp_path / "model")
    file = convert_plainly(path, tmp_path / "out.gguf", type_name)
    assert run_cli("verify", file, "--source", path, "-q").exit_code == 0
    change(path)
    done = run_cli("verify", file, "--source", path, "-q")
    assert done.exit_code == 1
    [*_warnings, line] = done.stderr.splitlines()
    assert says in line


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("type_name", ["Q2_K", "Q8_0"])
def test_every_family_passes(name: str, type_name: str, tmp_path: Path) -> None:
    """F16, and a mix of types with error feedback, are in test_families."""
    convert_plainly(TINY_MODELS[name].write(tmp_path / "model"), tmp_path / "out.gguf", type_name)


@pytest.mark.parametrize("name", ["glm4", "glm"])
def test_of_several_tokens_before_a_text_llama_cpp_adds_one(name: str, tmp_path: Path, run_cli: RunCli) -> None:
    tiny = replace(TINY_MODELS[name], write_tokenizer=write_glm_4_with_prefix)
    path, file = tiny.write(tmp_path / "model"), tmp_path / "out.gguf"
    done = run_cli("convert", path, "--bits", 16, "--types", "F16", "--no-imatrix", "-o", file, "-q")
    assert done.exit_code == 0, done.stderr
    assert "llama.cpp adds one token at most, but this tokenizer [gMASK]<sop>" in done.stderr
    verified = run_cli("verify", file, "--source", path, "-q")
    tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    [sop] = [token["id"] for token in tokens if token["content"] == "<sop>"]
    assert f"it leaves out {sop}" in verified.stdout
    edit_json("tokenizer.json", post_processor=None)(path)
    assert "transformers adds the tokens ([], [])" in run_cli("verify", file, "--source", path, "-q").stderr


@pytest.mark.parametrize("error_feedback", [False, True])
def test_every_type_passes(error_feedback: bool, calibration_text: Path, tmp_path: Path) -> None:
    """Each in some matrix of one file."""
    path = TINY_MODELS["smollm3"].write(tmp_path / "model")
    spec, names = ModelDirectory(path).spec, cycle(QUANT_TYPES)
    types = {t.name: next(names) if t.is_matrix else t.fixed_type for t in spec.tensors}
    assert set(types.values()) == set(QUANT_TYPES)
    plan = QuantPlan(
        spec.name, "by hand", "none", BitBudget("bits", 5), (1, 16), types, (), error_feedback=error_feedback
    )
    plan.save(tmp_path / "plan.json", {})
    request = request_of(path, 5, tmp_path / "out.gguf", measuring=on_text(calibration_text, 512))
    assert convert(replace(request, target=tmp_path / "plan.json")).equality is not None


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_K", "Q8_0"])
@pytest.mark.parametrize("name", ["smollm2", "qwen2"])
def test_massive_activations_and_biases_pass(name: str, type_name: str, tmp_path: Path) -> None:
    """As in trained models: a channel so large that others are rounded away, and biases of keys of hundreds."""

    def exaggerate(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][:, 7] *= 2000
        for tensor, values in weights.items():
            if tensor.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))):
                values[:, 7] *= 0.001
            if tensor.endswith("k_proj.bias"):
                values *= 400

    path = TINY_MODELS[name].write(tmp_path / "model")
    edit_weights(exaggerate)(path)
    convert_plainly(path, tmp_path / "out.gguf", type_name)


def test_a_fault_beside_massive_activations_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TINY_MODELS["smollm2"].write(tmp_path / "model")
    edit_weights(stretch_channel)(path)
    monkeypatch.setattr(Llama, "modules", tuple(_plain(module) for module in Llama.modules))
    with pytest.raises(VerificationError, match="computes embedding or layer 0 otherwise"):
        convert_plainly(path, tmp_path / "out.gguf", "Q4_K")


def test_without_proof_the_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    path, file = TINY_MODELS["smollm2"].write(tmp_path / "model"), tmp_path / "out.gguf"
    monkeypatch.setattr(Llama, "modules", tuple(_plain(module) for module in Llama.modules))
    refused = run_cli("convert", path, *PLAIN, "-o", file)
    assert refused.exit_code == 1
    assert "--no-proof keeps it" in refused.stderr
    assert not file.exists()
    assert run_cli("convert", path, *PLAIN, "-o", file, "--no-proof").exit_code == 0
    assert file.is_file()


def test_verify_tells_how_equal(tiny_model: Path, tmp_path: Path, run_cli: RunCli) -> None:
    file = convert_plainly(tiny_model, tmp_path / "out.gguf")
    document = json.loads(run_cli("verify", file, "--source", tiny_model, "--json").stdout)
    assert len(document["equality"]["layer_errors"]) == 3
    assert max(*document["equality"]["layer_errors"], document["equality"]["head_error"]) < 0.01


def test_a_file_of_another_shape_is_told(tiny_model: Path, tmp_path: Path) -> None:
    file = convert_plainly(tiny_model, tmp_path / "out.gguf")
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    edit_json("config.json", num_hidden_layers=2)(other)
    with pytest.raises(VerificationError, match=r"blk\.2\.attn_k\.weight is not one of its tensors"):
        check_equality(open_source(other), file, TEXT, ComputeOptions())


def odd(source: Path, target: Path, **values: Any) -> Path:
    """The same model, with a number that nobody knows: only llama.cpp runs it."""

    def change(given: dict[str, Any]) -> None:
        with_unheard_of_value(given)
        given.update(values)

    rewrite(source, target, change)
    assert not open_source(target, SourceOptions(allow_requantize=True)).has_transformers_model
    return target


@pytest.mark.parametrize("type_name", ["F16", "Q2_K", "Q8_0"])
@pytest.mark.parametrize("name", ["smollm2", "qwen3moe", "nemotron-h", "gemma4", "exaone4", "falcon-h1"])
def test_a_model_that_llama_cpp_runs_is_compared_with_itself(name: str, type_name: str, tmp_path: Path) -> None:
    """Layers behind the first, whose update counts without the embedding, are as far off as with transformers."""
    exact_type = "F32" if name == "falcon-h1" else "F16"
    exact = convert_plainly(TINY_MODELS[name].write(tmp_path / "model"), tmp_path / "exact.gguf", exact_type)
    file = convert_plainly(exact, tmp_path / "out.gguf", type_name)
    expected = check_equality(open_source(exact), file, TEXT, ComputeOptions())
    odd_file = odd(file, tmp_path / "odd-out.gguf")
    found = check_equality(open_source(odd(exact, tmp_path / "odd.gguf")), odd_file, TEXT, ComputeOptions())
    assert found.reference == "its source"
    assert found.layer_errors[1:] == pytest.approx(expected.layer_errors[1:], rel=0.2, abs=1e-3)
    assert found.head_error == pytest.approx(expected.head_error, rel=0.1, abs=1e-3)


@pytest.mark.parametrize("type_name", ["Q2_K", "Q8_0"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.layer_norm_rms_epsilon", 1e-4),
        ("llama.rope.freq_base", 5e5),
        ("tokenizer.ggml.add_bos_token", True),
    ],
)
def test_another_number_of_a_model_that_llama_cpp_runs_is_told(
    key: str, value: object, type_name: str, tmp_path: Path, run_cli: RunCli
) -> None:
    model = convert_plainly(TINY_MODELS["smollm2"].write(tmp_path / "model"), tmp_path / "exact.gguf")
    source = odd(model, tmp_path / "odd.gguf")
    file = odd(convert_plainly(model, tmp_path / "plain.gguf", type_name), tmp_path / "out.gguf")
    passed = run_cli("verify", file, "--source", source)
    assert passed.exit_code == 0, passed.stderr
    assert "layers in llama.cpp are at most" in passed.stdout
    done = run_cli("verify", odd(file, tmp_path / "changed.gguf", **{key: value}), "--source", source, "-q")
    assert done.exit_code == 1
    *_warnings, line = done.stderr.splitlines()
    assert f"{key} has another value" in line


@pytest.mark.parametrize("type_name", ["F16", "Q2_K", "Q8_0"])
def test_another_graph_is_told(type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where metadata say the same; here they are not compared."""
    monkeypatch.setattr("lieq_gguf.writing.graph_equality._OF_PEOPLE", ("general.", "lieq.", "llama."))
    model = convert_plainly(TINY_MODELS["smollm2"].write(tmp_path / "model"), tmp_path / "exact.gguf")
    source = open_source(odd(model, tmp_path / "odd.gguf"))
    file = convert_plainly(model, tmp_path / "plain.gguf", type_name)
    other = odd(file, tmp_path / "out.gguf", **{"llama.attention.layer_norm_rms_epsilon": 3.0})
    with pytest.raises(VerificationError, match="embedding or layer 0 otherwise than its source"):
        check_equality(source, other, TEXT, ComputeOptions())


@pytest.mark.parametrize("factor", [1, 3])
def test_a_layer_with_matrices_that_its_graph_does_not_take_is_compared(
    factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in a layer that uses those of an earlier one, which files of Gemma 3n and 4 can have."""
    monkeypatch.setattr(ComparedWeights, "compare_all", lambda _self: None)
    exact = convert_plainly(TINY_MODELS["gemma4"].write(tmp_path / "model"), tmp_path / "exact.gguf")
    file = convert_plainly(exact, tmp_path / "plain.gguf", "Q8_0")
    source, written = (with_unused_keys(path, path.with_stem(f"odd-{path.stem}")) for path in (exact, file))
    tensors = {t.spec.name: t for t in GgufFile(written).tensors}

    def louder(name: str, values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
        if name == "blk.3.post_ffw_norm.weight":
            return factor * values, F32.ggml_id
        return tensors[name].data, tensors[name].quant_type.ggml_id

    other = rewrite(written, tmp_path / "other.gguf", convert=louder)
    if factor == 1:
        assert len(check_equality(open_source(source), other, TEXT, ComputeOptions()).layer_errors) == 6
    else:
        with pytest.raises(VerificationError, match="computes layer 3 otherwise than its source"):
            check_equality(open_source(source), other, TEXT, ComputeOptions())


def with_unused_keys(source: Path, target: Path) -> Path:
    """The same model for llama.cpp alone, with the first layer's keys also in the fourth, of the same kind."""
    file, writer = GgufFile(source), HeaderWriter("")
    values: dict[str, Any] = {key: file.value_bytes(key) for key in file.keys}
    with_unheard_of_value(values)
    for key, value in values.items():
        if isinstance(value, bytes):
            writer.values[key] = value
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    named = [(t.spec.name, t) for t in file.tensors]
    named += [("blk.3.attn_k.weight", t) for name, t in named if name == "blk.0.attn_k.weight"]
    layouts = [TensorLayout(name, t.spec.shape, t.quant_type.ggml_id, t.data.nbytes) for name, t in named]
    write_gguf(target, writer.values, [(layout, t.data) for layout, (_, t) in zip(layouts, named, strict=True)])
    return target


def test_a_file_may_have_an_output_matrix_where_the_source_has_tied_embeddings(tmp_path: Path) -> None:
    """Each in a type of its own, and compared with the embedding of the source."""
    model = convert_plainly(TINY_MODELS["smollm2"].write(tmp_path / "model"), tmp_path / "exact.gguf")
    source = open_source(odd(model, tmp_path / "odd.gguf"))
    embedding = next(t for t in GgufFile(model).tensors if t.spec.name == "token_embd.weight")
    files = {}
    for sign in (1, -1):
        plain = odd(convert_plainly(model, tmp_path / f"{sign}.gguf", "Q2_K"), tmp_path / f"odd{sign}.gguf")
        tensors = [
            (TensorLayout(t.spec.name, t.spec.shape, t.quant_type.ggml_id, t.data.nbytes), t.data)
            for t in GgufFile(plain).tensors
        ]
        data = (sign * embedding.data.view(np.float16)).view(np.uint8)
        layout = TensorLayout("output.weight", embedding.spec.shape, embedding.quant_type.ggml_id, data.nbytes)
        content = GgufFile(plain)
        values = {key: content.value_bytes(key) for key in content.keys}
        files[sign] = tmp_path / f"with-output{sign}.gguf"
        write_gguf(files[sign], values, [*tensors, (layout, data)])
    assert check_equality(source, files[1], TEXT, ComputeOptions()).head_error < 0.01
    with pytest.raises(VerificationError, match="the output matrix has other weights"):
        check_equality(source, files[-1], TEXT, ComputeOptions())


def test_a_graph_that_shows_no_layers_is_compared_by_its_logits(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert_plainly(TINY_MODELS["smollm2"].write(tmp_path / "model"), tmp_path / "exact.gguf")
    monkeypatch.setattr("lieq_gguf.native.graph._LAYER_OUTPUT", re.compile("none"))
    monkeypatch.setattr("lieq_gguf.writing.graph_equality._OF_PEOPLE", ("general.", "lieq.", "llama."))
    source, file = odd(model, tmp_path / "odd.gguf"), tmp_path / "out.gguf"
    options = ("--types", "Q2_K", "--bits", 2.625, "--embedding-type", "F16", "--n-tokens", 64, "-q")
    made = run_cli("convert", source, *options, "-o", file)
    assert made.exit_code == 0, made.stderr
    passed = run_cli("verify", file, "--source", source)
    assert passed.exit_code == 0, passed.stderr
    assert "its logits are 0." in passed.stdout
    other = odd(file, tmp_path / "other.gguf", **{"llama.attention.layer_norm_rms_epsilon": 3.0})
    done = run_cli("verify", other, "--source", source, "-q")
    assert done.exit_code == 1
    assert "computes the logits otherwise" in done.stderr


def test_weights_of_a_model_that_llama_cpp_runs_are_compared(tmp_path: Path) -> None:
    path = TINY_MODELS["smollm2"].write(tmp_path / "model")
    file = odd(convert_plainly(path, tmp_path / "exact.gguf"), tmp_path / "odd.gguf")
    edit_weights(negate_up)(path)
    source = odd(convert_plainly(path, tmp_path / "other.gguf"), tmp_path / "odd-other.gguf")
    with pytest.raises(VerificationError, match=r"blk\.1\.ffn_up\.weight has other weights"):
        check_equality(open_source(source), file, TEXT, ComputeOptions())


def test_a_tokenizer_that_transformers_cannot_load_is_noted(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = TINY_MODELS["smollm2"].write(tmp_path / "model"), tmp_path / "out.gguf"
    convert_plainly(path, file)
    monkeypatch.setattr(ModelDirectory, "_transformers_tokenizer", None)
    done = run_cli("verify", file, "--source", path)
    assert done.exit_code == 0
    assert "so it was not compared which tokens it adds" in done.stderr


def test_a_bos_that_is_added_on_purpose_is_not_noted(tmp_path: Path, run_cli: RunCli) -> None:
    """Gemma 4's files leave it to the chat template, llama.cpp does not."""
    path, file = TINY_MODELS["gemma4"].write(tmp_path / "model"), tmp_path / "out.gguf"
    convert_plainly(path, file)
    done = run_cli("verify", file, "--source", path)
    assert done.exit_code == 0
    assert "not compared" not in done.stderr

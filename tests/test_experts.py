"""Mixtures of experts: what each expert sees and does, against transformers' stacked experts and plain sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.command import RunCli
from support.families import TINY_MODELS
from support.reports import edit_json, edit_weights
from support.requests import convert_plainly
from support.tolerances import FLOAT32_SUMS
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

from lieq_gguf.errors import SourceError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.formats.imatrix_file import load_importance, save_importance
from lieq_gguf.measure import llama_cpp_pass
from lieq_gguf.measure.experts import Experts, separate_matrices
from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.second_moments import SecondMoments
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.measure.type_errors import probe_matrix
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import measured
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.writing.feedback_pass import FeedbackPass

Bytes: TypeAlias = npt.NDArray[np.uint8]
N_EXPERTS = 8
ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_MODELS["qwen3moe"].write(tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def tokens(model: Path) -> CalibrationTokens:
    n_vocab = ModelDirectory(model).spec.config["vocab_size"]
    return CalibrationTokens(np.random.default_rng(1).integers(8, n_vocab - 8, (2, 128)), "random")


@pytest.fixture(scope="module")
def streamed(model: Path, tokens: CalibrationTokens) -> PassResult:
    types = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"])
    exact = ComputeOptions(n_threads=2, in_float32=True)
    return run_pass(ModelDirectory(model), tokens, PassOptions(error_types=types, compute=exact))


class Whole:
    """transformers' model in one piece; inputs and outputs of its mixtures and layers."""

    def __init__(self, path: Path, tokens: CalibrationTokens) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.requires_grad_(False)
        self.mixtures: list[Qwen3MoeSparseMoeBlock] = [layer.mlp for layer in self.model.layers]
        self.inputs: dict[int, torch.Tensor] = {}
        for index, mixture in enumerate(self.mixtures):
            mixture.register_forward_pre_hook(self._keep(index))
        with torch.inference_mode():
            self.hidden = self.model(
                torch.from_numpy(tokens.ids), output_hidden_states=True, use_cache=False
            ).hidden_states

    def _keep(self, index: int) -> Callable[..., None]:
        return lambda _module, inputs: self.inputs.update({index: inputs[0].reshape(-1, inputs[0].shape[-1])})

    def expert_inputs(self, layer: int, expert: int) -> torch.Tensor:
        _, _, chosen = self.mixtures[layer].gate(self.inputs[layer])
        return self.inputs[layer][(chosen == expert).any(dim=-1)]


@pytest.fixture(scope="module")
def whole(model: Path, tokens: CalibrationTokens) -> Whole:
    return Whole(model, tokens)


def test_experts_with_modules_compute_what_stacked_ones_do(whole: Whole) -> None:
    holder = nn.ModuleList([whole.mixtures[0].experts])
    hidden = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    _, shares, chosen = whole.mixtures[0].gate(hidden)
    with torch.inference_mode():
        expected = holder[0](hidden, chosen, shares)
        separate_matrices(holder)
        found = holder[0](hidden, chosen, shares)
    assert isinstance(holder[0], Experts) and isinstance(whole.mixtures[0].experts, Qwen3MoeExperts)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_SUMS * float(expected.std()))


def test_experts_of_gpt_oss_with_modules_compute_what_stacked_ones_do() -> None:
    """With gates and ups beyond their limit, which are in turn in transformers."""
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=64, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    stacked: Any = GptOssExperts(config)  # type: ignore[no-untyped-call]
    holder = nn.ModuleList([stacked]).requires_grad_(False)
    for parameter in holder.parameters():
        parameter.normal_()
    hidden, chosen = torch.randn(64, 64), torch.rand(64, 4).argsort(1)[:, :2]
    shares = torch.rand(64, 2)
    with torch.inference_mode():
        expected = holder[0](hidden, chosen, shares)
        beyond = [part.abs() > config.swiglu_limit for part in (hidden @ stacked.gate_up_proj[0]).T.chunk(2)]
        separate_matrices(holder)
        found = holder[0](hidden, chosen, shares)
    assert isinstance(holder[0], Experts) and all(bool(part.any()) for part in beyond)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_SUMS * float(expected.std()))


@pytest.mark.parametrize("layer", [0, 1])
def test_importance_is_by_expert(streamed: PassResult, whole: Whole, layer: int) -> None:
    importance = streamed.importance
    for expert in range(N_EXPERTS):
        inputs = whole.expert_inputs(layer, expert).double()
        for role in ROLES[:2]:
            name = f"blk.{layer}.{role}.weight"
            assert importance.counts[name][expert] == len(inputs)
            np.testing.assert_allclose(importance.in_sum2[name][expert], (inputs**2).sum(0), rtol=1e-3)
        gate, up = whole.mixtures[layer].experts.gate_up_proj[expert].detach().double().chunk(2)
        middle = nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
        down = importance.in_sum2[f"blk.{layer}.ffn_down_exps.weight"][expert]
        np.testing.assert_allclose(down, (middle**2).sum(0), rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_llama_cpps_own_pass_sees_the_same_of_each_expert(name: str, tmp_path: Path) -> None:
    model = TINY_MODELS[name].write(tmp_path / "model")
    n_vocab = ModelDirectory(model).spec.config["vocab_size"]
    tokens = CalibrationTokens(np.random.default_rng(1).integers(8, n_vocab - 8, (2, 128)), "random")
    file = GgufSource(convert_plainly(model, tmp_path / "f16.gguf"))
    nothing_else = PassOptions(statistics=frozenset(), compute=ComputeOptions(n_threads=2, in_float32=True))
    found = llama_cpp_pass.run_pass(file, tokens, nothing_else).importance
    ours = run_pass(ModelDirectory(model), tokens, nothing_else).importance
    assert found.counts.keys() == ours.counts.keys()
    for name, counts in ours.counts.items():
        # a token a hair's breadth away from another expert goes there: 2 % where products are added in F16, 40 % of the
        # counts differ between neighbouring experts
        assert np.abs(found.counts[name] - counts).sum() <= 0.1 * counts.sum()
        ours_mean, found_mean = np.array(ours.mean(name)), np.array(found.mean(name))
        # and is one of some sixty that an expert sees, 0.02 of its mean; those of two experts are 0.18 and more apart
        assert float(np.median(np.abs(found_mean / ours_mean - 1))) < 0.05


def test_gate_and_up_of_gemma_4_stay_one_matrix_and_are_counted_by_expert(tmp_path: Path) -> None:
    path = TINY_MODELS["gemma4-moe"].write(tmp_path / "model")
    source = ModelDirectory(path)
    ids = np.random.default_rng(1).integers(8, source.spec.config["vocab_size"] - 8, (2, 128))
    options = PassOptions(compute=ComputeOptions(n_threads=2, in_float32=True))
    importance = run_pass(source, CalibrationTokens(ids, "random"), options).importance
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.requires_grad_(False)
    given: list[tuple[torch.Tensor, ...]] = []
    whole.layers[1].experts.register_forward_pre_hook(lambda _module, inputs: given.append(inputs))
    with torch.inference_mode():
        whole(torch.from_numpy(ids), use_cache=False)
    [(hidden, chosen, _)] = given
    for expert in range(N_EXPERTS):
        inputs = hidden[(chosen == expert).any(dim=-1)].double()
        gate, up = (inputs @ whole.layers[1].experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        middle = nn.functional.gelu(gate, approximate="tanh") * up
        for role, expected in (("ffn_gate_up_exps", inputs), ("ffn_down_exps", middle)):
            name = f"blk.1.{role}.weight"
            assert importance.counts[name][expert] == len(inputs)
            np.testing.assert_allclose(importance.in_sum2[name][expert], (expected**2).sum(0), rtol=1e-3)


def test_an_expert_without_tokens_gets_the_importance_of_the_others() -> None:
    sums = np.array([[2.0, 4.0], [0.0, 0.0], [6.0, 2.0]], dtype=np.float32)
    counts = np.array([2, 0, 2], dtype=np.float32)
    importance = ImportanceMatrix({"a": sums}, 4, 4, "text", {"a": counts})
    np.testing.assert_allclose(np.array(importance.mean("a")), [[1.0, 2.0], [2.0, 1.5], [3.0, 1.0]])
    assert importance.n_unseen == 1
    np.testing.assert_allclose(importance.expert_shares("a", 3), [0.5, 0.0, 0.5])


def test_importance_of_experts_survives_its_file(streamed: PassResult, model: Path, tmp_path: Path) -> None:
    save_importance(streamed.importance, tmp_path / "imatrix.gguf")
    loaded = load_importance(tmp_path / "imatrix.gguf")
    assert loaded.digest() == streamed.importance.digest()
    loaded.check(ModelDirectory(model).spec)


@pytest.mark.parametrize("role", ROLES)
def test_damage_is_that_of_all_experts_at_once(
    role: str, streamed: PassResult, model: Path, whole: Whole, tokens: CalibrationTokens
) -> None:
    name, source = f"blk.1.{role}.weight", ModelDirectory(model)
    tensor = next(t for t in source.spec.tensors if t.name == name)
    means = np.array(streamed.importance.mean(name))
    probes = [probe_matrix(w.float().numpy(), m) for w, m in zip(source.read(tensor), means, strict=True)]
    shares = streamed.importance.expert_shares(name, N_EXPERTS)
    energies = [p.energy * s for p, s in zip(probes, shares, strict=True)]
    probe_error = sum(p.relative_error * e for p, e in zip(probes, energies, strict=True)) / sum(energies)
    found = streamed.sensitivities[name] * probe_error  # the block error of the probe

    experts = whole.mixtures[1].experts
    stacked, rows = {
        "ffn_gate_exps": (experts.gate_up_proj, slice(0, 256)),
        "ffn_up_exps": (experts.gate_up_proj, slice(256, 512)),
        "ffn_down_exps": (experts.down_proj, slice(None)),
    }[role]
    kept = stacked.detach().clone()
    last: list[torch.Tensor] = []
    hook = whole.model.layers[1].register_forward_hook(lambda _module, _inputs, output: last.append(output))
    with torch.inference_mode():
        whole.model(torch.from_numpy(tokens.ids), use_cache=False)
        for index, probe in enumerate(probes):
            stacked[index, rows] = torch.from_numpy(probe.decoded)
        whole.model(torch.from_numpy(tokens.ids), use_cache=False)
        stacked.copy_(kept)
    hook.remove()
    change = (last[1] - last[0]).square().sum(dim=-1) / last[0].square().sum(dim=-1)
    assert found == pytest.approx(float(change.mean()), rel=0.02)


@pytest.mark.parametrize("role", ROLES)
def test_errors_by_type_are_near_the_true_ones(role: str, streamed: PassResult, model: Path) -> None:
    name, source = f"blk.0.{role}.weight", ModelDirectory(model)
    tensor = next(t for t in source.spec.tensors if t.name == name)
    means = np.array(streamed.importance.mean(name))
    shares = streamed.importance.expert_shares(name, N_EXPERTS)
    for type_name, estimate in streamed.type_errors[name].items():
        quant_type, error, energy = QUANT_TYPES[type_name], 0.0, 0.0
        for loaded, mean, share in zip(source.read(tensor), means, shares, strict=True):
            weights = np.ascontiguousarray(loaded.float().numpy())
            decoded = ggml.dequantize(ggml.quantize(weights, quant_type, mean), quant_type)
            error += share * float((mean * (weights - decoded) ** 2).sum())
            energy += share * float((mean * weights**2).sum())
        assert estimate == pytest.approx(error / energy, rel=0.1)


def test_scores_leave_experts_out(streamed: PassResult) -> None:
    for measurement in streamed.measurements:
        assert set(measured(measurement.spectra)) == {"attn_q", "attn_k", "attn_v", "attn_output"}
        assert set(ROLES) < set(measured(measurement.block_errors))


def test_experts_are_written_one_behind_the_other(
    run_cli: RunCli, model: Path, streamed: PassResult, tmp_path: Path
) -> None:
    save_importance(streamed.importance, tmp_path / "imatrix.gguf")
    output = tmp_path / "small.gguf"
    done = run_cli(
        "convert", model, "--types", "Q2_K", "--bits", 2.625, "--imatrix", tmp_path / "imatrix.gguf",
        "--no-error-feedback", "-q", "-o", output,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    source, file = ModelDirectory(model), GgufFile(output)
    stored = {t.spec.name: t for t in file.tensors}
    assert stored["blk.0.ffn_gate_inp.weight"].quant_type.name == "F32"
    for tensor in (t for t in source.spec.tensors if t.of_experts):
        means = np.array(streamed.importance.mean(tensor.name))
        rows = np.split(stored[tensor.name].data, N_EXPERTS)
        for loaded, mean, data in zip(source.read(tensor), means, rows, strict=True):
            expected = ggml.quantize(np.ascontiguousarray(loaded.float().numpy()), QUANT_TYPES["Q2_K"], mean)
            assert np.array_equal(data, expected)


def fed_back(model: Path, tokens: CalibrationTokens, importance: ImportanceMatrix | None) -> dict[str, Bytes]:
    """Rows of the matrices of experts in Q2_K with error feedback, by the name of their tensor."""
    source = ModelDirectory(model)
    types = {t.name: "Q2_K" if t.layer is not None and t.is_matrix else t.fixed_type for t in source.spec.tensors}
    types |= {t.name: "F16" for t in source.spec.outer_matrices}
    plan = QuantPlan("model", "by hand", "none", BitBudget("bits", 2.625), (1, 16), types, (), error_feedback=True)
    exact = ComputeOptions(n_threads=2, in_float32=True)
    encoded = FeedbackPass(source, plan, tokens, importance, exact).encoded()
    return {rows.tensor.name: rows.data for rows in encoded if rows.tensor.of_experts}


def test_error_feedback_reaches_every_expert(
    model: Path, tokens: CalibrationTokens, streamed: PassResult, whole: Whole
) -> None:
    """On its own tokens, each matrix of each expert is closer to what it was."""
    found = fed_back(model, tokens, streamed.importance)
    experts = whole.mixtures[0].experts
    for expert in range(N_EXPERTS):
        inputs = whole.expert_inputs(0, expert)
        gate, up = experts.gate_up_proj[expert].chunk(2)
        inner = nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
        of_roles = zip(ROLES, (gate, up, experts.down_proj[expert]), (inputs, inputs, inner), strict=True)
        for role, weight, given in of_roles:
            name = f"blk.0.{role}.weight"
            mean = streamed.importance.mean(name)
            assert mean is not None
            plain = ggml.quantize(np.ascontiguousarray(weight.numpy()), QUANT_TYPES["Q2_K"], mean[expert])
            with_feedback = np.split(found[name], N_EXPERTS)[expert]
            of_plain, of_feedback = (
                float(((torch.from_numpy(ggml.dequantize(data, QUANT_TYPES["Q2_K"])) - weight) @ given.T).norm())
                for data in (plain, with_feedback)
            )
            assert of_feedback < 0.97 * of_plain, (role, expert)


def test_an_expert_without_tokens_has_no_feedback(model: Path) -> None:
    few = CalibrationTokens(np.array([[11, 12]]), "few")
    exact = ComputeOptions(n_threads=2, in_float32=True)
    importance = run_pass(ModelDirectory(model), few, PassOptions(statistics=frozenset(), compute=exact)).importance
    found, name = fed_back(model, few, importance), "blk.0.ffn_down_exps.weight"
    [tensor] = [t for t in ModelDirectory(model).spec.tensors if t.name == name]
    mean, weights = importance.mean(name), ModelDirectory(model).read(tensor).float().numpy()
    assert mean is not None
    unseen = np.flatnonzero(importance.counts[name] == 0)
    assert 0 < len(unseen) < N_EXPERTS
    for expert in range(N_EXPERTS):
        plain = ggml.quantize(np.ascontiguousarray(weights[expert]), QUANT_TYPES["Q2_K"], mean[expert])
        assert np.array_equal(np.split(found[name], N_EXPERTS)[expert], plain) == (expert in unseen)


def test_moments_of_kept_inputs_are_those_of_sums() -> None:
    batches = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0)).unbind()
    summed, kept = SecondMoments({"a"}, False), SecondMoments(set(), False, {"a"})
    for moments in (summed, kept):
        for batch in batches:
            moments.see_input("a", batch)
        assert moments.groups() == [["a"]]
        assert moments.n_tokens("a") == 60
    torch.testing.assert_close(kept.take("a"), summed.take("a"), rtol=0, atol=1e-5)


def test_more_stacked_experts_than_config_json_says_are_refused(tmp_path: Path) -> None:
    path = TINY_MODELS["gpt-oss"].write(tmp_path / "model")
    edit_json("config.json", num_local_experts=4)(path)
    edit_weights(lambda w: w.update({n: t[:4] for n, t in w.items() if ".router." in n}))(path)
    with pytest.raises(SourceError, match=r"experts\..* has 8 experts; by config\.json expected 4"):
        ModelDirectory(path)


def test_unseen_experts_are_warned_of(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one " * 40, encoding="utf-8")
    done = run_cli("imatrix", model, "--calibration", text, "--n-tokens", 16, "-o", tmp_path / "imatrix.gguf")
    assert done.exit_code == 0, done.stderr
    assert "no calibration token reached" in done.stderr

"""Tests for error feedback of the output matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import write_model

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.second_moments import output_moments
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.writing.output_feedback import OutputFeedback

IQ3_S = QUANT_TYPES["IQ3_S"]


@dataclass(frozen=True)
class Case:
    """A model whose output matrix gets IQ3_S, and states behind its last layer, some of them to measure on."""

    source: ModelDirectory
    layer: LayerModel
    states: torch.Tensor
    other_states: torch.Tensor

    @classmethod
    def of(cls, path: Path) -> Case:
        source = ModelDirectory(path)
        layer = LayerModel.of(source, ComputeOptions(in_float32=True))
        random = torch.Generator().manual_seed(0)
        mixed = torch.randn(64, 256, generator=random)  # so that the states' columns hang together
        states = torch.randn(8, 256, 64, generator=random) @ mixed
        return cls(source, layer, states[:4], states[4:])

    def plan(self, type_name: str = "IQ3_S") -> QuantPlan:
        types = {t.name: "F32" for t in self.source.spec.tensors} | {self.source.spec.output_matrix.name: type_name}
        return QuantPlan("a model", "best", "lieq", BitBudget("bits", 4.0), (2.0, 16.0), types, ())

    def importance(self) -> ImportanceMatrix:
        sums = self.inputs(self.states).square().sum(dim=0).numpy()
        return ImportanceMatrix({self.source.spec.output_matrix.name: sums}, 1024, 256, "test")

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        return self.layer.final_norm(self.source)(states).detach().reshape(-1, 256)  # type: ignore[no-any-return]

    def weights(self) -> torch.Tensor:
        return self.source.read(self.source.spec.output_matrix).float()

    def feedback(self, states: torch.Tensor, intact: torch.Tensor | None = None) -> OutputFeedback:
        moments, lack = output_moments(self.layer.final_norm(self.source), states, intact)
        return OutputFeedback(self.source, self.plan(), self.importance(), moments.detach(), lack)

    def encoded(self, feedback: OutputFeedback, n_threads: int = 1) -> torch.Tensor:
        parts = list(feedback.encoded(n_threads))
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
        return torch.from_numpy(ggml.dequantize(np.concatenate([part.data for part in parts]), IQ3_S))

    def logit_error(self, found: torch.Tensor, states: torch.Tensor, intact: torch.Tensor) -> float:
        wanted = self.inputs(intact) @ self.weights().T
        change = self.inputs(states) @ found.T - wanted
        return float(change.square().sum() / wanted.square().sum())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(write_model(tmp_path_factory.mktemp("output") / "model", tie_word_embeddings=request.param))


def test_logits_are_closer_than_with_importance_alone(case: Case) -> None:
    importance = case.importance().mean(case.source.spec.output_matrix.name)
    plain = torch.from_numpy(ggml.dequantize(encoders.quantize(case.weights().numpy(), IQ3_S, importance), IQ3_S))
    fed = case.encoded(case.feedback(case.states))
    before, after = (case.logit_error(found, case.other_states, case.other_states) for found in (plain, fed))
    assert after < 0.5 * before


def test_what_states_lack_is_partly_made_good(case: Case) -> None:
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(256, 256, generator=random) / 16
    lacking = case.states + 0.3 * case.states @ noise
    plain = case.encoded(case.feedback(lacking))
    moved = case.encoded(case.feedback(lacking, case.states))
    other = case.other_states + 0.3 * case.other_states @ noise
    before, after = (case.logit_error(found, other, case.other_states) for found in (plain, moved))
    assert after < 0.8 * before


def test_bytes_do_not_depend_on_threads(case: Case) -> None:
    feedback = case.feedback(case.states)
    assert torch.equal(case.encoded(feedback), case.encoded(feedback, n_threads=3))


def test_rows_alone_are_those_of_the_matrix(case: Case) -> None:
    """The layers are run with the rows that the file has; sums in another order may round a few codes otherwise."""
    feedback = case.feedback(case.states)
    rows = [3, 40, 500]
    alone = ggml.dequantize(feedback.encode(case.weights()[rows].numpy(), 1), IQ3_S)
    whole = case.encoded(feedback)[rows].numpy()
    assert np.mean(alone != whole) < 0.01


@pytest.mark.parametrize(("type_name", "applies"), [("IQ3_S", True), ("F16", False)])
def test_plain_numbers_need_none(case: Case, type_name: str, applies: bool) -> None:
    assert OutputFeedback.applies(case.source, case.plan(type_name)) is applies

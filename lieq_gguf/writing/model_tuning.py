"""Tunes a model as a whole: factors of all blocks and norms are trained together, by gradients, so that answers stay.

What is minimised is what ``eval`` measures, the divergence of the next-token distribution from the intact model's. The
numbers of one layer are decoded at a time, when they are needed, and what a layer computes is computed again for the
gradients. So tuning needs memory for the encoded tensors, one layer, and the states between the layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.measure.torch_setup import keep_freed_memory, rounding_products
from lieq_gguf.native import ggml
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.source import Source
from lieq_gguf.writing.tunable import LARGEST_FACTOR, WrittenTensor
from lieq_gguf.writing.writer import EncodedRows

IntArray = npt.NDArray[np.int64]

_N_EPOCHS = 2
_STEP_SEQUENCES = 2
_LEARNING_RATE, _LAST_RATE = 1e-3, 5e-5  # falling in a straight line
_BETAS = (0.9, 0.99)
_HELD_OUT = 16  # one of so many sequences decides whether factors are kept
_LOGITS = 1 << 24  # held at a time
_RUNS_OF_LAYER = 4 / 3  # a layer runs a second time for its gradients
_RUNS_OF_HEAD = 4  # products of the intact model's, the file's, and their gradients


class ModelTuning:
    """Tuning of one file.

    Attributes:
        divergences: On held-out calibration sequences, before and after, in nats a token; None until it is done.
    """

    def __init__(self, source: Source, plan: QuantPlan, tokens: CalibrationTokens, compute: ComputeOptions) -> None:
        """Prepare tuning.

        Args:
            source: The intact model.
            plan: One type per tensor.
            tokens: What to tune on.
            compute: Device, threads and precision.

        Raises:
            CalibrationError: if the device is not available.
        """
        self.divergences: tuple[float, float] | None = None
        self._source = source
        self._plan = plan
        self._ids = tokens.ids
        self._layer = LayerModel.of(source, compute)
        self._named: dict[str, WrittenTensor] = {}
        self._logarithms: dict[str, torch.Tensor] = {}

    def expected_bytes(self) -> int:
        """Memory of the encoded tensors, a decoded layer, states, and logits."""
        spec = self._source.spec
        encoded = sum(QUANT_TYPES[self._plan.types[t.name]].tensor_bytes(t.shape) for t in spec.tensors)
        decoded = max(sum(t.n_weights for t in layer) for layer in spec.layer_matrices)
        states = self._layer.state_width * (2 * self._ids.size + spec.n_layers * _STEP_SEQUENCES * self._ids.shape[1])
        return int(encoded + 10 * decoded + 4 * states + 16 * _LOGITS + 2 * spec.embedding.n_weights)

    def expected_seconds(self) -> float:
        """Time, estimated from one step through the first layer."""
        layer, spec = self._layer, self._source.spec
        layer.load(self._source, 0)
        states = torch.randn(_STEP_SEQUENCES, self._ids.shape[1], layer.state_width)
        states = layer.with_hidden(torch.zeros_like(states), layer.hidden_part(states))
        one = torch.ones(1, requires_grad=True, device=layer.device)
        matrices = {name: p for name, p in layer.layer.named_parameters() if p.ndim > 1}
        start = time.perf_counter()
        with torch.enable_grad():
            output = layer.run(states, {name: p * one for name, p in matrices.items()})
            output.square().mean().backward()  # type: ignore[no-untyped-call]
        of_layer = (time.perf_counter() - start) * _RUNS_OF_LAYER
        per_weight = of_layer / sum(t.n_weights * t.active_share for t in spec.layer_matrices[0])
        of_head = per_weight * spec.embedding.n_weights * _RUNS_OF_HEAD / (4 * _RUNS_OF_LAYER)
        n_steps = _N_EPOCHS * -(-len(self._ids) // _STEP_SEQUENCES)
        return n_steps * (spec.n_layers * of_layer + of_head)

    def take(self, encoded: Iterable[EncodedRows], advance: Callable[[float], None]) -> None:
        """Take all tensors of the file; ``advance`` is called with the number of weights."""
        rows: list[npt.NDArray[np.uint8]] = []
        for part in encoded:
            rows.append(part.data)
            advance(len(part.data) / part.tensor.n_rows * part.tensor.n_weights)
            if part.is_last:
                quant_type = QUANT_TYPES[self._plan.types[part.tensor.name]]
                data = np.concatenate([np.atleast_2d(data).view(np.uint8) for data in rows])
                self._named[part.tensor.name] = WrittenTensor(part.tensor, quant_type, data)
                rows = []

    def tuned(self, advance: Callable[[float], None]) -> Iterator[EncodedRows]:
        """All tensors with their factors, in file order; ``advance`` is called with the share that is done."""
        self._logarithms = {
            name: torch.zeros(written.factors_shape, device=self._layer.device, requires_grad=True)
            for name, written in self._named.items()
            if (written.tensor.layer is not None or name == self._source.spec.final_norm.name) and written.is_tunable
        }
        with rounding_products(self._layer.in_bfloat16):
            self._train(advance)
        for name, written in self._named.items():
            if name in self._logarithms:
                written = written.multiplied(self._logarithms[name].detach().exp().cpu().numpy())
            yield EncodedRows(written.tensor, written.data, is_last=True)

    def _train(self, advance: Callable[[float], None]) -> None:
        """Find the factors: those after the epoch with the least divergence on sequences that were held out."""
        intact, states = self._prepared()
        trained, held_out = _divided(len(self._ids))
        parameters = list(self._logarithms.values())
        best = before = self._mean_divergence(states, intact, held_out)
        kept = [values.detach().clone() for values in parameters]
        optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE, betas=_BETAS)
        n_per_epoch = -(-len(trained) // _STEP_SEQUENCES)
        n_steps = _N_EPOCHS * n_per_epoch
        fall = 1 - _LAST_RATE / _LEARNING_RATE
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - fall * min(1.0, step / n_steps))
        order = np.random.default_rng(0)
        for _ in range(_N_EPOCHS):
            for rows in np.array_split(order.permutation(trained), n_per_epoch):
                with torch.enable_grad():
                    self._divergence(states[rows], intact[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                _limit(parameters)
                advance(1 / n_steps)
            after = self._mean_divergence(states, intact, held_out)
            if after < best:
                best, kept = after, [values.detach().clone() for values in parameters]
        for values, best_values in zip(parameters, kept, strict=True):
            values.data.copy_(best_values)
        self.divergences = before, best

    def _prepared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States behind the intact model, and those before the file's first layer; makes both output heads."""
        source, layer, spec = self._source, self._layer, self._source.spec
        keep_freed_memory()
        with torch.no_grad():
            intact = layer.embed(source, self._ids)
            for index in range(spec.n_layers):
                layer.load(source, index)
                intact = layer.forward(intact)
            layer.forget()
            states = layer.embed(source, self._ids, self._rows_of)
        output = spec.output_matrix
        self._intact_head = layer.output_head(source, source.read(output))
        self._head = layer.output_head(source, self._named[output.name].numbers().half())
        return intact, states

    def _rows_of(self, tensor: TensorSpec, rows: Sequence[int]) -> torch.Tensor:
        written = self._named[tensor.name]
        return torch.from_numpy(ggml.dequantize(np.ascontiguousarray(written.data[rows]), written.quant_type))

    def _mean_divergence(self, states: torch.Tensor, intact: torch.Tensor, rows: IntArray) -> float:
        with torch.no_grad():
            return float(np.mean([float(self._divergence(states[[row]], intact[[row]])) for row in rows]))

    def _divergence(self, states: torch.Tensor, intact: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens of states before the first layer, and behind the last of the intact model."""
        for index in range(self._source.spec.n_layers):
            of_layer = [written for written in self._named.values() if written.tensor.layer == index]
            logarithms = [self._logarithms.get(written.tensor.name) for written in of_layer]
            states = checkpoint(
                self._after_layer, index, of_layer, states, *logarithms,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        found, expected = (self._layer.hidden_part(part).flatten(0, -2) for part in (states, intact))
        step = max(16, _LOGITS // self._head.n_vocab)
        of_norm = self._logarithms[self._source.spec.final_norm.name]
        sums: list[torch.Tensor] = []
        for start in range(0, len(found), step):
            parts = expected[start : start + step], found[start : start + step], of_norm
            if torch.is_grad_enabled():
                sums.append(_WithGradients.apply(self._sum_of_divergences, *parts))  # type: ignore[no-untyped-call]
            else:
                sums.append(self._sum_of_divergences(*parts))
        return torch.stack(sums).sum() / len(found)

    def _after_layer(
        self, index: int, tensors: Sequence[WrittenTensor], states: torch.Tensor, *logarithms: torch.Tensor | None
    ) -> torch.Tensor:
        self._layer.select(index)
        dtype = torch.bfloat16 if self._layer.in_bfloat16 else torch.float32
        weights = self._layer.header_parameters(self._source.spec, index)
        for written, values in zip(tensors, logarithms, strict=True):
            weights |= written.in_model_form(None if values is None else values.exp(), dtype, self._layer.device)
        return self._layer.run(states, weights)

    def _sum_of_divergences(self, intact: torch.Tensor, found: torch.Tensor, of_norm: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = self._intact_head.logits(intact).log_softmax(dim=-1)
        result = self._head.logits(found, of_norm.exp()[0]).log_softmax(dim=-1)
        return nn.functional.kl_div(result, expected, reduction="sum", log_target=True).cpu()


class _WithGradients(torch.autograd.Function):
    """``function(given, *inputs)``, a number. Gradients to the inputs are made at once, since its graph is large."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], given: torch.Tensor, *inputs: torch.Tensor) -> Any:
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in inputs]
            result = function(given, *leaves)
            ctx.save_for_backward(*torch.autograd.grad(result, leaves))
        return result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, None, *(gradient.to(each.device) * each for each in ctx.saved_tensors)


def _divided(n_sequences: int) -> tuple[IntArray, IntArray]:
    """Indices of the sequences to train on, and of those held out; of a single one, it is both."""
    numbers = np.arange(n_sequences)
    is_held_out = numbers % _HELD_OUT == min(_HELD_OUT, n_sequences) // 2
    return numbers[~is_held_out] if n_sequences > 1 else numbers, numbers[is_held_out]


def _limit(parameters: Iterable[torch.Tensor]) -> None:
    limit = math.log(LARGEST_FACTOR)
    for values in parameters:
        values.data.clamp_(-limit, limit)

"""What quantising does to a layer: the error of each type in each matrix, and of each matrix in the layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.layer_model import LayerModel
from lieq_gguf.observers import Observer, TokenSample
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.type_errors import Probe, probe_matrix, relative_errors

_N_SAMPLED_EXPERTS = 4  # whose errors by type stand for those of all


class QuantizationDamage(Observer):
    """Probes every matrix with a fast type and runs the layer with it.

    Attributes:
        type_errors: Tensor name to type name to weighted relative error.
        block_errors: Tensor name to block error of the probe: mean over tokens of ``‖h' − h‖² / ‖h‖²`` of the layer's
            output, ``h'`` with this one tensor quantised. Empty without ``sample``.
        probe_errors: Tensor name to weighted relative error of the probe.
        drifted: Hidden states of the sample behind the layers so far, all of them quantised with the probe.
    """

    def __init__(
        self,
        types: Sequence[QuantType],
        importance: ImportanceMatrix | None,
        sample: TokenSample | None,
        n_threads: int,
    ) -> None:
        """Measure while the pass goes on.

        Args:
            types: Types whose errors to estimate.
            importance: Weights of the squared errors, a layer's known once the layer is done; or None.
            sample: Index into the hidden states that gives the tokens to run the layer on; None for no block errors.
            n_threads: Threads of the encoders.
        """
        self.type_errors: dict[str, dict[str, float]] = {}
        self.block_errors: dict[str, float] = {}
        self.probe_errors: dict[str, float] = {}
        self.drifted: torch.Tensor | None = None
        self._types = types
        self._importance = importance
        self._sample = sample
        self._n_threads = n_threads

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Probe the layer's matrices, then run the layer with one tensor quantised after the other."""
        probes = [self._probe(layer, tensor, modules) for tensor, modules in layer.modules.items()]
        self.probe_errors |= {probe.tensor.name: probe.relative_error for probe in probes}
        sampled = [probe.sampled() for probe in probes]
        errors = iter(relative_errors([p for some in sampled for p in some], self._types, self._n_threads))
        for probe, some in zip(probes, sampled, strict=True):
            self.type_errors[probe.tensor.name] = probe.errors_by_type(list(islice(errors, len(some))))
        if self._sample is None:
            return
        before = hidden[self._sample]
        with layer.recording() as record:
            wanted = layer.forward(before)
        for probe in probes:
            first = next(name for name in record if name in probe.modules)
            with probe.put_into(layer), layer.replaying(record, until=first):
                self.block_errors[probe.tensor.name] = relative_change(wanted, layer.forward(before))
        with ExitStack() as all_replaced:
            for probe in probes:
                all_replaced.enter_context(probe.put_into(layer))
            self.drifted = layer.forward(before if self.drifted is None else self.drifted)

    def _probe(self, layer: LayerModel, tensor: TensorSpec, modules: Sequence[str]) -> _TensorProbe:
        means = None if self._importance is None else self._importance.mean(tensor.name)
        shares = np.ones(1, dtype=np.float32)
        if tensor.of_experts and self._importance is not None:
            shares = self._importance.expert_shares(tensor.name, len(modules))
        probes = {}
        for index, module in enumerate(modules):
            mean = means[index] if means is not None and tensor.of_experts else means
            probes[module] = probe_matrix(layer.weight(module).cpu().numpy(), mean, self._n_threads)
        return _TensorProbe(tensor, probes, np.broadcast_to(shares, len(modules)))


@dataclass(frozen=True)
class _TensorProbe:
    """The matrices of a tensor, probed: one, or that of every expert.

    Attributes:
        tensor: The tensor.
        modules: Probes by linear module.
        shares: How much each counts ``[n_modules]``: the share of the tokens that reach it.
    """

    tensor: TensorSpec
    modules: Mapping[str, Probe]
    shares: npt.NDArray[np.float32]

    @property
    def relative_error(self) -> float:
        """``Σ im·(W − Ŵ)² / Σ im·W²`` of all together."""
        energies = [p.energy * float(share) for p, share in zip(self.modules.values(), self.shares, strict=True)]
        errors = [p.relative_error * energy for p, energy in zip(self.modules.values(), energies, strict=True)]
        return sum(errors) / sum(energies) if sum(energies) > 0 else 0.0

    def sampled(self) -> list[Probe]:
        """The matrix, or those of the experts that most tokens reach."""
        most = np.argsort(-self.shares, kind="stable")[:_N_SAMPLED_EXPERTS]
        probes = list(self.modules.values())
        return [probes[i] for i in most]

    def errors_by_type(self, of_sampled: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Relative error by type, from that of the sampled: as many times the probe's error as there."""
        if len(of_sampled) == 1:
            return dict(of_sampled[0])
        probed = sum(probe.relative_error for probe in self.sampled())
        scale = self.relative_error / probed if probed > 0 else 1 / len(of_sampled)
        return {name: sum(errors[name] for errors in of_sampled) * scale for name in of_sampled[0]}

    @contextmanager
    def put_into(self, layer: LayerModel) -> Iterator[None]:
        """For the length of a ``with``, the layer runs with the probe."""
        with ExitStack() as replaced:
            for module, probe in self.modules.items():
                replaced.enter_context(layer.replaced(module, torch.from_numpy(probe.decoded)))
            yield


def relative_change(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over tokens of ``‖found − wanted‖² / ‖wanted‖²``."""
    change = (found - wanted).double().square().sum(dim=-1)
    return float((change / wanted.double().square().sum(dim=-1)).mean())

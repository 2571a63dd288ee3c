"""The damage of quantising a layer: the error of each type in each matrix, and of each matrix in the layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.measure.observers.input_sums import InputSums
from lieq_gguf.measure.type_errors import TensorProbe, errors_of_tensors, probe_tensors
from lieq_gguf.records.importance import ImportanceMatrix


class QuantizationDamage(Observer):
    """Probes every matrix with a fast type and runs the layer with it.

    Attributes:
        type_errors: Tensor name to type name to weighted relative error.
        block_errors: Tensor name to block error of the probe: mean over tokens of ``‖h' − h‖² / ‖h‖²`` of the layer's
            output, ``h'`` with only this tensor quantised. Empty if damage is not measured.
        probe_errors: Tensor name to weighted relative error of the probe.
        drifted: Hidden states of the sample after the layers so far, all quantised with the probe.
    """

    gives = frozenset({"block_errors"})
    needs = (InputSums,)

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self.type_errors: dict[str, dict[str, float]] = {}
        self.block_errors: dict[str, float] = {}
        self.probe_errors: dict[str, float] = {}
        self.drifted: torch.Tensor | None = None
        self._options = setting.options
        self._sample = setting.damage_sample
        self._layers = setting.source.spec.layer_matrices
        self._sums = others[InputSums]

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Probe the layer's matrices, then run the layer with one tensor quantised after the other."""
        matrices = [
            (tensor, [layer.weight(module).cpu().numpy() for module in modules])
            for tensor, modules in layer.modules.items()
        ]
        n_threads = self._options.compute.n_threads
        probes = probe_tensors(matrices, self._importance(), n_threads)
        self.probe_errors |= {probe.tensor.name: probe.relative_error for probe in probes}
        self.type_errors |= errors_of_tensors(probes, self._options.error_types, n_threads)
        if not self._options.measures_damage:
            return
        before = hidden[self._sample]
        with layer.recording() as record:
            intact = layer.forward(before)
        for probe in probes:
            first = next(name for name in record if name in layer.modules[probe.tensor])
            with _put_into(layer, probe), layer.replaying(record, until=first):
                self.block_errors[probe.tensor.name] = layer.relative_change(intact, layer.forward(before))
        with ExitStack() as all_replaced:
            for probe in probes:
                all_replaced.enter_context(_put_into(layer, probe))
            self.drifted = layer.forward(before if self.drifted is None else self.drifted)

    def statistics(self, layer: int) -> Mapping[str, Any]:
        """Block errors by role."""
        return {"block_errors": {t.role: self.block_errors[t.name] for t in self._layers[layer]}}

    def _importance(self) -> ImportanceMatrix | None:
        """Weights of the squared errors; the sums of this pass cover a layer once it is done."""
        if not self._options.weigh_errors:
            return None
        return self._options.importance or self._sums.importance()


@contextmanager
def _put_into(layer: LayerModel, probe: TensorProbe) -> Iterator[None]:
    """For the length of a ``with``, the layer runs with a tensor's decoded weights."""
    with ExitStack() as replaced:
        for module, matrix in zip(layer.modules[probe.tensor], probe.matrices, strict=True):
            replaced.enter_context(layer.replaced(module, torch.from_numpy(matrix.decoded)))
        yield

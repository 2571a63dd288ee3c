"""What quantising does to a layer: the error of each type in each matrix, and of each matrix in the layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, TokenSample
from lieq_gguf.measure.type_errors import TensorProbe, errors_of_tensors, probe_tensors
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix


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
        matrices = [
            (tensor, [layer.weight(module).cpu().numpy() for module in modules])
            for tensor, modules in layer.modules.items()
        ]
        probes = probe_tensors(matrices, self._importance, self._n_threads)
        self.probe_errors |= {probe.tensor.name: probe.relative_error for probe in probes}
        self.type_errors |= errors_of_tensors(probes, self._types, self._n_threads)
        if self._sample is None:
            return
        before = hidden[self._sample]
        with layer.recording() as record:
            wanted = layer.forward(before)
        for probe in probes:
            first = next(name for name in record if name in layer.modules[probe.tensor])
            with _put_into(layer, probe), layer.replaying(record, until=first):
                self.block_errors[probe.tensor.name] = relative_change(wanted, layer.forward(before))
        with ExitStack() as all_replaced:
            for probe in probes:
                all_replaced.enter_context(_put_into(layer, probe))
            self.drifted = layer.forward(before if self.drifted is None else self.drifted)


@contextmanager
def _put_into(layer: LayerModel, probe: TensorProbe) -> Iterator[None]:
    """For the length of a ``with``, the layer runs with a tensor as the probe has left it."""
    with ExitStack() as replaced:
        for module, matrix in zip(layer.modules[probe.tensor], probe.matrices, strict=True):
            replaced.enter_context(layer.replaced(module, torch.from_numpy(matrix.decoded)))
        yield


def relative_change(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over tokens of ``‖found − wanted‖² / ‖wanted‖²``."""
    change = (found - wanted).double().square().sum(dim=-1)
    return float((change / wanted.double().square().sum(dim=-1)).mean())

"""What quantising does to a layer: the error of each type in each matrix, and of each matrix in the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.layer_model import LayerModel
from lieq_gguf.observers import Observer, TokenSample
from lieq_gguf.quant_types import QuantType
from lieq_gguf.type_errors import probe_matrix, relative_errors

ImportanceOf = Callable[[str], "npt.NDArray[np.float32] | None"]


class QuantizationDamage(Observer):
    """Probes every matrix with a fast type and runs the layer with it.

    Attributes:
        type_errors: Tensor name to type name to weighted relative error.
        block_errors: Tensor name to block error of the probe: mean over tokens of ``‖h' − h‖² / ‖h‖²`` of the layer's
            output, ``h'`` with this one matrix quantised. Empty without ``sample``.
        probe_errors: Tensor name to weighted relative error of the probe.
        drifted: Hidden states of the sample behind the layers so far, all of them quantised with the probe.
    """

    def __init__(
        self,
        types: Sequence[QuantType],
        importance_of: ImportanceOf,
        sample: TokenSample | None,
        n_threads: int,
    ) -> None:
        """Measure while the pass goes on.

        Args:
            types: Types whose errors to estimate.
            importance_of: Mean squared input of a matrix by its tensor name, known once the layer is done; or None.
            sample: Index into the hidden states that gives the tokens to run the layer on; None for no block errors.
            n_threads: Threads of the encoders.
        """
        self.type_errors: dict[str, dict[str, float]] = {}
        self.block_errors: dict[str, float] = {}
        self.probe_errors: dict[str, float] = {}
        self.drifted: torch.Tensor | None = None
        self._types = types
        self._importance_of = importance_of
        self._sample = sample
        self._n_threads = n_threads

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Probe the layer's matrices, then run the layer with one of them quantised after the other."""
        probes = {
            module: probe_matrix(layer.weight(module).cpu().numpy(), self._importance_of(tensor.name), self._n_threads)
            for module, tensor in layer.tensors.items()
        }
        names = [tensor.name for tensor in layer.tensors.values()]
        self.probe_errors |= {name: p.relative_error for name, p in zip(names, probes.values(), strict=True)}
        errors = relative_errors(tuple(probes.values()), self._types, self._n_threads)
        self.type_errors |= dict(zip(names, errors, strict=True))
        if self._sample is None:
            return
        before = hidden[self._sample]
        decoded = {module: torch.from_numpy(probe.decoded) for module, probe in probes.items()}
        with layer.recording() as record:
            wanted = layer.forward(before)
        for module, weights in decoded.items():
            with layer.replaced(module, weights), layer.replaying(record, until=module):
                self.block_errors[layer.tensors[module].name] = relative_change(wanted, layer.forward(before))
        with ExitStack() as all_replaced:
            for module, weights in decoded.items():
                all_replaced.enter_context(layer.replaced(module, weights))
            self.drifted = layer.forward(before if self.drifted is None else self.drifted)


def relative_change(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over tokens of ``‖found − wanted‖² / ‖wanted‖²``."""
    change = (found - wanted).double().square().sum(dim=-1)
    return float((change / wanted.double().square().sum(dim=-1)).mean())

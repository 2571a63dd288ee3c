"""Measures a model that only llama.cpp runs: watches a pass through its graph, then reads the weights.

llama.cpp shows every node of its graph when it is computed. The inputs of products with a weight give the importance
matrix, as in llama-imatrix; the outputs of the layers give LIM. The layers cannot be run again with other weights, so
there are no block errors, no untrained twin and no error feedback.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.errors import CalibrationError
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.measure.type_errors import errors_of_tensors, probe_tensors
from lieq_gguf.native.graph import Node
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.progress import Progress
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import LayerMeasurement
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.scorers.zd import z_share
from lieq_gguf.sources.source import Source

_NORM_OF_FIRST = "norm-0"  # the first node of this name takes the input of the first layer
_INPUT = -1


def run_pass(
    source: Source, tokens: CalibrationTokens, options: PassOptions, progress: Progress | None = None
) -> PassResult:
    """Run the model in llama.cpp, then look at its weights layer by layer.

    Args:
        source: A GGUF file.
        tokens: The calibration tokens.
        options: What to measure; whatever needs to run layers again is left out.
        progress: Where to show and time the pass.

    Raises:
        CalibrationError: if activations are not finite.
        VerificationError: if llama.cpp fails.
    """
    progress = progress or Progress()
    spec = source.spec
    watcher = _Watcher(spec, compares_layers=bool(options.statistics))
    n_chunks, chunk_size = tokens.ids.shape
    with (
        progress.stage("calibrate", "Running in llama.cpp", n_chunks) as advance,
        open_model(source.path, n_ctx=chunk_size, n_threads=options.compute.n_threads, watcher=watcher) as model,
    ):
        for ids in tokens.ids:
            model.run([int(i) for i in ids])
            watcher.end_sequence()
            advance(1)
    measured = _importance(watcher, spec, tokens, progress)
    importance = (options.importance or measured) if options.weigh_errors else None
    measurements: list[LayerMeasurement] = []
    type_errors: dict[str, dict[str, float]] = {}
    torch.set_num_threads(options.compute.n_threads)
    n_measured = spec.n_layers if options.statistics or options.error_types else 0
    with progress.stage("calibrate", "Measuring weights", n_measured) as advance:
        for layer, matrices in enumerate(spec.layer_matrices[:n_measured]):
            weights = [_weights(source, tensor) for tensor in matrices]
            probes = probe_tensors(list(zip(matrices, weights, strict=True)), importance, options.compute.n_threads)
            type_errors |= errors_of_tensors(probes, options.error_types, options.compute.n_threads)
            if options.statistics:
                share = z_share([torch.from_numpy(w) for some in weights for w in some]) if weights else 0.0
                measurements.append(LayerMeasurement(layer=layer, cosine=watcher.cosine(layer), z_share=share))
            advance(1)
    return PassResult(measured, tuple(measurements), type_errors, {})


def _importance(watcher: _Watcher, spec: ModelSpec, tokens: CalibrationTokens, progress: Progress) -> ImportanceMatrix:
    """The importance matrix, with equal columns for matrices whose inputs were not seen."""
    unseen = [t.name for layer in spec.layer_matrices for t in layer if t.name not in watcher.in_sum2]
    if unseen:
        progress.warn(
            f"llama.cpp multiplies {len(unseen)} matrices in a way that hides their inputs "
            f"({unseen[0]}); all their columns get the same importance"
        )
    sums, counts = watcher.in_sum2, watcher.counts
    for tensor in (t for layer in spec.layer_matrices for t in layer if t.name not in watcher.in_sum2):
        sums[tensor.name] = np.full(tensor.importance_shape, tokens.ids.size, dtype=np.float64)
        if tensor.of_experts:
            counts[tensor.name] = np.full(tensor.shape[0], tokens.ids.size, dtype=np.float64)
    if not all(np.isfinite(values).all() for values in sums.values()):
        raise CalibrationError("the inputs of a matrix are not finite; the model's weights are damaged")
    return ImportanceMatrix(
        {name: values.astype(np.float32) for name, values in sums.items()},
        tokens.ids.size,
        tokens.ids.shape[1],
        tokens.dataset,
        {name: numbers.astype(np.float32) for name, numbers in counts.items()},
    )


class _Watcher:
    """Sums squared inputs and compares layer outputs, sequence by sequence.

    Attributes:
        in_sum2: Tensor name to ``[n_in]``, sum over tokens of the squared input, or to ``[n_experts, n_in]``.
        counts: Name of a tensor of experts to the number of tokens that reached each, ``[n_experts]``.
    """

    def __init__(self, spec: ModelSpec, compares_layers: bool) -> None:
        self._compares_layers = compares_layers
        self.in_sum2: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.float64]] = {}
        self._names = {t.name for layer in spec.layer_matrices for t in layer} | {spec.output_matrix.name}
        self._last_layer = spec.n_layers - 1
        self._hidden: dict[int, npt.NDArray[np.float32]] = {}
        self._cosines: dict[int, float] = {}
        self._n_tokens = 0

    def wants(self, node: Node) -> bool:
        if node.name == _NORM_OF_FIRST:
            return self._compares_layers and _INPUT not in self._hidden
        if node.output_of_layer is not None:
            return self._compares_layers
        if node.op not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        weight, x = node.source(0), node.source(1)
        return weight is not None and x is not None and weight.name in self._names and x.holds_numbers

    def see(self, node: Node) -> None:
        if node.output_of_layer is not None:
            self._hidden[node.output_of_layer] = node.read_rows()
        elif node.name == _NORM_OF_FIRST:
            before = node.source(0)
            if before is not None and before.holds_numbers:
                self._hidden[_INPUT] = before.read_rows()
        else:
            self._add_inputs(node)

    def end_sequence(self) -> None:
        """Compare input and output of each layer."""
        for layer in range(self._last_layer + 1):
            before, after = self._hidden.get(layer - 1), self._hidden.get(layer)
            if before is None or after is None or before.shape != after.shape:
                continue
            products = np.einsum("td,td->t", before, after, dtype=np.float64)
            norms = np.linalg.norm(before.astype(np.float64), axis=1) * np.linalg.norm(after.astype(np.float64), axis=1)
            self._cosines[layer] = self._cosines.get(layer, 0.0) + float((products / np.maximum(norms, 1e-30)).sum())
        self._n_tokens += len(next(iter(self._hidden.values()), ()))
        self._hidden.clear()

    def cosine(self, layer: int) -> float | None:
        """Mean over tokens of the cosine between input and output; None if the graph has no node for one of them."""
        return self._cosines[layer] / self._n_tokens if layer in self._cosines else None

    def _add_inputs(self, node: Node) -> None:
        weight, x = node.source(0), node.source(1)
        assert weight is not None
        assert x is not None
        values = np.asarray(x.read(), dtype=np.float32)
        n_in = values.shape[-1]
        n_matrices = weight.shape[1]
        if node.op == "MUL_MAT" and n_matrices == 1:
            squares = np.square(values.reshape(-1, n_in)).sum(axis=0, dtype=np.float64)
        elif node.op == "MUL_MAT":  # several matrices, each with its own inputs
            inputs = values.reshape(n_matrices, -1, n_in)
            squares = np.square(inputs).sum(axis=1, dtype=np.float64)
            self.counts[weight.name] = self.counts.get(weight.name, 0.0) + np.full(n_matrices, float(inputs.shape[1]))
        else:
            chosen = node.source(2)
            assert chosen is not None
            squares, counts = _by_expert(values[0], np.asarray(chosen.read()[0, 0]), weight.shape[1])
            self.counts[weight.name] = self.counts.get(weight.name, 0.0) + counts
        self.in_sum2[weight.name] = self.in_sum2.get(weight.name, 0.0) + squares


def _by_expert(
    values: npt.NDArray[np.float32], chosen: npt.NDArray[Any], n_experts: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of squared inputs ``[n_experts, n_in]`` and number of tokens ``[n_experts]``.

    Args:
        values: ``[n_tokens, 1 or n_used, n_in]``: one input for all experts of a token, or one for each of them.
        chosen: Experts of each token ``[n_tokens, n_used]``.
        n_experts: Number of experts.
    """
    inputs = np.broadcast_to(values, (*chosen.shape, values.shape[-1]))
    sums = np.zeros((n_experts, values.shape[-1]))
    for expert in range(n_experts):
        sums[expert] = np.square(inputs[chosen == expert]).sum(axis=0, dtype=np.float64)
    return sums, np.bincount(chosen.reshape(-1), minlength=n_experts).astype(np.float64)


def _weights(source: Source, tensor: TensorSpec) -> list[npt.NDArray[np.float32]]:
    """The matrix ``[n_out, n_in]``, or one for every expert."""
    rows = np.concatenate(list(source.rows(tensor)))
    source.release()
    return np.split(rows, tensor.shape[0] if tensor.of_experts else 1)

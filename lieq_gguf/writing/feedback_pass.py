"""Writing with error feedback: a second pass, in which the input of every layer comes from quantised layers.

Layer by layer: measure the second moments of the inputs, encode the layer's matrices so that their outputs, not their
weights, stay close (``error_feedback``), replace the original matrices, and continue with the layer's new output.

The intact model runs beside it. What the quantised layers before have made of a matrix's input ``x`` lacks something of
the intact model's input; of it, ``x`` tells a part, by least squares, and half of this part is made good by moving the
weights before they are encoded (``moved_weights``). A matrix whose output is added to the hidden states makes good what
these lack.

The output matrix follows, or, where it is the embedding too, comes first (``output_feedback``).

Of experts, the matrices that take the input of the whole mixture share its moments. The others have those of the
expert's own tokens, whose correlations count the less the fewer they are; an expert that no token reaches has no
feedback.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.errors import CalibrationError, QuantizationError
from lieq_gguf.measure.experts import mixture_of, takes_own_input
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.second_moments import SecondMoments, output_moments
from lieq_gguf.measure.stream import Additions, additions, states_behind
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.measure.torch_setup import keep_freed_memory
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.file_order import in_file_order
from lieq_gguf.sources.source import Source
from lieq_gguf.writing import error_feedback
from lieq_gguf.writing.moved_weights import correction, moved
from lieq_gguf.writing.output_feedback import OutputFeedback
from lieq_gguf.writing.unfinished import Unfinished
from lieq_gguf.writing.writer import EncodedRows, encode_tensors

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_N_COMPARED = 4  # sequences whose outputs are compared for the block errors
_RUNS_OF_LAYER = 3  # intact, intact with quantised input, and quantised


class FeedbackPass:
    """The second pass.

    Attributes:
        block_errors: One per finished layer: mean over tokens of ``‖h' − h‖² / ‖h‖²`` of its output, ``h`` in the
            intact model and ``h'`` with all matrices quantised up to here.
    """

    def __init__(
        self,
        source: Source,
        plan: QuantPlan,
        tokens: CalibrationTokens,
        importance: ImportanceMatrix | None,
        compute: ComputeOptions,
        output_moments: torch.Tensor | None = None,
        unfinished: Unfinished | None = None,
    ) -> None:
        """Prepare the pass.

        Args:
            source: The model.
            plan: One type per tensor.
            tokens: The calibration tokens.
            importance: Weights of the squared errors for ggml's encoders, or None.
            compute: Device, threads and precision.
            output_moments: Second moments of the output matrix's input in the intact model, if they are known;
                overwritten.
            unfinished: Where to keep what is done, and to find what an interrupted pass has done.

        Raises:
            CalibrationError: if the device is not available.
        """
        self._source = source
        self._plan = plan
        self._ids = tokens.ids
        self._importance = importance
        self._mean = lru_cache(maxsize=4)(lambda name: None if importance is None else importance.mean(name))
        self._n_threads = compute.n_threads
        self._layer = LayerModel.of(source, compute)
        self._output_moments = output_moments
        self._corrects_output = OutputFeedback.applies(source, plan)
        # with a second table of tokens, states are not all that is needed to go on
        self._unfinished = Unfinished() if unfinished is None or self._layer.has_token_inputs else unfinished
        self._finished = self._unfinished.open()
        self.block_errors = [] if self._finished is None else list(self._finished.numbers)

    @property
    def n_finished(self) -> int:
        """Layers that an interrupted pass has finished."""
        return 0 if self._finished is None else len(self._finished.numbers)

    def expected_bytes(self) -> int:
        """Memory of second moments and hidden states."""
        spec = self._source.spec
        matrices = [t for layer in spec.layer_matrices for t in layer]
        widths = sorted(t.shape[-1] for t in matrices)
        of_moments = 2 * sum(n * n for n in set(widths)) + 2 * widths[-1] ** 2
        inputs = (t.shape[-1] * t.shape[0] * t.active_share for t in matrices if t.of_experts and _takes_own_input(t))
        n_states = 5 * self._layer.state_width + round(max(inputs, default=0))
        return int(4 * (of_moments + self._ids.size * n_states))

    def expected_seconds(self) -> float:
        """Time of the pass, estimated from one batch through the first layer and some rows of every type."""
        layer, spec = self._layer, self._source.spec
        layer.load(self._source, 0)
        hidden = torch.zeros(*self._ids.shape, layer.state_width)
        rows = next(layer.batches(hidden))
        moments = self._moments()
        with torch.inference_mode():
            start = time.perf_counter()
            with layer.watching_inputs(moments.see_input, with_mixtures=True):
                layer.forward(hidden[rows])
            moments.end_batch({})
            layer.forward(hidden[rows])
            layer.forward(hidden[rows])
            of_pass = (time.perf_counter() - start) * len(hidden) / len(hidden[rows]) * spec.n_layers
            if self._output_comes_first and self._output_moments is None:
                of_pass *= 1 + 1 / _RUNS_OF_LAYER
        n_weights: Counter[str] = Counter()
        for tensor in (t for t in spec.tensors if t.is_matrix):
            n_weights[self._plan.types[tensor.name]] += tensor.n_weights
        of_types = sum(_seconds_per_weight(QUANT_TYPES[name]) * n for name, n in n_weights.items())
        return of_pass + of_types / self._n_threads

    def encoded(self) -> Iterator[EncodedRows]:
        """All tensors of the file, in file order.

        Raises:
            CalibrationError: if the activations are not finite.
            QuantizationError: if a tensor cannot be encoded.
        """
        keep_freed_memory()
        output = None
        if self._finished is None:
            embedded = self._layer.embed(self._source, self._ids)
            # the embedding is needed before the layers
            output = self._early_output(embedded) if self._output_comes_first else None
            states = _States(embedded, self._embedded(output))
        else:
            states = _States(*map(torch.from_numpy, self._finished.states))
        n_finished = 0 if self._finished is None else self._finished.n_groups
        for number, (index, group) in enumerate(groupby(self._source.spec.tensors, key=lambda tensor: tensor.layer)):
            tensors = tuple(group)
            if number < n_finished:
                yield from self._unfinished.rows(number, tensors, [self._row_bytes(tensor) for tensor in tensors])
                continue
            matrices: dict[str, ByteArray] = {}
            if index is not None:
                matrices, states = self._encode_layer(index, states)
            yield from self._unfinished.keep(number, self._rows(tensors, matrices, states, output))
            if index is not None:
                self._unfinished.finish(number + 1, self.block_errors, states.arrays())

    def _rows(
        self,
        tensors: Sequence[TensorSpec],
        matrices: dict[str, ByteArray],
        states: _States,
        output: OutputFeedback | None,
    ) -> Iterator[EncodedRows]:
        """The rows of neighbouring tensors: matrices of a layer that are encoded, and others."""
        for tensor in tensors:
            if tensor.name in matrices:
                yield EncodedRows(tensor, matrices.pop(tensor.name), is_last=True)
            elif tensor is self._source.spec.output_matrix and self._corrects_output:
                output = output or self._output(*self._behind(states.quantized, states.intact))
                yield from output.encoded(self._n_threads)
            else:
                yield from encode_tensors(self._source, (tensor,), self._plan, self._importance, self._n_threads)

    def _row_bytes(self, tensor: TensorSpec) -> int:
        return QUANT_TYPES[self._plan.types[tensor.name]].row_bytes(tensor.shape[-1])

    @property
    def _output_comes_first(self) -> bool:
        """Whether the output matrix is encoded before the layers: it is the embedding too, or is there in the file."""
        spec = self._source.spec
        first_of_layers = next((i for i, tensor in enumerate(spec.tensors) if tensor.layer is not None), 0)
        is_before = spec.tensors.index(spec.output_matrix) < first_of_layers
        return self._corrects_output and (spec.has_tied_embeddings or is_before)

    def _early_output(self, states: torch.Tensor) -> OutputFeedback:
        """The output matrix with the intact model's moments, which runs for them from its first states if need be."""
        moments, self._output_moments = self._output_moments, None
        if moments is None:
            with torch.inference_mode():
                for index in range(self._source.spec.n_layers):
                    self._layer.load(self._source, index)
                    states = self._layer.forward(states)
            moments, _ = self._behind(states)
        return self._output(moments)

    def _output(self, moments: torch.Tensor, lack: torch.Tensor | None = None) -> OutputFeedback:
        return OutputFeedback(self._source, self._plan, self._importance, moments, lack)

    def _behind(
        self, states: torch.Tensor, intact: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Moments of the output matrix's input, and what it lacks, from states behind the last layer."""
        norm = self._layer.final_norm(self._source)
        with torch.inference_mode():
            return output_moments(lambda x: norm(self._layer.hidden_part(x).to(self._layer.device)), states, intact)

    def _embedded(self, output: OutputFeedback | None) -> torch.Tensor:
        """States before the first layer ``[n_chunks, chunk_size, state_width]``, from quantised tables."""

        def rows_of(tensor: TensorSpec, ids: Sequence[int]) -> torch.Tensor:
            rows = self._source.read_rows(tensor, ids).float().numpy()
            quant_type = QUANT_TYPES[self._plan.types[tensor.name]]
            if output is not None and tensor is self._source.spec.output_matrix:
                encoded = output.encode(rows, self._n_threads)
            else:
                encoded = encoders.quantize(rows, quant_type, self._mean(tensor.name), self._n_threads)
            return torch.from_numpy(ggml.dequantize(encoded, quant_type))

        return self._layer.embed(self._source, self._ids, rows_of)

    def _encode_layer(self, index: int, states: _States) -> tuple[dict[str, ByteArray], _States]:
        """The layer's encoded matrices, rows in file order, and its output."""
        layer = self._layer
        layer.load(self._source, index)
        with torch.inference_mode():
            added = additions(layer, states.intact)
            moments, intact = self._measure(states, added)
            layer.forget_rounded()  # every matrix gets other weights before the layer runs again
            if not bool(intact.sum().isfinite()):
                raise CalibrationError(f"the output of layer {index} is not finite; the model's weights are damaged")
            encoded: dict[str, ByteArray] = {}
            for modules in moments.groups():
                # a name would keep the moments alive: for a wide matrix they take hundreds of megabytes
                coupled = error_feedback.coupling(moments.take(modules[0]), self._damping(modules[0], moments))
                lack = moments.take_lack(modules[0])
                lacking = None if lack is None else correction(lack, coupled)
                del lack
                for together in self._sharing(modules):
                    encoded |= self._encode_matrices(together, coupled, lacking, added)
            matrices = {tensor.name: self._joined(tensor, encoded) for tensor in layer.modules}
            quantized = layer.forward(states.quantized)
        some = slice(None, None, -(-len(intact) // _N_COMPARED))
        self.block_errors.append(layer.relative_change(intact[some], quantized[some]))
        return matrices, _States(intact, quantized)

    def _measure(self, states: _States, added: Additions) -> tuple[SecondMoments, torch.Tensor]:
        """Moments of the inputs from quantised layers, what they lack, and the output of the intact model."""
        layer, moments = self._layer, self._moments()
        intact = torch.empty_like(states.intact)
        for rows in layer.batches(intact):
            with ExitStack() as watching:
                watching.enter_context(layer.watching_inputs(moments.see_intact, with_mixtures=True))
                behind = watching.enter_context(states_behind(added, layer))
                intact[rows] = layer.forward(states.intact[rows])
            expected = behind(intact[rows])
            with ExitStack() as watching:
                watching.enter_context(layer.watching_inputs(moments.see_input, with_mixtures=True))
                behind = watching.enter_context(states_behind(added, layer))
                output = layer.forward(states.quantized[rows])
            found = behind(output)
            moments.end_batch({name: expected[name] - found[name] for name in found.keys() & layer.tensors.keys()})
        return moments, intact

    def _moments(self) -> SecondMoments:
        tensors = self._layer.tensors
        of_experts = {module for module, tensor in tensors.items() if tensor.of_experts}
        rarely_used = {module for module in of_experts if takes_own_input(module)}
        mixtures = {mixture_of(module) for module in of_experts - rarely_used}
        return SecondMoments((tensors.keys() - of_experts) | mixtures, self._layer.in_bfloat16, rarely_used)

    def _damping(self, module: str, moments: SecondMoments) -> float:
        """Correlations of an expert's few tokens are partly chance, about as much as there are numbers for a token."""
        if module not in self._layer.tensors or not self._layer.tensors[module].of_experts:
            return error_feedback.DAMPING
        return error_feedback.DAMPING + self._layer.tensors[module].shape[-1] / moments.n_tokens(module)

    def _sharing(self, modules: list[str]) -> Iterator[list[str]]:
        """Modules to encode together with the moments of a group; for those of a mixture, expert by expert."""
        tensors = self._layer.tensors
        dense = [module for module in modules if module in tensors]
        if dense:
            yield dense
        for mixture in modules:
            if mixture not in tensors:
                of_mixture = [name for name in tensors if mixture_of(name) == mixture and not takes_own_input(name)]
                by_expert = sorted(of_mixture, key=lambda name: int(name.split(".")[-2]))
                for _, of_expert in groupby(by_expert, key=lambda name: name.rpartition(".")[0]):
                    yield list(of_expert)

    def _encode_matrices(
        self, modules: list[str], coupled: error_feedback.Coupling, lacking: FloatArray | None, added: Additions
    ) -> dict[str, ByteArray]:
        """Encode the matrices that share an input, and put the decoded matrices into the layer."""
        matrices = [self._matrix(module) for module in modules]
        if lacking is not None:
            for i, module in enumerate(modules):
                if matrices[i].quant_type.family == "trained":  # such weights lie on the type's grid already
                    continue
                matrices[i] = replace(matrices[i], weights=moved(matrices[i].weights, lacking, added.get(module)))
        try:
            encoded = error_feedback.encode(matrices, coupled, self._n_threads)
        except QuantizationError as error:
            name = self._layer.tensors[modules[0]].name
            raise QuantizationError(f"{name} or another matrix of its layer: {error}") from None
        for module, matrix, data in zip(modules, matrices, encoded, strict=True):
            self._assign(module, data, matrix.quant_type)
        return dict(zip(modules, encoded, strict=True))

    def _matrix(self, module: str) -> error_feedback.MatrixToEncode:
        tensor = self._layer.tensors[module]
        importance = self._mean(tensor.name)
        if importance is not None and tensor.of_experts:
            importance = importance[self._layer.modules[tensor].index(module)]
        weights = self._layer.weight(module).cpu().numpy()
        return error_feedback.MatrixToEncode(weights, QUANT_TYPES[self._plan.types[tensor.name]], importance)

    def _assign(self, module: str, data: ByteArray, quant_type: QuantType) -> None:
        self._layer.assign(module, torch.from_numpy(ggml.dequantize(data, quant_type, self._n_threads)))

    def _joined(self, tensor: TensorSpec, encoded: dict[str, ByteArray]) -> ByteArray:
        """The rows of a tensor in file order; those of experts that no token reached are encoded here."""
        if not tensor.of_experts:
            return in_file_order(tensor, encoded.pop(self._layer.modules[tensor][0]))
        for module in self._layer.modules[tensor]:
            if module not in encoded:
                matrix = self._matrix(module)
                encoded[module] = encoders.quantize(
                    matrix.weights, matrix.quant_type, matrix.importance, self._n_threads
                )
                self._assign(module, encoded[module], matrix.quant_type)
        return np.concatenate([encoded.pop(module) for module in self._layer.modules[tensor]])


@dataclass(frozen=True)
class _States:
    """States between two layers ``[n_chunks, chunk_size, state_width]``.

    Attributes:
        intact: Of the intact model.
        quantized: From the quantised layers.
    """

    intact: torch.Tensor
    quantized: torch.Tensor

    def arrays(self) -> tuple[FloatArray, FloatArray]:
        """Both as arrays."""
        return self.intact.numpy(), self.quantized.numpy()


def _takes_own_input(tensor: TensorSpec) -> bool:
    return takes_own_input(tensor.names_in_layer[0].removesuffix(".weight"))


def _seconds_per_weight(quant_type: QuantType) -> float:
    """Seconds that a thread needs to encode a weight."""
    weights = np.random.default_rng(0).standard_normal((256, 512), dtype=np.float32)
    given = error_feedback.MatrixToEncode(weights, quant_type, np.ones(512, dtype=np.float32))
    coupled = error_feedback.coupling(torch.eye(512))
    error_feedback.encode([replace(given, weights=weights[:1])], coupled)  # the first call may compute tables
    start = time.perf_counter()
    error_feedback.encode([given], coupled)
    return (time.perf_counter() - start) / weights.size

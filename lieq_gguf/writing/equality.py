"""Proves that a file is the model it was made from: by its numbers, its weights, its tokens, and what it computes.

The numbers that the file stores for llama.cpp must be those of transformers' modules. Its weights must be the source's,
as far as their types can hold them. And llama.cpp must compute what transformers does with the file's own weights. That
is asked layer by layer: transformers' layer gets the hidden states that llama.cpp has computed before it. So rounding
does not add up, bounds are narrow, and the first layer that differs is the one with the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PretrainedConfig

from lieq_gguf.architectures import Decoder, family_named
from lieq_gguf.errors import VerificationError
from lieq_gguf.measure.graph_numbers import numbers_differ
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.native.graph import Node
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.options import ComputeOptions, SourceOptions
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.source import Source
from lieq_gguf.writing.compared_weights import ComparedWeights, DifferenceError

FloatArray = npt.NDArray[np.float32]

N_TOKENS = 64
_PLAIN_TEXT = "Hello"  # no tokenizer splits it unusually

PLAIN_BOUNDS = {"F32": 0.01, "F16": 0.01, "BF16": 0.05}  # of layers and of logits
QUANTIZED_LAYER_BOUND = 0.25
"""Largest error of a layer's output, over the length of its update ``h_out - h_in``, at four of five tokens. llama.cpp
rounds the input of every product: to F16 by 2⁻¹¹/√3 (kernels of ARM also add in F16, thrice as much), to BF16 by eight
times that, and to 8 bits by 0.6 to 1.4 %, more beside massive activations; queries and keys carry that into an
exponent. Measured: 0.001 with F16; of two to eight bits 0.08 in SmolLM2 and 0.03 in the tiny models of the tests.
Beyond the bound, the rounding is emulated in the layer, and what it changes there is allowed three times."""

QUANTIZED_HEAD_BOUND = 0.15
"""Error of the logits, root mean square in standard deviations. Measured: 0.0004 with F16, 0.024 with Q6_K."""

_EMULATED_FACTOR = 3.0
_ROUNDED_TOGETHER = 256  # numbers with one scale, for the K types; others have smaller blocks and less error
_SHARE = 0.8
_LEAST_UPDATE = 0.01  # of the hidden state: a layer that does nothing yet has no update

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Equality:
    """How equal the file and its model are; a difference beyond rounding raises instead.

    Attributes:
        layer_errors: For each layer, the change of its update at four of five tokens.
        head_error: The change of the logits, root mean square in their standard deviations.
    """

    layer_errors: tuple[float, ...]
    head_error: float

    def to_json(self) -> dict[str, Any]:
        """The document for ``--json``."""
        return {"layer_errors": list(self.layer_errors), "head_error": self.head_error}


def check_equality(
    source: Source, file: Path, text: str, compute: ComputeOptions, advance: Callable[[float], None] = lambda _n: None
) -> Equality | None:
    """Compare a file with the model that it was made from.

    Args:
        source: The model.
        file: A GGUF file of it, in any types.
        text: Some text; its first tokens are run.
        compute: Device and threads.
        advance: Called with the number of layers that are done.

    Returns:
        How equal they are; None for a model that only llama.cpp runs, of which the weights alone are compared.

    Raises:
        VerificationError: at the first difference that rounding does not explain, naming it.
    """
    written = GgufSource(file, SourceOptions(allow_requantize=True))
    try:
        return _Comparison(source, written, compute).run(text, advance)
    except DifferenceError as difference:
        raise VerificationError(f"the file is not the model of {source.path}: {difference}") from None
    finally:
        written.release()
        source.release()


@dataclass
class _Comparison:
    """A source and a file that should be the same model."""

    source: Source
    written: GgufSource
    compute: ComputeOptions

    def run(self, text: str, advance: Callable[[float], None]) -> Equality | None:
        spec, weights = self.source.spec, ComparedWeights(self.source, self.written)
        _compare_shapes(spec, self.written.spec)
        if not self.source.has_transformers_model:
            for tensor in spec.tensors:
                weights.read(tensor)
                weights.release()
            return None
        if not self.written.has_transformers_model:
            raise DifferenceError(self.written.why_not_supported)
        config = self.source.transformers_config()
        _compare_numbers(config, self.written.transformers_config(), spec, self.written.spec)
        ids = self._ids(text)
        hidden, logits = self._computed_by_llama_cpp(ids)
        for key in _family(spec).folded_settings:  # whether the weights have them in the right places is asked here
            setattr(config, key, spec.config[key])
        layer = LayerModel.of(self.source, replace(self.compute, in_float32=True), config)
        for tensor in spec.tensors:
            if tensor.layer is None and tensor.name.startswith("blk."):  # no pass runs it
                weights.read(tensor)
        with torch.inference_mode():
            return Equality(
                tuple(self._layer_errors(layer, weights, ids, hidden, advance)),
                self._head_error(layer, weights, hidden[-1], logits),
            )

    def _ids(self, text: str) -> list[int]:
        """The first tokens of a text, in transformers' own tokens."""
        ids = self.source.transformers_ids(text, True) or self.source.load_tokenizer().encode(text, True)
        config = self.source.spec.config
        # beyond a window that its graph does not have, llama.cpp deviates, as a warning says
        window = None if _family_has_windows(self.source.spec) else config.get("sliding_window")
        return ids[: min(N_TOKENS, config["max_position_embeddings"], window or N_TOKENS)]

    def _computed_by_llama_cpp(self, ids: list[int]) -> tuple[list[torch.Tensor], FloatArray]:
        """Output of every layer ``[n_tokens, d_model]``, and logits ``[n_tokens, n_vocab]``."""
        watcher = _Watcher()
        file, n_threads = self.written.path, self.compute.n_threads
        with open_model(file, n_ctx=N_TOKENS, n_threads=n_threads, watcher=watcher, in_float32=True) as model:
            by_transformers, by_llama_cpp = _added(self.source.transformers_ids), _added(model.tokenize)
            if None not in (by_transformers, by_llama_cpp) and by_transformers != by_llama_cpp:
                raise DifferenceError(
                    f"transformers adds the tokens {by_transformers} before and after a text, llama.cpp {by_llama_cpp}"
                )
            logits = model.logits(ids)
        missing = [i for i in range(self.source.spec.n_layers) if i not in watcher.outputs]
        if missing:
            raise DifferenceError(f"llama.cpp does not compute layer {missing[0]}")
        return [torch.from_numpy(watcher.outputs[i]) for i in range(self.source.spec.n_layers)], logits

    def _layer_errors(
        self,
        layer: LayerModel,
        weights: ComparedWeights,
        ids: list[int],
        hidden: Sequence[torch.Tensor],
        advance: Callable[[float], None],
    ) -> Iterator[float]:
        before = layer.embed(weights, np.array([ids]))
        for index, found in enumerate(hidden):
            layer.load(weights, index)
            after = layer.forward(before, exact=True)
            expected = layer.hidden_part(after)[0]
            error = _change(layer.hidden_part(before)[0], expected, found)
            types = {self.written.stored_type(t) for t in self.source.spec.layer_matrices[index]}
            bound = max(PLAIN_BOUNDS.get(t.name, QUANTIZED_LAYER_BOUND) for t in types)
            if not error <= bound:  # NaN is not
                bound = max(bound, _EMULATED_FACTOR * _emulated_change(layer, before, expected, types))
            if not error <= bound:
                place = "embedding or layer 0" if index == 0 else f"layer {index}"
                raise DifferenceError(
                    f"llama.cpp computes {place} otherwise than transformers, {error:.0%} off where rounding explains "
                    f"{bound:.0%}"
                )
            yield error
            before = layer.with_hidden(after, found[None])
            advance(1)

    def _head_error(
        self, layer: LayerModel, weights: ComparedWeights, hidden: torch.Tensor, logits: FloatArray
    ) -> float:
        matrix = weights.head()
        head = layer.output_head(weights, matrix)  # type: ignore[arg-type]  # rows are read when they are needed
        expected = head.logits(hidden).numpy()
        error = float(np.sqrt(np.square(logits - expected, dtype=np.float64).mean()) / expected.std())
        bound = PLAIN_BOUNDS.get(matrix.quant_type.name, QUANTIZED_HEAD_BOUND)
        if not error <= bound:
            raise DifferenceError(
                f"llama.cpp computes the logits otherwise than transformers from the same last layer, {error:.2g} "
                f"standard deviations off where rounding explains {bound:g}"
            )
        return error


def _added(tokenize: Callable[[str, bool], list[int] | None]) -> tuple[list[int], list[int]] | None:
    """The special tokens that are added before and after a text; None if that does not show."""
    whole, plain = tokenize(_PLAIN_TEXT, True), tokenize(_PLAIN_TEXT, False)
    if not whole or not plain:
        return None
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return (whole[: starts[0]], whole[starts[0] + len(plain) :]) if starts else None


class _Watcher:
    """Keeps the outputs of layers."""

    def __init__(self) -> None:
        self.outputs: dict[int, FloatArray] = {}

    def wants(self, node: Node) -> bool:
        return node.output_of_layer is not None

    def see(self, node: Node) -> None:
        assert node.output_of_layer is not None
        self.outputs[node.output_of_layer] = node.read_rows()


def _change(before: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> float:
    """Error of a layer's output ``[n_tokens, d_model]`` over its update, the largest of the better four fifths."""
    size, update, error = (np.linalg.norm(x.numpy(), axis=1) for x in (before, expected - before, found - expected))
    return float(np.quantile(error / np.maximum(update, _LEAST_UPDATE * size + _TINY), _SHARE))


def _emulated_change(
    layer: LayerModel, before: torch.Tensor, expected: torch.Tensor, types: Collection[QuantType]
) -> float:
    """What rounding the inputs of products changes in this layer, for models where that is more than usual.

    ``before`` are states ``[1, n_tokens, state_width]``, ``expected`` hidden states ``[n_tokens, d_model]``.
    """

    def rounded(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        if not any(t.is_quantized for t in types):
            return (x.half().float() if all(t.name == "F16" for t in types) else x.bfloat16().float(),)
        blocks = x.reshape(-1, _ROUNDED_TOGETHER if x.shape[-1] % _ROUNDED_TOGETHER == 0 else x.shape[-1])
        step = blocks.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / 127
        return ((blocks / step).round().mul(step).reshape(x.shape),)

    with ExitStack() as hooks:
        for module in layer.layer.modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_pre_hook(rounded))
        found = layer.hidden_part(layer.forward(before, exact=True))[0]
        return _change(layer.hidden_part(before)[0], expected, found)


def _compare_shapes(expected: ModelSpec, found: ModelSpec) -> None:
    shapes = {t.name: t.shape for t in expected.tensors}
    of_file = {t.name: t.shape for t in found.tensors}
    if expected.has_tied_embeddings:  # a file of others may have the embedding twice
        of_file.pop("output.weight", None)
    if shapes != of_file:
        name = sorted(set(shapes.items()) ^ set(of_file.items()))[0][0]
        if name not in of_file or name not in shapes:
            raise DifferenceError(f"{name} is {'missing' if name in shapes else 'not one of its tensors'}")
        raise DifferenceError(f"{name} has shape {of_file[name]}, not {shapes[name]}")


def _compare_numbers(
    expected: PretrainedConfig, found: PretrainedConfig, spec: ModelSpec, found_spec: ModelSpec
) -> None:
    family = family_named(spec.architecture)
    for name in () if family is None else family.header_parameters:
        if not np.allclose(found_spec.config[name], spec.config[name], rtol=1e-6, atol=0):
            raise DifferenceError(f"{name} has other numbers")
    difference = numbers_differ(found, expected, with_windows=_family_has_windows(spec))
    if difference:
        raise DifferenceError(difference)


def _family_has_windows(spec: ModelSpec) -> bool:
    return _family(spec).has_windows


def _family(spec: ModelSpec) -> Decoder:
    """The family of a model that transformers has; where several have the name, they differ only in modules."""
    family = family_named(spec.architecture)
    assert family is not None
    return family


def _named(spec: ModelSpec, name: str) -> TensorSpec:
    return next(t for t in spec.tensors if t.name == name)

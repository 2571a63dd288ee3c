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
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PretrainedConfig

from lieq_gguf.architectures import Decoder, family_named
from lieq_gguf.errors import VerificationError
from lieq_gguf.measure.graph_numbers import numbers_differ
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.options import ComputeOptions, SourceOptions
from lieq_gguf.records.spec import ModelSpec
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.source import Source
from lieq_gguf.writing.compared_weights import ComparedWeights
from lieq_gguf.writing.differences import (
    DifferenceError,
    Equality,
    change,
    check_head,
    check_layer,
    head_bound,
    layer_bound,
    logits_change,
    rounded,
)
from lieq_gguf.writing.graph_equality import LayerWatcher, compare_graphs

FloatArray = npt.NDArray[np.float32]

N_TOKENS = 64
_TRANSFORMERS = "transformers"
_PLAIN_TEXT = "Hello"  # no tokenizer splits it unusually


def check_equality(
    source: Source, file: Path, text: str, compute: ComputeOptions, advance: Callable[[float], None] = lambda _n: None
) -> Equality:
    """Compare a file with the model that it was made from.

    Args:
        source: The model.
        file: A GGUF file of it, in any types.
        text: Some text; its first tokens are run.
        compute: Device and threads.
        advance: Called with the number of layers that are done.

    Returns:
        How equal they are. A model that only llama.cpp runs is compared in its graph.

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

    def run(self, text: str, advance: Callable[[float], None]) -> Equality:
        spec, weights = self.source.spec, ComparedWeights(self.source, self.written)
        _compare_shapes(spec, self.written.spec)
        if not self.source.has_transformers_model:
            weights.compare_all()
            weights.head()
            return compare_graphs(self.source, self.written, text, N_TOKENS, self.compute.n_threads, advance)
        if not self.written.has_transformers_model:
            raise DifferenceError(self.written.why_not_supported)
        config = self.source.transformers_config()
        _compare_numbers(config, self.written.transformers_config(), spec, self.written.spec)
        ids = self._ids(text)
        hidden, logits, left_out = self._computed_by_llama_cpp(ids)
        for key in _family(spec).folded_settings:  # whether the weights have them in the right places is asked here
            setattr(config, key, spec.config[key])
        layer = LayerModel.of(self.source, replace(self.compute, in_float32=True), config)
        for tensor in spec.tensors:
            if tensor.layer is None and tensor.name.startswith("blk."):  # no pass runs it
                weights.read(tensor)
        with torch.inference_mode():
            return Equality(
                _TRANSFORMERS,
                tuple(self._layer_errors(layer, weights, ids, hidden, advance)),
                self._head_error(layer, weights, hidden[-1], logits),
                left_out,
            )

    def _ids(self, text: str) -> list[int]:
        """The first tokens of a text, in transformers' own tokens."""
        ids = self.source.transformers_ids(text, True) or self.source.load_tokenizer().encode(text, True)
        config = self.source.spec.config
        # beyond a window that its graph does not have, llama.cpp deviates, as a warning says
        window = None if _family_has_windows(self.source.spec) else config.get("sliding_window")
        return ids[: min(N_TOKENS, config["max_position_embeddings"], window or N_TOKENS)]

    def _computed_by_llama_cpp(self, ids: list[int]) -> tuple[list[torch.Tensor], FloatArray, tuple[int, ...]]:
        """Output of every layer ``[n_tokens, d_model]``, logits ``[n_tokens, n_vocab]``, ids that it does not add."""
        watcher = LayerWatcher()
        file, n_threads = self.written.path, self.compute.n_threads
        with open_model(file, n_ctx=N_TOKENS, n_threads=n_threads, watcher=watcher, in_float32=True) as model:
            left_out = _tokens_left_out(_added(self.source.transformers_ids), _added(model.tokenize))
            logits = model.logits(ids)
        missing = [i for i in range(self.source.spec.n_layers) if i not in watcher.states]
        if missing:
            raise DifferenceError(f"llama.cpp does not compute layer {missing[0]}")
        return [torch.from_numpy(watcher.states[i]) for i in range(self.source.spec.n_layers)], logits, left_out

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
            error = change(layer.hidden_part(before)[0], expected, found)
            types = {self.written.stored_type(t) for t in self.source.spec.layer_matrices[index]}
            emulated = partial(_emulated_change, layer, before, expected, types)
            check_layer(index, error, layer_bound(types), _TRANSFORMERS, emulated)
            yield error
            before = layer.with_hidden(after, found[None])
            advance(1)

    def _head_error(
        self, layer: LayerModel, weights: ComparedWeights, hidden: torch.Tensor, logits: FloatArray
    ) -> float:
        matrix = weights.head()
        head = layer.output_head(weights, matrix)  # type: ignore[arg-type]  # rows are read when they are needed
        error = logits_change(head.logits(hidden).cpu().numpy(), logits)
        check_head(error, head_bound(matrix.quant_type), _TRANSFORMERS)
        return error


_Added: TypeAlias = tuple[list[int], list[int]]


def _tokens_left_out(by_transformers: _Added | None, by_llama_cpp: _Added | None) -> tuple[int, ...]:
    """Require the same special tokens around a text; of several before it, llama.cpp adds the first alone."""
    if by_transformers is None or by_llama_cpp is None or by_transformers == by_llama_cpp:
        return ()
    before, after = by_transformers
    if len(before) < 2 or by_llama_cpp != (before[:1], after):
        raise DifferenceError(
            f"transformers adds the tokens {by_transformers} before and after a text, llama.cpp {by_llama_cpp}"
        )
    return tuple(before[1:])


def _added(tokenize: Callable[[str, bool], list[int] | None]) -> _Added | None:
    """The special tokens that are added before and after a text; None if that does not show."""
    whole, plain = tokenize(_PLAIN_TEXT, True), tokenize(_PLAIN_TEXT, False)
    if not whole or not plain:
        return None
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return (whole[: starts[0]], whole[starts[0] + len(plain) :]) if starts else None


def _emulated_change(
    layer: LayerModel, before: torch.Tensor, expected: torch.Tensor, types: Collection[QuantType]
) -> float:
    """What rounding the inputs of products changes in this layer, for models where that is more than usual.

    ``before`` are states ``[1, n_tokens, state_width]``, ``expected`` hidden states ``[n_tokens, d_model]``.
    """
    with ExitStack() as hooks:
        for module in layer.layer.modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_pre_hook(lambda _m, given: (rounded(given[0], types),)))
        found = layer.hidden_part(layer.forward(before, exact=True))[0]
        return change(layer.hidden_part(before)[0], expected, found)


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

"""Compares a file with a source that only llama.cpp runs: both graphs are run, with the same weights.

The source's own graph is the reference. Wherever it multiplies by a matrix, the product is replaced by that with the
file's matrix, decoded and multiplied in float32. The file's graph is watched beside it, and each of its layers gets the
hidden states that the reference has there. What is left is rounding, layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.native.graph import N_SOURCES, Node
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.file_order import CHUNK_WEIGHTS
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.source import Source
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

FloatArray = npt.NDArray[np.float32]

_REFERENCE = "its source"
_OF_PEOPLE = ("general.", "lieq.", "tokenizer.chat_template")  # keys that change nothing of what is computed
_BEFORE_FIRST = -1
_EMBEDDING = "token_embd.weight"


def compare_graphs(
    source: Source, written: GgufSource, text: str, n_tokens: int, n_threads: int, advance: Callable[[float], None]
) -> Equality:
    """Run the beginning of a text through source and file in llama.cpp.

    Args:
        source: The model.
        written: A file of it, with the same tensors.
        text: Some text.
        n_tokens: How many of its tokens to run.
        n_threads: Threads to run with.
        advance: Called with the number of layers that are done.

    Raises:
        DifferenceError: at the first difference that rounding does not explain.
    """
    torch.set_num_threads(n_threads)
    return _Graphs(source, written, text, n_tokens, n_threads).compare(advance)


@dataclass(frozen=True)
class _Run:
    """What a graph computes for a text.

    Attributes:
        ids: The tokens.
        states: Hidden states behind each layer that the graph shows ``[n_tokens, d_model]``.
        logits: ``[n_tokens, n_vocab]``.
    """

    ids: list[int]
    states: dict[int, torch.Tensor]
    logits: FloatArray


@dataclass(frozen=True)
class _Graphs:
    """A source and a file that should be the same model."""

    source: Source
    written: GgufSource
    text: str
    n_tokens: int
    n_threads: int

    def compare(self, advance: Callable[[float], None]) -> Equality:
        self._compare_metadata()
        products = _Products(self.source.spec, self.written)
        watcher = LayerWatcher(products)
        expected = self._run(self.source.path, watcher)
        found = self._run(self.written.path, LayerWatcher(given=watcher))
        if found.ids != expected.ids:
            raise DifferenceError(f"a text has the tokens {found.ids[:8]}…, in the source {expected.ids[:8]}…")
        unlike = expected.states.keys() ^ found.states.keys()
        if unlike:
            raise DifferenceError(f"llama.cpp does not compute layer {min(unlike)}")
        rounded_run = cache(lambda: self._rounded_run(watcher))

        def rounding(last: int, layer: int) -> float:
            return _change(expected, rounded_run(), last, layer)

        errors = []
        for last, layer in pairwise([_BEFORE_FIRST, *sorted(expected.states)]):
            advance(layer - last)
            bound = self._bound(range(last + 1, layer + 1), products.kept)
            if bound is None:
                continue
            errors.append(_change(expected, found, last, layer))
            check_layer(layer, errors[-1], bound, _REFERENCE, partial(rounding, last, layer))
        error, bound = logits_change(expected.logits, found.logits), head_bound(products.output_type)
        # where the last layers are not shown, their rounding is in the logits
        check_head(error, bound, _REFERENCE, lambda: logits_change(expected.logits, rounded_run().logits))
        return Equality(_REFERENCE, tuple(errors), error)

    def _compare_metadata(self) -> None:
        """Require the same hyper-parameters and the same tokenizer."""
        metadata = (self.source.read_metadata().values, self.written.read_metadata().values)
        of_source, of_file = ({k: v for k, v in m.items() if not k.startswith(_OF_PEOPLE)} for m in metadata)
        unlike = sorted(key for key in of_source.keys() | of_file.keys() if of_source.get(key) != of_file.get(key))
        if unlike:
            raise DifferenceError(f"{unlike[0]} has another value")

    def _run(self, file: Path, watcher: LayerWatcher) -> _Run:
        with open_model(file, n_ctx=self.n_tokens, n_threads=self.n_threads, watcher=watcher, in_float32=True) as model:
            ids = model.tokenize(self.text, True)[: self.n_tokens]
            logits = model.logits(ids)
        return _Run(ids, {layer: torch.from_numpy(state) for layer, state in watcher.states.items()}, logits)

    def _rounded_run(self, exact: LayerWatcher) -> _Run:
        """The reference, with inputs of products rounded as llama.cpp does it, for where that is more than usual."""
        products = _Products(self.source.spec, self.written, rounds=True)
        return self._run(self.source.path, LayerWatcher(products, exact))

    def _bound(self, layers: range, kept: Collection[str]) -> float | None:
        """What rounding explains in one layer, or in several of which only the last is shown.

        None if that is not all: operations on the matrices of ``kept`` have the weights of the source in the reference.
        """
        matrices = [t for layer in layers for t in self.source.spec.layer_matrices[layer]]
        types = {self.written.stored_type(t) for t in matrices}
        if any(t.name in kept and self.written.stored_type(t).is_quantized for t in matrices):
            return None
        return layer_bound(types) * sqrt(len(layers))


def _change(expected: _Run, found: _Run, last: int, layer: int) -> float:
    after = expected.states[layer]  # the embedding counts as an update of the first layer
    return change(expected.states.get(last, torch.zeros_like(after)), after, found.states[layer])


class LayerWatcher:
    """Keeps the outputs of layers.

    Attributes:
        states: The last output that the graph shows of each layer ``[n_tokens, d_model]``.
        n_nodes: How many outputs it shows of each.
    """

    def __init__(self, products: _Products | None = None, given: LayerWatcher | None = None) -> None:
        """Watch a graph.

        Args:
            products: Replaces products.
            given: Whose states later layers get in place of the graph's own.
        """
        self.states: dict[int, FloatArray] = {}
        self.n_nodes: Counter[int] = Counter()
        self._products, self._given = products, given

    def wants(self, node: Node) -> bool:
        """Outputs of layers, and products to replace."""
        is_replaced = self._replaces(node)
        if self._products is not None and not is_replaced:
            self._products.note_kept(node)
        return is_replaced or node.output_of_layer is not None

    def see(self, node: Node) -> None:
        """Replace a product; keep the output of a layer, and put the given one in its place."""
        if self._products is not None and self._replaces(node):
            node.write(self._products.of(node))
        layer = node.output_of_layer
        if layer is None:
            return
        self.states[layer] = node.read_rows()
        self.n_nodes[layer] += 1
        if self._given is not None and self.n_nodes[layer] == self._given.n_nodes[layer]:
            node.write(self._given.states[layer])

    def _replaces(self, node: Node) -> bool:
        return self._products is not None and self._products.has(node)


class _Products:
    """Products with the matrices of a file, in place of those that a graph computes.

    Attributes:
        kept: Names of the matrices that another operation takes, which is not replaced. A matrix that no operation
            takes, as keys and values of the last layers of Gemma 3n, is not among them.
        output_type: Type of the output matrix of the file.
    """

    def __init__(self, spec: ModelSpec, written: GgufSource, *, rounds: bool = False) -> None:
        """Take the matrices of ``written``; if it ``rounds``, inputs are rounded as for the types there."""
        self.kept: set[str] = set()
        self._matrices = {t.name: t for t in spec.tensors if len(t.shape) > 1}
        self._written, self._rounds = written, rounds
        outer = {t.name: t for t in written.spec.tensors if t.layer is None}
        self._output = outer.get("output.weight", outer[_EMBEDDING])  # a file may have one where the source has none
        self.output_type = written.stored_type(self._output)

    def has(self, node: Node) -> bool:
        """Whether it is a product with one of the matrices, or rows of one."""
        if node.op not in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS"):
            return False
        weight, x = node.source(0), node.source(1)
        return weight is not None and x is not None and weight.name in self._matrices and x.holds_numbers

    def note_kept(self, node: Node) -> None:
        """Note the matrices that a node takes which is not replaced."""
        sources = (node.source(i) for i in range(N_SOURCES))
        self.kept |= {source.name for source in sources if source is not None and source.name in self._matrices}

    def of(self, node: Node) -> FloatArray:
        """The numbers of the node ``[1, …]``, of its shape."""
        weight, x = node.source(0), node.source(1)
        assert weight is not None
        assert x is not None
        is_output = node.op == "MUL_MAT" and weight.name in (_EMBEDDING, self._output.name)
        tensor = self._output if is_output else self._matrices[weight.name]
        given = x.read()
        if node.op == "GET_ROWS":
            rows = self._written.read_rows(tensor, [int(i) for i in given.reshape(-1)]).numpy()
            return rows.reshape(node.shape)
        inputs = torch.from_numpy(np.ascontiguousarray(given, dtype=np.float32))
        if self._rounds:
            inputs = rounded(inputs, (self._written.stored_type(tensor),))
        n_matrices, n_in = weight.shape[1], inputs.shape[-1]
        if node.op == "MUL_MAT":
            results = [self._product(tensor, i, of) for i, of in enumerate(inputs.view(n_matrices, -1, n_in))]
            return torch.stack(results).view(node.shape).numpy()
        experts = node.source(2)
        assert experts is not None
        chosen = torch.from_numpy(np.ascontiguousarray(experts.read()[0, 0]))  # [n_tokens, n_used]
        inputs = inputs[0].expand(*chosen.shape, n_in)
        result = torch.empty(node.shape)
        for expert in sorted(set(chosen.reshape(-1).tolist())):
            result[0, chosen == expert] = self._product(tensor, expert, inputs[chosen == expert])
        return result.numpy()

    def _product(self, tensor: TensorSpec, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs ``[n, n_in]`` times one matrix of a tensor: ``[n, n_out]``; some rows are decoded at a time."""
        n_out, n_in = tensor.shape[-2:]
        step = max(1, CHUNK_WEIGHTS // n_in)
        parts = (slice(start, min(start + step, n_out)) for start in range(0, n_out, step))
        first = index * n_out
        rows = (self._written.read_rows(tensor, slice(first + part.start, first + part.stop)) for part in parts)
        return torch.cat([inputs @ matrix.T for matrix in rows], dim=1)

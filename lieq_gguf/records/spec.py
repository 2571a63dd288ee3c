"""``ModelSpec``: what a model is made of, known from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class HeadOrder:
    """How llama.cpp reorders rows or columns: in each group, it swaps the order of two nested indices.

    transformers has ``[group, first, second, inner]``, the file ``[group, second, first, inner]``. A rotated head is a
    group of two halves; value heads are nested in key heads.

    Attributes:
        n_groups: Number of groups.
        n_first: Range of the first index of the two.
        n_second: Range of the second.
        n_inner: Neighbours that stay together.
        start: Rows before the groups, which keep their places.
    """

    n_groups: int
    n_first: int
    n_second: int
    n_inner: int = 1
    start: int = 0

    @property
    def in_source(self) -> npt.NDArray[np.int64]:
        """Index in the source of every index in the file."""
        shape = (self.n_groups, self.n_first, self.n_second, self.n_inner)
        reordered = np.arange(prod(shape)).reshape(shape).swapaxes(1, 2).reshape(-1)
        return np.concatenate([np.arange(self.start), self.start + reordered])

    @property
    def in_file(self) -> npt.NDArray[np.int64]:
        """Index in the file of every index in the source."""
        return np.argsort(self.in_source)

    @property
    def changes_nothing(self) -> bool:
        """Whether the file has the source's order."""
        return self.n_first == 1 or self.n_second == 1


def rotary_order(n_rows: int, n_heads: int) -> HeadOrder:
    """The order of llama.cpp's rotary layout, which interleaves the two halves of each head."""
    return HeadOrder(n_heads, 2, n_rows // n_heads // 2)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file to write.

    Attributes:
        name: GGUF name, for example ``blk.0.attn_q.weight``.
        source_name: Name in the source model, with ``{}`` for the index of an expert, or None for a tensor computed
            from the configuration.
        shape: ``(n_out, n_in)`` for a matrix, ``(n_experts, n_out, n_in)`` for those of experts, ``(n,)`` for a
            vector, ``(n_experts, n)`` for those of experts; rows last, as in numpy.
        layer: Index of the decoder layer, or None for a tensor outside the layers.
        row_order: How the file reorders the rows, or the numbers of a vector; None if it keeps their order.
        column_order: The same of the columns, as the outputs of another matrix that are this one's inputs.
        offset: What the file adds to every weight of the source.
        is_negated_exp: Whether the file has ``-exp(w)`` for a weight ``w`` of the source.
        stored_shape: Shape in the source, if that has the same numbers in another shape.
        is_fixed: Whether the tensor keeps ``fixed_type`` even though it has rows: llama.cpp does not quantise it.
        fixed_type: Name of the type of a vector, and of a tensor that is fixed.
        active_share: Share of the weights that a token uses; less than 1 for experts.
    """

    name: str
    source_name: str | None
    shape: tuple[int, ...]
    layer: int | None = None
    row_order: HeadOrder | None = None
    column_order: HeadOrder | None = None
    offset: float = 0.0
    is_negated_exp: bool = False
    stored_shape: tuple[int, ...] | None = None
    is_fixed: bool = False
    fixed_type: str = "F32"
    active_share: float = 1.0

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names in the source model: one, one for each expert, or none for a computed tensor."""
        if self.source_name is None:
            return ()
        return tuple(self.source_name.format(i) for i in range(self.shape[0] if self.of_experts else 1))

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each of those tensors."""
        return self.stored_shape or (self.shape[1:] if self.of_experts else self.shape)

    @property
    def of_experts(self) -> bool:
        """Whether this holds the same matrix, or the same bias, of all experts of a layer."""
        return len(self.shape) == 3 or "{}" in (self.source_name or "")

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def n_rows(self) -> int:
        """Rows of weights; one for a vector."""
        return prod(self.shape[:-1])

    @property
    def importance_shape(self) -> tuple[int, ...]:
        """Shape of its entry in an importance matrix: ``(n_in,)``, or ``(n_experts, n_in)``."""
        return (self.shape[0], self.shape[-1]) if self.of_experts else self.shape[-1:]

    @property
    def is_matrix(self) -> bool:
        """Whether a plan chooses the type of this tensor."""
        return len(self.shape) > 1 and not self.is_fixed

    def is_looked_up(self, is_tied: bool) -> bool:
        """Whether a token reads a single row of it: tables of tokens, but for one that ``is_tied`` to the output."""
        is_embedding = self.name == "token_embd.weight"
        return self.name == "per_layer_token_embd.weight" or (is_embedding and not is_tied)

    @property
    def names_in_layer(self) -> tuple[str, ...]:
        """Source names inside the layer: ``model.layers.3.mlp.up_proj.weight`` to ``mlp.up_proj.weight``."""
        return tuple(name.split(f"layers.{self.layer}.", 1)[1] for name in self.source_names)

    @property
    def role(self) -> str:
        """Name without layer and suffix: ``attn_q``, ``ffn_down``, ``token_embd``, …."""
        name = self.name.removesuffix(".weight").removesuffix(".bias")
        return name.split(".", 2)[2] if self.layer is not None else name


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model, without its weights.

    Attributes:
        name: Name of the model, for people.
        architecture: llama.cpp's name of the architecture.
        config: The source's ``config.json``; for a GGUF file its equivalent made from the metadata, or empty.
        n_layers: Number of decoder layers.
        tensors: All tensors of the file, in file order.
        has_tied_embeddings: Whether the embedding is the output matrix as well.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    n_layers: int
    tensors: tuple[TensorSpec, ...]
    has_tied_embeddings: bool

    @cached_property
    def layer_matrices(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The quantised matrices of every decoder layer."""
        layers: list[list[TensorSpec]] = [[] for _ in range(self.n_layers)]
        for tensor in self.tensors:
            if tensor.layer is not None and tensor.is_matrix:
                layers[tensor.layer].append(tensor)
        return tuple(tuple(layer) for layer in layers)

    @cached_property
    def outer_matrices(self) -> tuple[TensorSpec, ...]:
        """The matrices outside the layers, the embedding first, whatever their order in the file."""
        matrices = (t for t in self.tensors if t.layer is None and t.is_matrix)
        return tuple(sorted(matrices, key=lambda tensor: tensor.name != "token_embd.weight"))

    @property
    def embedding(self) -> TensorSpec:
        """The token embedding."""
        return next(t for t in self.tensors if t.name == "token_embd.weight")

    @property
    def output_matrix(self) -> TensorSpec:
        """The matrix that gives the logits: the output matrix, or the embedding where it is both."""
        return next((t for t in self.outer_matrices if t.name == "output.weight"), self.embedding)

    @property
    def final_norm(self) -> TensorSpec:
        """The norm after the last layer; LFM2 has it under the name of one after the embedding."""
        outer = {t.name: t for t in self.tensors if t.layer is None}
        return outer.get("output_norm.weight") or outer["token_embd_norm.weight"]

    @property
    def n_layer_weights(self) -> int:
        """Weights in the decoder layers' quantised matrices, the denominator of ``layer_bpw``."""
        return sum(t.n_weights for layer in self.layer_matrices for t in layer)

    @property
    def n_weights(self) -> int:
        """All weights of the source model, the denominator of ``file_bpw``."""
        return sum(t.n_weights for t in self.tensors if t.source_name is not None)

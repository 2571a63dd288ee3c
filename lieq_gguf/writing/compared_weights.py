"""The weights of a file as transformers has them, compared with those of the model while they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lieq_gguf.architectures import family_named
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.sources.file_order import Factors, multiplied
from lieq_gguf.sources.gguf_source import GgufSource
from lieq_gguf.sources.source import Source
from lieq_gguf.sources.tensor_names import HEAD
from lieq_gguf.writing.differences import DifferenceError
from lieq_gguf.writing.tunable import LARGEST_FACTOR, is_tunable_norm

_N_ROWS = 2  # compared of each matrix; of experts one of each
_N_ROWS_IN_FILE_ORDER = 16
_TINY = float(np.finfo(np.float32).tiny)
_LEAST_COSINE = 0.3
_ERROR_FACTOR, _OUTPUT_ERROR_FACTOR, _OUTER_ERROR_FACTOR = 12.0, 2.0, 1.5
_ERROR_FLOOR, _FEEDBACK_FLOOR = 0.01, 0.4
"""Rows of a matrix: their cosine with the source's, and their distance in units of what the type does to them by
itself, beyond a share of their size. Importance moves a row of a layer farther, since columns that hardly count take
the errors of others. So does error feedback, which also moves rows to make good what earlier layers lack. Both move
rows of the output matrix less, in SmolLM2 by 1.1 times the type's own error, since no column of its input is as large.
An embedding that is not the output matrix has neither. Measured with error feedback on every 37th row of SmolLM2 at 3.4
bits: at most 3.2 times as far with Q2_K and Q3_K; with Q4_K, which holds these weights nearly exactly, 0.25 of their
size; cosine at least 0.83. Rows of another matrix have a cosine near 0."""


@dataclass(frozen=True)
class HeadRows:
    """The output matrix of the file, of which rows are decoded when they are needed, and divided by a factor."""

    written: GgufSource
    tensor: TensorSpec
    factors: Factors = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n_vocab, d_model)``."""
        return self.tensor.shape

    @property
    def quant_type(self) -> QuantType:
        """Its type in the file."""
        return self.written.stored_type(self.tensor)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return multiplied(self.written.read_rows(self.tensor, rows), self.factors, back=True)


class ComparedWeights:
    """The file's weights, for transformers' layers. Some rows of each tensor are compared with the source's.

    Factors of ``config.json`` that are in the file's weights are taken out again: transformers' layers have them.
    """

    def __init__(self, source: Source, written: GgufSource) -> None:
        self.spec = source.spec
        self._family = family_named(source.spec.architecture)
        self._source = source
        self._written = written

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """A tensor of the file as transformers has it."""
        loaded = self._written.read(tensor)
        if tensor.source_name is not None:
            self._compare(tensor, loaded)
        return multiplied(loaded, self._factors(tensor.source_name), back=True)

    def compare_all(self) -> None:
        """Compare some rows of every tensor, at least one of every expert, where both are in file order."""
        for tensor in self.spec.tensors:
            if len(tensor.shape) == 1:
                self.read(tensor)
                continue
            n_rows = max(_N_ROWS_IN_FILE_ORDER, 2 * tensor.shape[0] if tensor.of_experts else 0)
            rows = _some_rows(tensor.n_rows, n_rows)
            found, expected = (source.read_rows(tensor, rows) for source in (self._written, self._source))
            _compare_rows(tensor.name, found, expected, self._written.stored_type(tensor), floor=self._floor)
        self.release()

    def release(self) -> None:
        """Free memory used for reading."""
        self._written.release()
        self._source.release()

    def read_rows(self, tensor: TensorSpec, rows: Sequence[int]) -> torch.Tensor:
        """Some rows ``[n_rows, n_in]`` of a table of tokens."""
        found, expected = (source.read_rows(tensor, rows) for source in (self._written, self._source))
        quant_type = self._written.stored_type(tensor)
        compared = tensor.name, found[:_N_ROWS], expected[:_N_ROWS], quant_type
        if tensor is self.spec.output_matrix:
            _compare_rows(*compared, _OUTPUT_ERROR_FACTOR, self._floor)
        else:
            _compare_rows(*compared, _OUTER_ERROR_FACTOR)
        return multiplied(found, self._factors(tensor.source_name), back=True)

    def head(self) -> HeadRows:
        """The output matrix that llama.cpp takes, whatever the source's spec says of it."""
        outer = {t.name: t for t in self._written.spec.tensors if t.layer is None}
        head = HeadRows(self._written, outer.get("output.weight", outer["token_embd.weight"]))
        rows = _some_rows(head.shape[0])
        expected = self._source.read_head()[torch.tensor(rows)]
        found = self._written.read_rows(head.tensor, rows)
        _compare_rows("the output matrix", found, expected, head.quant_type, _OUTPUT_ERROR_FACTOR, self._floor)
        return replace(head, factors=self._factors(HEAD))

    def _factors(self, source_name: str | None) -> Factors:
        if self._family is None or source_name is None or not self._source.has_transformers_model:
            return ()
        return self._family.factors(self.spec.config, source_name)

    def _compare(self, tensor: TensorSpec, loaded: torch.Tensor) -> None:
        expected = self._source.read(tensor)
        if not tensor.is_matrix and not self._written.stored_type(tensor).is_quantized:
            scale = float(expected.float().abs().max())
            if torch.allclose(loaded.float(), expected.float(), rtol=1e-5, atol=1e-6 * scale):
                return
            if not self._may_be_tuned(tensor, loaded, expected):
                raise DifferenceError(f"{tensor.name} has other numbers")
            return
        rows = _some_rows(tensor.shape[-2])
        if tensor.of_experts:  # a row of each
            loaded, expected, rows = loaded[:, rows[-1]], expected[:, rows[-1]], list(range(tensor.shape[0]))
        loaded, expected = loaded[rows], expected[rows]
        if tensor.column_order is not None:  # a type's blocks are neighbours in the file
            columns = torch.from_numpy(tensor.column_order.in_source)
            loaded, expected = loaded[:, columns], expected[:, columns]
        _compare_rows(tensor.name, loaded, expected, self._written.stored_type(tensor), floor=self._floor)

    def _may_be_tuned(self, tensor: TensorSpec, loaded: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether tuning explains the numbers of a norm: each is multiplied by a factor of limited size."""
        if not self._written.is_tuned or not is_tunable_norm(tensor, self._written.stored_type(tensor)):
            return False
        found, intact = (numbers.double() + tensor.offset for numbers in (loaded, expected))
        limit = LARGEST_FACTOR * (1 + 1e-5)
        is_near = (found.abs() <= limit * intact.abs()) & (intact.abs() <= limit * found.abs())
        return bool((is_near & (found * intact >= 0)).all())

    @property
    def _floor(self) -> float:
        return _FEEDBACK_FLOOR if self._written.has_error_feedback else _ERROR_FLOOR


def _some_rows(n_rows: int, n_some: int = _N_ROWS) -> list[int]:
    """Rows spread evenly."""
    return [int(row) for row in np.linspace(0, n_rows - 1, min(n_rows, n_some))]


def _compare_rows(
    name: str,
    found: torch.Tensor,
    expected: torch.Tensor,
    quant_type: QuantType,
    factor: float = _ERROR_FACTOR,
    floor: float = _ERROR_FLOOR,
) -> None:
    """Require that rows ``[n, n_in]`` are the expected ones, as well as a type can hold them."""
    a, b = (np.ascontiguousarray(rows.float().cpu().numpy()) for rows in (found, expected))
    by_type = ggml.dequantize(encoders.quantize(b, quant_type, np.ones(b.shape[1], dtype=np.float32)), quant_type)
    size, of_found, distance, own = (np.linalg.norm(rows, axis=1) for rows in (b, a, a - b, by_type - b))
    bound = factor * own + floor * size
    is_like = (a * b).sum(axis=1) >= _LEAST_COSINE * of_found * size
    if not (is_like & (distance <= bound)).all():
        row = int(np.argmax(distance - bound))
        raise DifferenceError(
            f"{name} has other weights: a row is {distance[row] / (size[row] + _TINY):.0%} off where {quant_type.name} "
            f"explains {bound[row] / (size[row] + _TINY):.0%}"
        )

"""The output matrix with error feedback: encoded so that the logits, not its weights, stay close.

Behind quantised layers it also makes good what their states lack. A matrix that is the embedding too is encoded before
the layers, with the moments of the intact model, and is not moved: its rows are inputs as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.errors import QuantizationError
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.sources.source import Source
from lieq_gguf.writing import error_feedback
from lieq_gguf.writing.moved_weights import correction, moved
from lieq_gguf.writing.writer import EncodedRows

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_ROWS = 4096  # encoded at a time


class OutputFeedback:
    """Encodes the rows of the output matrix."""

    def __init__(
        self,
        source: Source,
        plan: QuantPlan,
        importance: ImportanceMatrix | None,
        moments: torch.Tensor,
        lack: torch.Tensor | None = None,
    ) -> None:
        """Prepare the encoding.

        Args:
            source: The model.
            plan: One type per tensor.
            importance: Weights of the squared errors for ggml's encoders, or None.
            moments: Second moments of the matrix's input ``[d_model, d_model]``; overwritten.
            lack: What the input lacks of the intact model's, as ``SecondMoments`` has it, to be made good; or None.
        """
        self._tensor = source.spec.output_matrix
        self._quant_type = QUANT_TYPES[plan.types[self._tensor.name]]
        self._importance = None if importance is None else importance.mean(self._tensor.name)
        self._source = source
        self._coupled = error_feedback.coupling(moments)
        self._lacking = None if lack is None else correction(lack, self._coupled)

    @staticmethod
    def applies(source: Source, plan: QuantPlan) -> bool:
        """Whether the matrix gets a quantised type that it does not have already."""
        tensor = source.spec.output_matrix
        quant_type = QUANT_TYPES[plan.types[tensor.name]]
        return quant_type.is_quantized and source.encoded_rows(tensor, quant_type) is None

    def encode(self, weights: FloatArray, n_threads: int) -> ByteArray:
        """Encode some rows ``[n_rows, d_model]``.

        Raises:
            QuantizationError: if they cannot be encoded.
        """
        if self._lacking is not None and self._quant_type.family != "trained":
            weights = moved(weights, self._lacking)
        matrix = error_feedback.MatrixToEncode(weights, self._quant_type, self._importance)
        try:
            [encoded] = error_feedback.encode([matrix], self._coupled, n_threads)
        except QuantizationError as error:
            raise QuantizationError(f"{self._tensor.name}: {error}") from None
        return encoded

    def encoded(self, n_threads: int) -> Iterator[EncodedRows]:
        """The whole matrix, in file order.

        Raises:
            QuantizationError: if it cannot be encoded.
        """
        n_left = self._tensor.n_rows
        for weights in self._some_rows():
            n_left -= len(weights)
            yield EncodedRows(self._tensor, self.encode(weights, n_threads), is_last=n_left == 0)
        self._source.release()

    def _some_rows(self) -> Iterator[FloatArray]:
        """Rows in file order, enough at a time for all threads."""
        read: list[FloatArray] = []
        for rows in self._source.rows(self._tensor):
            read.append(rows)
            if sum(map(len, read)) >= _ROWS:
                yield np.concatenate(read)
                read = []
        if read:
            yield np.concatenate(read)

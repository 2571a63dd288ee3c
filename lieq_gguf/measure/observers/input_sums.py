"""The importance matrix: sums of squared inputs per column, as llama-imatrix collects them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.measure.output_head import OutputHead
from lieq_gguf.records.importance import ImportanceMatrix

_ROWS_AT_A_TIME = 256  # their squares stay in the processor's cache


class InputSums(Observer):
    """Sums over tokens of the squared input of each column.

    Query, key and value share one input, as do gate and up.
    """

    sees_inputs = True

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self._tokens = setting.tokens
        self._output_matrix = setting.source.spec.output_matrix
        self._in_sum2: dict[str, npt.NDArray[np.float32]] = {}
        self._counts: dict[str, npt.NDArray[np.float32]] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._n_tokens: Counter[str] = Counter()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """Add a batch; a tensor that reaches several modules is squared once."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, _sums_of_squares(x))
        sums = self._last[1]
        self._sums[module] = self._sums[module] + sums if module in self._sums else sums
        self._n_tokens[module] += x.numel() // x.shape[-1]

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:  # noqa: ARG002
        """Keep the layer's sums under the names of its tensors."""
        for tensor, modules in layer.modules.items():
            unseen = torch.zeros(tensor.shape[-1], dtype=torch.float64)
            sums = torch.stack([self._sums.get(module, unseen) for module in modules])
            self._in_sum2[tensor.name] = (sums if tensor.of_experts else sums[0]).numpy().astype(np.float32)
            if tensor.of_experts:
                self._counts[tensor.name] = np.array([self._n_tokens[module] for module in modules], dtype=np.float32)
        self._sums, self._n_tokens, self._last = {}, Counter(), None

    def conclude(self, output_head: OutputHead, hidden: torch.Tensor) -> None:
        """Add the output matrix, which may be the embedding too."""
        sums = torch.stack([_sums_of_squares(output_head.inputs(sequence)) for sequence in hidden]).sum(dim=0)
        self._in_sum2[self._output_matrix.name] = sums.numpy().astype(np.float32)

    def importance(self) -> ImportanceMatrix:
        """Importance of the matrices of all layers that are done, and in the end of the output matrix."""
        ids = self._tokens.ids
        return ImportanceMatrix(dict(self._in_sum2), ids.size, ids.shape[1], self._tokens.dataset, dict(self._counts))


def _sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Sum over the rows of ``[…, n_in]`` of the square of each column, in float64 on the CPU."""
    rows = torch.split(x.reshape(-1, x.shape[-1]), _ROWS_AT_A_TIME)
    return torch.stack([some.float().square().sum(dim=0) for some in rows]).cpu().double().sum(dim=0)

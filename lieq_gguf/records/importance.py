"""``ImportanceMatrix``: how strongly each column of each matrix is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import CalibrationError
from lieq_gguf.records.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]


_GROUP = 8  # columns that share a code in llama.cpp's smallest types


def _without_empty_groups(means: FloatArray) -> FloatArray:
    """Give columns of empty groups the smallest other mean, or one if there is no other."""
    is_empty = _in_empty_groups(means)
    if not is_empty.any():
        return means
    smallest = means[means > 0].min(initial=np.inf)
    return np.where(is_empty, np.float32(smallest if np.isfinite(smallest) else 1.0), means)


def _in_empty_groups(means: FloatArray) -> npt.NDArray[np.bool_]:
    """Which columns are in a group that is all zero ``[n_in]``."""
    if means.all() or len(means) % _GROUP:
        return np.zeros(len(means), dtype=bool)
    return ~means.reshape(-1, _GROUP).any(axis=1).repeat(_GROUP)


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs of every matrix.

    Attributes:
        in_sum2: Tensor name to ``[n_in]``, the sum over tokens of the squared input of each column; for experts
            ``[n_experts, n_in]``.
        n_tokens: Tokens summed over.
        chunk_size: Tokens in a calibration sequence.
        dataset: Name of the calibration text.
        counts: Name of a tensor of experts to ``[n_experts]``, the tokens that reached each.
    """

    in_sum2: Mapping[str, FloatArray]
    n_tokens: int
    chunk_size: int
    dataset: str
    counts: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def n_chunks(self) -> int:
        """Calibration sequences."""
        return self.n_tokens // self.chunk_size

    def mean(self, name: str) -> FloatArray | None:
        """Mean squared input of each column ``[n_in]``, as ggml's encoders take it; None for a tensor without entry.

        For experts ``[n_experts, n_in]``, over the tokens of each; an expert without tokens gets the mean of all.
        Columns that no input used get a little, since encoders write zeros where nothing counts.
        """
        sums = self.in_sum2.get(name)
        if sums is None:
            return None
        if name not in self.counts:
            return _without_empty_groups(sums / np.float32(self.n_tokens))
        counts = self.counts[name]
        means = np.asarray(sums / np.maximum(counts, 1)[:, None], dtype=np.float32)
        means[counts == 0] = sums.sum(axis=0) / np.maximum(counts.sum(), 1)
        return np.stack([_without_empty_groups(of_expert) for of_expert in means])

    def unused_columns(self, name: str) -> npt.NDArray[np.bool_]:
        """Groups of columns of a matrix, not of experts, that no input used ``[n_in]``."""
        return _in_empty_groups(self.in_sum2[name])

    @property
    def n_unseen(self) -> int:
        """Matrices of experts that no token reached."""
        return sum(int((counts == 0).sum()) for counts in self.counts.values())

    def expert_shares(self, name: str, n_experts: int) -> FloatArray:
        """Share of the tokens that reached each expert ``[n_experts]``; equal shares if it was not measured."""
        counts = self.counts.get(name, np.ones(n_experts, dtype=np.float32))
        return np.asarray(counts / np.maximum(counts.sum(), 1), dtype=np.float32)

    def digest(self) -> str:
        """A digest of all sums."""
        result = hashlib.sha256(str(self.n_tokens).encode())
        for name in sorted(self.in_sum2):
            result.update(name.encode() + np.ascontiguousarray(self.in_sum2[name]).tobytes())
            if name in self.counts:
                result.update(self.counts[name].tobytes())
        return result.hexdigest()

    def check(self, spec: ModelSpec) -> None:
        """Require an entry of the right width for every matrix of the layers.

        Raises:
            CalibrationError: if an entry is missing or has another width, naming it.
        """
        matrices = [t for layer in spec.layer_matrices for t in layer]
        missing = [t.name for t in matrices if t.name not in self.in_sum2]
        if missing:
            raise CalibrationError(
                f"the importance matrix lacks {len(missing)} of the model's {len(matrices)} matrices, "
                f"for example {missing[0]}; expected one made from this model"
            )
        for tensor in matrices:
            found, expected = self.in_sum2[tensor.name].shape, tensor.importance_shape
            if found != expected:
                experts = f" of {expected[0]} experts" if tensor.of_experts else ""
                raise CalibrationError(
                    f"the importance matrix has {' x '.join(map(str, found))} columns for {tensor.name}, the model has "
                    f"{' x '.join(map(str, expected))}{experts}; expected one made from this model"
                )

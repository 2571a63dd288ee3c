"""What a pass over the calibration tokens should measure, and its result, for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import COSTLY_STATISTICS, STATISTICS, LayerMeasurement
from lieq_gguf.records.options import ComputeOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PassOptions:
    """What a pass should measure, and how.

    Attributes:
        statistics: What to measure in every layer, by field of ``LayerMeasurement``; empty to measure only importance.
        n_score_tokens: Number of tokens for LieQ's spectra.
        n_damage_tokens: Number of tokens to run a layer on with each of its matrices quantised.
        error_types: Types whose quantisation error to estimate in every matrix they fit.
        importance: Importance matrix for making the file, if it is not the one of this pass.
        weigh_errors: Whether to weight errors by importance; off if the file will be made without it.
        output_moments: Whether to measure the second moments of the output matrix's input.
        seed: Seed of the untrained twin.
        compute: Device, threads and precision.
    """

    statistics: frozenset[str] = STATISTICS - COSTLY_STATISTICS
    n_score_tokens: int = 256
    n_damage_tokens: int = 512
    error_types: tuple[QuantType, ...] = ()
    importance: ImportanceMatrix | None = None
    weigh_errors: bool = True
    output_moments: bool = False
    seed: int = 0
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    @property
    def measures_damage(self) -> bool:
        """Whether layers are run with quantised matrices."""
        return "block_errors" in self.statistics


@dataclass(frozen=True)
class PassResult:
    """The result of a pass.

    Attributes:
        importance: Importance matrix of all layer matrices.
        measurements: One per layer; empty if no statistic was requested.
        type_errors: Tensor name to type name to weighted relative error, for the requested types.
        sensitivities: Tensor name to block error per unit of relative error; empty if no damage was measured.
        kld_per_block_error: Divergence of the logits, in nats, per block error; None if it was not measured.
        output_moments: Second moments of the output matrix's input ``[d_model, d_model]``; None if not asked for.
    """

    importance: ImportanceMatrix
    measurements: tuple[LayerMeasurement, ...]
    type_errors: Mapping[str, Mapping[str, float]]
    sensitivities: Mapping[str, float]
    kld_per_block_error: float | None = None
    output_moments: torch.Tensor | None = None

"""What a pass over the calibration tokens is to find out, and what it has found, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import COSTLY_STATISTICS, STATISTICS, LayerMeasurement
from lieq_gguf.records.options import ComputeOptions


@dataclass(frozen=True)
class PassOptions:
    """What a pass is to find out, and how.

    Attributes:
        statistics: What to measure of every layer, by field of ``LayerMeasurement``; nothing for the importance alone.
        n_score_tokens: Tokens whose projections LieQ's spectra are computed from.
        n_damage_tokens: Tokens a layer is run on with each of its matrices quantised.
        error_types: Types whose quantisation error to estimate in every matrix they fit.
        importance: Importance matrix that the file will be made with, if not the one of this pass.
        weigh_errors: Whether errors are weighted by importance; off if the file will be made without.
        seed: Seed of the untrained twin.
        compute: Where and how layers are run.
    """

    statistics: frozenset[str] = STATISTICS - COSTLY_STATISTICS
    n_score_tokens: int = 256
    n_damage_tokens: int = 512
    error_types: tuple[QuantType, ...] = ()
    importance: ImportanceMatrix | None = None
    weigh_errors: bool = True
    seed: int = 0
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    @property
    def measures_damage(self) -> bool:
        """Whether layers are run with quantised matrices."""
        return "block_errors" in self.statistics


@dataclass(frozen=True)
class PassResult:
    """What the pass has found.

    Attributes:
        importance: Importance matrix of all layer matrices.
        measurements: One a layer; empty if no statistic was asked for.
        type_errors: Tensor name to type name to weighted relative error, for the types asked for.
        sensitivities: Tensor name to block error per unit of relative error; empty if no damage was measured.
        kld_per_block_error: Divergence of the logits, in nats, per block error; None if it was not measured.
    """

    importance: ImportanceMatrix
    measurements: tuple[LayerMeasurement, ...]
    type_errors: Mapping[str, Mapping[str, float]]
    sensitivities: Mapping[str, float]
    kld_per_block_error: float | None = None

"""``Request``: what the user said. The only place with defaults: command line and Python API are its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.quant_types import DEFAULT_LADDER, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.options import ComputeOptions, MeasuringOptions, SourceOptions, WritingOptions


@dataclass(frozen=True)
class ScoreRequest:
    """Layer scores as the user asks for them.

    Attributes:
        model: Model directory, GGUF file, or name of a model on the hub.
        source: How to take the model.
        measuring: How to find out about the model.
        compute: What may be used of the machine.
        types: Types whose errors to estimate.
        scorer: The score to show first; None for the first there is.
        measures_all: Whether to measure the scores as well that cost more than the pass.
    """

    model: str
    source: SourceOptions = field(default_factory=SourceOptions)
    measuring: MeasuringOptions = field(default_factory=MeasuringOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    types: tuple[QuantType, ...] = DEFAULT_LADDER
    scorer: str | None = None
    measures_all: bool = False


@dataclass(frozen=True)
class ImatrixRequest:
    """An importance matrix as the user asks for it.

    Attributes:
        model: Model directory, GGUF file, or name of a model on the hub.
        source: How to take the model.
        measuring: How to find out about the model.
        compute: What may be used of the machine.
    """

    model: str
    source: SourceOptions = field(default_factory=SourceOptions)
    measuring: MeasuringOptions = field(default_factory=MeasuringOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)


@dataclass(frozen=True)
class Request:
    """A conversion as the user asks for it.

    Attributes:
        model: Model directory, GGUF file, or name of a model on the hub.
        target: What the file may take, or the file of a plan to carry out.
        source: How to take the model.
        allocation: How to divide the bits.
        measuring: How to find out about the model.
        writing: How the file is made.
        compute: What may be used of the machine.
    """

    model: str
    target: BitBudget | Path
    source: SourceOptions = field(default_factory=SourceOptions)
    allocation: AllocationOptions = field(default_factory=AllocationOptions)
    measuring: MeasuringOptions = field(default_factory=MeasuringOptions)
    writing: WritingOptions = field(default_factory=WritingOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

"""``Request``: what the user said. The only place with defaults: command line and Python API are its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.quant_types import DEFAULT_LADDER, QuantType
from lieq_gguf.records.options import ComputeOptions, MeasuringOptions, SourceOptions, WritingOptions

if TYPE_CHECKING:
    from lieq_gguf.records.bits import BitBudget


@dataclass(frozen=True)
class ScoreRequest:
    """The layer scores a user asks for.

    Attributes:
        model: Model directory, GGUF file, or name of a model on the hub.
        source: How to read the model.
        measuring: How to measure the model.
        compute: Device, threads and precision.
        types: Types whose errors to estimate.
        scorer: The score to show first; None for the first one available.
        measures_all: Whether to measure also the scores that cost more than the pass.
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
    """The importance matrix a user asks for.

    Attributes:
        model: Model directory, GGUF file, or name of a model on the hub.
        source: How to read the model.
        measuring: How to measure the model.
        compute: Device, threads and precision.
    """

    model: str
    source: SourceOptions = field(default_factory=SourceOptions)
    measuring: MeasuringOptions = field(default_factory=MeasuringOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)


@dataclass(frozen=True)
class Request:
    """The conversion a user asks for.

    Attributes:
        model: Model directory, GGUF file, or name of a model on the hub.
        target: The bits the file may use, or a plan file to carry out.
        source: How to read the model.
        allocation: How to divide the bits.
        measuring: How to measure the model.
        writing: How to write the file.
        compute: Device, threads and precision.
    """

    model: str
    target: BitBudget | Path
    source: SourceOptions = field(default_factory=SourceOptions)
    allocation: AllocationOptions = field(default_factory=AllocationOptions)
    measuring: MeasuringOptions = field(default_factory=MeasuringOptions)
    writing: WritingOptions = field(default_factory=WritingOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

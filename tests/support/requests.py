"""What tests ask of the pipeline, with their usual options: two threads, and nothing from or into a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lieq_gguf.allocation.problem import AllocationOptions
from lieq_gguf.measure.measuring import Measured, MeasuringNeeds, measure, resolve_measuring
from lieq_gguf.pipeline import convert
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import QuantType, parse_types
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.options import ComputeOptions, MeasuringOptions, SourceOptions, WritingOptions
from lieq_gguf.request import Request
from lieq_gguf.sources.source import Source

TWO_THREADS = ComputeOptions(n_threads=2)


def on_text(text: Path | None, n_tokens: int, **more: Any) -> MeasuringOptions:
    """A pass over some tokens of a text."""
    return MeasuringOptions(text_files=() if text is None else (text,), n_tokens=n_tokens, use_cache=False, **more)


def request_of(
    model: Path,
    bits: float,
    output: Path | None = None,
    types: str | None = None,
    measuring: MeasuringOptions | None = None,
    *,
    error_feedback: bool | None = None,
    allocation: AllocationOptions | None = None,
) -> Request:
    """A conversion to an average of bits, with ``types`` by name on offer."""
    options = allocation or AllocationOptions(granularity="tensor")
    return Request(
        str(model),
        BitBudget("bits", bits),
        allocation=options if types is None else replace(options, types=parse_types(types.split(","))),
        measuring=measuring or on_text(None, 1024),
        writing=WritingOptions(output, error_feedback=error_feedback),
        compute=TWO_THREADS,
    )


def convert_plainly(model: Path, output: Path, type_name: str = "F16", source: SourceOptions = SourceOptions()) -> Path:
    """All matrices, embedding and output included, in one type, without importance matrix and scores."""
    [quant_type] = parse_types([type_name])
    request = request_of(model, quant_type.bits_per_weight, output, measuring=MeasuringOptions(use_imatrix=False))
    options = AllocationOptions(types=(quant_type,), embedding_type=quant_type, output_type=quant_type)
    return convert(replace(request, allocation=options, source=source)).output


def measured(
    source: Source,
    types: tuple[QuantType, ...],
    options: MeasuringOptions,
    compute: ComputeOptions = TWO_THREADS,
    *,
    scores: bool = True,
) -> Measured:
    """Scores and importance of a model."""
    return measure(resolve_measuring(source, options, compute, MeasuringNeeds(scores=scores, types=types)), Progress())

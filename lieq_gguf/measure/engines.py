"""The two ways to run a model, and what each can measure.

Only this module asks whether transformers has a source's model; all others ask the engine what it can do. The passes
themselves are imported when they are run: torch and transformers take seconds to load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias

from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.progress import Progress
from lieq_gguf.records.measurement import STATISTICS
from lieq_gguf.sources.source import Source

RunPass: TypeAlias = Callable[[Source, CalibrationTokens, PassOptions, Progress], PassResult]


@dataclass(frozen=True)
class Engine:
    """A library that runs a model.

    Attributes:
        name: Its name, for messages.
        statistics: What it can measure in a layer, by field of ``LayerMeasurement``.
        certain_statistics: The statistics it can measure in every model.
        runs_layers_again: Whether it can run a layer again with other weights, as block errors and error feedback need.
        runs_on_devices: Whether it runs on devices other than the CPU.
        pass_module: Module with ``run_pass``, the pass over the calibration tokens.
    """

    name: str
    statistics: frozenset[str]
    certain_statistics: frozenset[str]
    runs_layers_again: bool
    runs_on_devices: bool
    pass_module: str

    def load(self) -> RunPass:
        """Import the pass and what it needs."""
        run_pass: RunPass = import_module(self.pass_module).run_pass
        return run_pass

    def run_pass(
        self, source: Source, tokens: CalibrationTokens, options: PassOptions, progress: Progress
    ) -> PassResult:
        """Run the pass."""
        return self.load()(source, tokens, options, progress)


TRANSFORMERS = Engine("transformers", STATISTICS, STATISTICS, True, True, "lieq_gguf.measure.forward_pass")
LLAMA_CPP = Engine(
    "llama.cpp", frozenset({"z_share", "cosine"}), frozenset({"z_share"}), False, False,
    "lieq_gguf.measure.llama_cpp_pass",
)  # fmt: skip


def engine_of(source: Source) -> Engine:
    """The engine that runs a model: transformers wherever it has the model."""
    return TRANSFORMERS if source.has_transformers_model else LLAMA_CPP

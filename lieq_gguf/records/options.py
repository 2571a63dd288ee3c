"""The user's options for the source, the measuring, the file and the machine; all with defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MTP_CHOICES = ("drop", "keep")
TUNE_CHOICES = ("none", "model")


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Attributes:
        revision: Branch, tag or commit of a model on the hub; None for its main branch.
        adapter: Directory of a LoRA adapter to merge into a model directory.
        allow_requantize: Whether a GGUF file may be quantised already.
        initializer_range: Standard deviation of the initial weights, for GGUF files that do not store it.
        mtp: What becomes of a model directory's head for multi-token prediction, by ``MTP_CHOICES``.
    """

    revision: str | None = None
    adapter: Path | None = None
    allow_requantize: bool = False
    initializer_range: float | None = None
    mtp: str = "drop"


@dataclass(frozen=True)
class MeasuringOptions:
    """How to measure the model.

    Attributes:
        text_files: Calibration texts; none for the shipped one alone, for which a name in the list can stand too.
        n_tokens: Number of its tokens to use.
        imatrix_file: Importance matrix to use instead of measuring one.
        use_imatrix: Whether to quantise with an importance matrix at all.
        scores_file: Scores to use instead of measuring them.
        seed: Seed of the untrained twin.
        use_cache: Whether to use the results of an earlier pass, and to keep those of this one.
    """

    text_files: tuple[Path, ...] = ()
    n_tokens: int = 16384
    imatrix_file: Path | None = None
    use_imatrix: bool = True
    scores_file: Path | None = None
    seed: int = 0
    use_cache: bool = True


@dataclass(frozen=True)
class WritingOptions:
    """How to write the file.

    Attributes:
        output: File to write; None for a name made from the model's name and the target.
        force: Whether to replace an existing file.
        error_feedback: Whether to write with error feedback, in a second pass. None: as a given plan says; without a
            plan, if there is an importance matrix.
        tune: What is tuned after the codes are chosen, by ``TUNE_CHOICES``.
        proof: Whether to prove that the file is the model that was read, and to keep none that is not.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if it cannot be recognised.
        command_line: The command, stored in the file.
    """

    output: Path | None = None
    force: bool = False
    error_feedback: bool | None = None
    tune: str = "none"
    proof: bool = True
    pre_tokenizer: str | None = None
    command_line: str = ""


@dataclass(frozen=True)
class ComputeOptions:
    """Device, threads and precision of a run.

    Attributes:
        device: Torch device that layers are run on.
        n_threads: Threads, for all work.
        in_float32: Whether to multiply in float32 even if the device is fast in bfloat16.
    """

    device: str = "cpu"
    n_threads: int = field(default_factory=usable_cores)
    in_float32: bool = False


@dataclass(frozen=True)
class GenerationOptions:
    """How a file answers a prompt.

    Attributes:
        n_generate: Tokens at most.
        temperature: 0 always takes the likeliest token.
        raw: Whether to continue the prompt as text instead of answering it through the chat template.
        seed: Seed of the sampler.
        n_threads: Threads of llama.cpp.
    """

    n_generate: int = 256
    temperature: float = 0.0
    raw: bool = False
    seed: int = 0
    n_threads: int = field(default_factory=usable_cores)

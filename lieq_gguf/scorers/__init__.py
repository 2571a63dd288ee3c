"""Layer scores. Each is one function over the measurements of the pass; higher always means: protect this layer.

Another package adds its own by an entry point in the group ``lieq_gguf.scorers``: a function of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from lieq_gguf.errors import ScoringError
from lieq_gguf.records.measurement import LayerMeasurement
from lieq_gguf.scorers import block_error, energy_gain, lieq, lim, perplexity_drop, zd

ENTRY_POINTS = "lieq_gguf.scorers"
Scorer = Callable[[Sequence[LayerMeasurement]], tuple[float, ...]]

NEEDS_REMOVAL = "perplexity-drop"
"""The one score that costs more than the pass: the model is run without each layer."""


@lru_cache(maxsize=1)
def scorers() -> Mapping[str, Scorer]:
    """All scores by name, our own first.

    Raises:
        ScoringError: if another package's cannot be loaded.
    """
    found: dict[str, Scorer] = {
        "lieq": lieq.score,
        "lieq-qkv": lieq.score_qkv,
        "energy-gain": energy_gain.score,
        "lim": lim.score,
        "zd": zd.score,
        "block-error": block_error.score,
        NEEDS_REMOVAL: perplexity_drop.score,
    }
    for entry in entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, _loaded(entry))
    return found


def _loaded(entry: EntryPoint) -> Scorer:
    try:
        scorer: Scorer = entry.load()
    except Exception as error:  # whatever another package's import raises
        raise ScoringError(f"the scorer '{entry.name}' of {entry.value} cannot be loaded: {error}") from None
    return scorer


def _is_complete(measurement: LayerMeasurement) -> bool:
    return bool(measurement.spectra)


_MEASURED: Mapping[str, Callable[[LayerMeasurement], bool]] = {
    "lim": lambda m: not math.isnan(m.cosine),
    "zd": lambda _: True,
    NEEDS_REMOVAL: lambda m: m.perplexity_drop is not None,
}
"""Whether a layer was measured for a score; scores that are not listed take what only the full pass finds."""

FROM_LLAMA_CPP = ("zd", "lim")
"""Scores of a model that llama.cpp runs and not this package; the second if it shows the outputs of its layers."""


def score_layers(measurements: Sequence[LayerMeasurement]) -> dict[str, tuple[float, ...]]:
    """Every score that these measurements allow.

    Raises:
        ScoringError: if another package's scorer gives no finite number a layer.
    """
    result = {}
    for name, scorer in scorers().items():
        if not all(_MEASURED.get(name, _is_complete)(m) for m in measurements):
            continue
        values = tuple(float(value) for value in scorer(measurements))
        if len(values) != len(measurements) or not all(map(math.isfinite, values)):
            raise ScoringError(
                f"the scorer '{name}' gives {values[:3]}…; expected {len(measurements)} finite numbers, one a layer"
            )
        result[name] = values
    return result

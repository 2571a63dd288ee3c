"""The layer scores by name. Each is a function from the measurements of the pass to one number per layer.

Higher always means: protect this layer. Other packages can add scores by entry points in the group
``lieq_gguf.scorers``. Functions are imported when they are needed, so listing the names is fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TypeAlias

from lieq_gguf.errors import ScoringError
from lieq_gguf.records.measurement import COSTLY_STATISTICS, STATISTICS, LayerMeasurement

ENTRY_POINTS = "lieq_gguf.scorers"
ScoreFunction: TypeAlias = Callable[[Sequence[LayerMeasurement]], tuple[float, ...]]


@dataclass(frozen=True)
class Scorer:
    """A layer score.

    Attributes:
        place: Its function, as ``module:function``.
        needs: Statistics it uses, by field of ``LayerMeasurement``.
    """

    place: str
    needs: frozenset[str] = STATISTICS - COSTLY_STATISTICS

    @property
    def is_costly(self) -> bool:
        """Whether a pass measures what it needs only on request."""
        return bool(self.needs & COSTLY_STATISTICS)

    def load(self) -> ScoreFunction:
        """Import the function.

        Raises:
            ScoringError: if another package's function cannot be loaded.
        """
        module, _, name = self.place.partition(":")
        try:
            function: ScoreFunction = getattr(import_module(module), name)
        except Exception as error:  # another package's import can raise anything
            raise ScoringError(f"the scorer {self.place} cannot be loaded: {error}") from None
        return function


_SPECTRA = frozenset({"spectra", "twin_spectra"})
OWN_SCORERS = {
    "lieq": Scorer("lieq_gguf.scorers.lieq:score", _SPECTRA),
    "lieq-qkv": Scorer("lieq_gguf.scorers.lieq:score_qkv", _SPECTRA),
    "energy-gain": Scorer("lieq_gguf.scorers.energy_gain:score", _SPECTRA),
    "lim": Scorer("lieq_gguf.scorers.lim:score", frozenset({"cosine"})),
    "zd": Scorer("lieq_gguf.scorers.zd:score", frozenset({"z_share"})),
    "block-error": Scorer("lieq_gguf.scorers.block_error:score", frozenset({"block_errors"})),
    "perplexity-drop": Scorer("lieq_gguf.scorers.perplexity_drop:score", frozenset({"perplexity_drop"})),
}


@lru_cache(maxsize=1)
def scorers() -> Mapping[str, Scorer]:
    """All scores by name, our own first; another package's scores may use all that a usual pass measures."""
    from importlib.metadata import entry_points  # looks through all packages, which `--help` need not wait for

    others = {entry.name: Scorer(entry.value) for entry in entry_points(group=ENTRY_POINTS)}
    return OWN_SCORERS | {name: scorer for name, scorer in others.items() if name not in OWN_SCORERS}


def scorers_from(statistics: frozenset[str]) -> tuple[str, ...]:
    """Names of the scores that need only these statistics."""
    return tuple(name for name, scorer in scorers().items() if scorer.needs <= statistics)


def score_layers(measurements: Sequence[LayerMeasurement]) -> dict[str, tuple[float, ...]]:
    """Every score that these measurements allow.

    Raises:
        ScoringError: if another package's scorer cannot be loaded, or does not give one finite number per layer.
    """
    result = {}
    for name, scorer in scorers().items():
        if not all(m.has(scorer.needs) for m in measurements):
            continue
        values = tuple(float(value) for value in scorer.load()(measurements))
        if len(values) != len(measurements) or not all(map(math.isfinite, values)):
            raise ScoringError(
                f"the scorer '{name}' gives {values[:3]}…; expected {len(measurements)} finite numbers, one per layer"
            )
        result[name] = values
    return result

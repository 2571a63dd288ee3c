"""Layer scores. Each is one function over the measurements of the pass; higher always means: protect this layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

from lieq_gguf.records.measurement import LayerMeasurement
from lieq_gguf.scorers import energy_gain, lieq, lim, zd

Scorer = Callable[[Sequence[LayerMeasurement]], tuple[float, ...]]

SCORERS: MappingProxyType[str, Scorer] = MappingProxyType(
    {
        "lieq": lieq.score,
        "lieq-qkv": lieq.score_qkv,
        "energy-gain": energy_gain.score,
        "lim": lim.score,
        "zd": zd.score,
    }
)

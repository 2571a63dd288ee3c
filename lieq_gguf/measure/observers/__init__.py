"""What watches a pass. A new statistic is one file with one ``Observer``, and a row in ``forward_pass``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, cast

import numpy as np
import torch
from transformers import PretrainedConfig

from lieq_gguf.measure.passes import PassOptions
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.sources.source import Source

if TYPE_CHECKING:
    from lieq_gguf.measure.layer_model import LayerModel
    from lieq_gguf.measure.output_head import OutputHead

TokenSample: TypeAlias = tuple[torch.Tensor, slice]
"""Index into ``[n_chunks, chunk_size, …]``: some sequences, and the prefix of each."""

_SCORE_PREFIX = 128  # tokens at the front of a sequence that stand for it: attention is causal, so a prefix can
_DAMAGE_PREFIX = 256


@dataclass(frozen=True)
class PassSetting:
    """What an observer may want to know of the pass before it begins.

    Attributes:
        source: The model.
        config: transformers' configuration of it.
        device: Where layers run.
        tokens: What the pass is made on.
        options: What it is to find out.
    """

    source: Source
    config: PretrainedConfig
    device: torch.device
    tokens: CalibrationTokens
    options: PassOptions

    @cached_property
    def score_sample(self) -> TokenSample:
        """Tokens whose projections are looked at."""
        return _prefixes(self.tokens.ids.shape, self.options.n_score_tokens, _SCORE_PREFIX)

    @cached_property
    def damage_sample(self) -> TokenSample:
        """Tokens that layers are run on again."""
        return _prefixes(self.tokens.ids.shape, self.options.n_damage_tokens, _DAMAGE_PREFIX)


class Observer:
    """Is told of everything that happens while the tokens pass the layers, one layer after the other.

    For each layer: ``see_input`` for every linear module and batch, ``see_output`` for every batch, then ``finish``,
    when all tokens have passed and the layer's weights are still there. After the last layer, ``conclude``.

    Attributes:
        gives: The statistics it measures, by field of ``LayerMeasurement``.
        needs: Observers whose findings it uses; they are told of everything before it.
        sees_inputs: Whether ``see_input`` is to be called at all.
    """

    gives: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[type[Observer], ...]] = ()
    sees_inputs: ClassVar[bool] = False

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        """Begin a pass; ``others`` has the observers this one needs."""

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """A batch reaches a linear module, by its name inside the layer: ``[…, n_in]``."""

    def see_output(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """A batch of hidden states ``[n_chunks, chunk_size, d_model]`` before and after the layer, on the CPU."""

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """The layer is done; it may be run again. ``hidden`` are all its inputs ``[n_chunks, chunk_size, d_model]``."""

    def conclude(self, head: OutputHead, hidden: torch.Tensor) -> None:
        """All layers are done; ``hidden`` are their outputs ``[n_chunks, chunk_size, d_model]``."""

    def statistics(self, layer: int) -> Mapping[str, Any]:  # noqa: ARG002
        """Once the pass is over, what ``gives`` promises of a layer."""
        return {}


_Kind = TypeVar("_Kind", bound=Observer)


class Observers:
    """The observers of a pass, each behind those it needs."""

    def __init__(self, kinds: Sequence[type[Observer]], setting: PassSetting) -> None:
        """Make one of each kind, and of the kinds that these need."""
        self._made: dict[type[Observer], Observer] = {}
        for kind in kinds:
            self._make(kind, setting)

    def _make(self, kind: type[Observer], setting: PassSetting) -> None:
        if kind not in self._made:
            for needed in kind.needs:
                self._make(needed, setting)
            self._made[kind] = kind(setting, self)

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._made.values())

    def __contains__(self, kind: type[Observer]) -> bool:
        return kind in self._made

    def __getitem__(self, kind: type[_Kind]) -> _Kind:
        return cast(_Kind, self._made[kind])


def _prefixes(shape: tuple[int, ...], n_tokens: int, length: int) -> TokenSample:
    """Index of the prefixes of evenly spread sequences, together about ``n_tokens`` tokens."""
    n_chunks, chunk_size = shape
    length = min(length, chunk_size, n_tokens)
    rows = np.linspace(0, n_chunks - 1, min(n_chunks, max(1, n_tokens // length))).round().astype(int)
    return torch.from_numpy(rows), slice(0, length)

"""Observers of a pass. A new statistic is one file with one ``Observer``, and one entry in ``forward_pass``."""

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

_SCORE_PREFIX = 128  # leading tokens of a sequence; attention is causal, so a prefix can stand for it
_DAMAGE_PREFIX = 256


@dataclass(frozen=True)
class PassSetting:
    """What an observer may need before the pass begins.

    Attributes:
        source: The model.
        config: transformers' configuration of it.
        device: Where layers run.
        tokens: The calibration tokens.
        options: What to measure.
    """

    source: Source
    config: PretrainedConfig
    device: torch.device
    tokens: CalibrationTokens
    options: PassOptions

    @cached_property
    def score_sample(self) -> TokenSample:
        """Tokens whose projections are measured."""
        return _prefixes(self.tokens.ids.shape, self.options.n_score_tokens, _SCORE_PREFIX)

    @cached_property
    def damage_sample(self) -> TokenSample:
        """Tokens on which layers are run again."""
        return _prefixes(self.tokens.ids.shape, self.options.n_damage_tokens, _DAMAGE_PREFIX)


class Observer:
    """Called while the tokens pass the layers, one layer after the other.

    For each layer: ``see_input`` for every linear module and batch, ``see_output`` for every batch, then ``finish``,
    when all tokens have passed and the layer's weights are still loaded. After the last layer, ``conclude``.

    Attributes:
        gives: The statistics it measures, by field of ``LayerMeasurement``.
        needs: Observers whose results it uses; they are called before it.
        sees_inputs: Whether ``see_input`` should be called at all.
    """

    gives: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[type[Observer], ...]] = ()
    sees_inputs: ClassVar[bool] = False

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        """Begin a pass; ``others`` has the observers this one needs."""

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """Take the input ``[…, n_in]`` of a linear module, named as inside the layer, for one batch."""

    def see_output(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take a batch of hidden states ``[n_chunks, chunk_size, d_model]`` before and after the layer, on the CPU."""

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """End a layer, which may be run again. ``hidden`` are its inputs ``[n_chunks, chunk_size, state_width]``."""

    def conclude(self, output_head: OutputHead, hidden: torch.Tensor) -> None:
        """End the pass. ``hidden`` are the outputs of the last layer ``[n_chunks, chunk_size, state_width]``."""

    def statistics(self, layer: int) -> Mapping[str, Any]:  # noqa: ARG002
        """After the pass, the statistics of a layer that ``gives`` names."""
        return {}


_Kind = TypeVar("_Kind", bound=Observer)


class Observers:
    """The observers of a pass, each after those it needs."""

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

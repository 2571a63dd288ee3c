"""What watches the calibration pass. A new statistic is one file with one ``Observer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from lieq_gguf.measure.layer_model import LayerModel, OutputHead

TokenSample: TypeAlias = tuple[torch.Tensor, slice]
"""Index into ``[n_chunks, chunk_size, …]``: some sequences, and the head of each."""


class Observer:
    """Is told of everything that happens while the tokens pass the layers, one layer after the other.

    For each layer: ``see_input`` for every linear module and batch, ``see_output`` for every batch, then ``finish``,
    when all tokens have passed and the layer's weights are still there. After the last layer, ``conclude``.

    Attributes:
        sees_inputs: Whether ``see_input`` is to be called at all.
    """

    sees_inputs = False

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """A batch reaches a linear module, by its name inside the layer: ``[…, n_in]``."""

    def see_output(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """A batch of hidden states ``[n_chunks, chunk_size, d_model]`` before and after the layer, on the CPU."""

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """The layer is done; it may be run again. ``hidden`` are all its inputs ``[n_chunks, chunk_size, d_model]``."""

    def conclude(self, head: OutputHead, hidden: torch.Tensor) -> None:
        """All layers are done; ``hidden`` are their outputs ``[n_chunks, chunk_size, d_model]``."""

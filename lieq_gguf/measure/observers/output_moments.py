"""The second moments of the output matrix's input, for error feedback of an embedding that is the output matrix too."""

from __future__ import annotations

import torch

from lieq_gguf.measure.observers import Observer
from lieq_gguf.measure.output_head import OutputHead
from lieq_gguf.measure.second_moments import output_moments


class OutputMoments(Observer):
    """Measures them when the pass ends.

    Attributes:
        moments: ``[d_model, d_model]`` on the CPU; None before.
    """

    moments: torch.Tensor | None = None

    def conclude(self, output_head: OutputHead, hidden: torch.Tensor) -> None:
        """Sum over all tokens."""
        self.moments, _ = output_moments(output_head.inputs, hidden)

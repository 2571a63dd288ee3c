"""Spectra of the projections of a layer and of its untrained twin, which LieQ's scores are functions of."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, TokenSample
from lieq_gguf.records.measurement import Spectrum
from lieq_gguf.scorers.spectrum import energy_spectrum


class Projections(Observer):
    """Energy spectra by role, of the layer on its own input and of the twin on the twin's.

    Those of experts are left out: each sees too few tokens for a spectrum, and others in the twin.

    The twin is made one layer at a time, by the model's own initialiser.

    Attributes:
        spectra: One a layer: role to spectrum.
        twin_spectra: The same of the twin.
    """

    def __init__(
        self,
        prefixes: TokenSample,
        twin_hidden: torch.Tensor,
        twin: LayerModel,
        twin_seed: Callable[[int], int],
        n_threads: int,
    ) -> None:
        """Watch the sequences' heads.

        Args:
            prefixes: Index into the hidden states that gives the tokens to look at.
            twin_hidden: The same tokens in the twin's embedding, ``[n_chunks, length, d_model]``.
            twin: Holds the twin of one layer after the other.
            twin_seed: Gives the seed of a layer's twin by the layer's index.
            n_threads: Eigenproblems solved at a time.
        """
        self.spectra: list[dict[str, Spectrum]] = []
        self.twin_spectra: list[dict[str, Spectrum]] = []
        self._prefixes = prefixes
        self._twin_hidden = twin_hidden
        self._twin = twin
        self._twin_seed = twin_seed
        self._n_threads = n_threads

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Run both on their tokens."""
        projections, _ = _captured(layer, hidden[self._prefixes])
        self.spectra.append(_spectra(projections, layer, self._n_threads))
        self._twin.initialise(self._twin_seed(layer.index), layer.index)
        projections, self._twin_hidden = _captured(self._twin, self._twin_hidden)
        self.twin_spectra.append(_spectra(projections, layer, self._n_threads))
        self._twin.forget()


def _captured(layer: LayerModel, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Projections ``Z = X Wᵀ`` ``[n_tokens, n_out]``, without bias, by module; and the layer's output.

    In float32 always: rounding would fill the weak directions of a narrow spectrum.
    """
    batches: dict[str, list[torch.Tensor]] = {}

    def keep(module: str, z: torch.Tensor) -> None:
        batches.setdefault(module, []).append(z.reshape(-1, z.shape[-1]))

    with layer.watching_outputs(keep):
        output = layer.forward(hidden, exact=True)
    return {module: torch.cat(some) for module, some in batches.items()}, output


def _spectra(projections: dict[str, torch.Tensor], layer: LayerModel, n_threads: int) -> dict[str, Spectrum]:
    """Several at a time with one thread each: LAPACK's own threads wait more than they work on matrices this small."""
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            roles = {m: t.role for m, t in layer.tensors.items() if m in projections and not t.of_experts}
            spectra = pool.map(energy_spectrum, (projections[module] for module in roles))
            return dict(zip(roles.values(), spectra, strict=True))
    finally:
        torch.set_num_threads(n_threads)

"""Spectra of the projections of a layer and of its untrained twin, from which LieQ's scores are computed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.records.measurement import Spectrum
from lieq_gguf.scorers.spectrum import energy_spectrum


class Projections(Observer):
    """Energy spectra by role, of the layer on its own input and of the twin on the twin's.

    Experts are left out: each sees too few tokens for a spectrum, and different tokens in the twin.

    The twin is made one layer at a time, by the model's own initialiser.
    """

    gives = frozenset({"spectra", "twin_spectra"})

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self._spectra: list[dict[str, Spectrum]] = []
        self._twin_spectra: list[dict[str, Spectrum]] = []
        self._prefixes = setting.score_sample
        self._seed = setting.options.seed
        self._n_threads = setting.options.compute.n_threads
        self._twin = LayerModel(setting.config, setting.device)
        rows, prefix = self._prefixes
        ids = setting.tokens.ids[rows.numpy(), prefix]
        self._twin_hidden = self._twin.embed_untrained(ids, self._seed)

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Run the layer and its twin on their hidden states."""
        projections, _ = _captured(layer, hidden[self._prefixes])
        self._spectra.append(_spectra(projections, layer, self._n_threads))
        self._twin.initialise(twin_seed(self._seed, layer.index), layer.index)
        projections, self._twin_hidden = _captured(self._twin, self._twin_hidden)
        self._twin_spectra.append(_spectra(projections, layer, self._n_threads))
        self._twin.forget()

    def statistics(self, layer: int) -> Mapping[str, Any]:
        """Spectra by role, of the layer and of its twin."""
        return {"spectra": self._spectra[layer], "twin_spectra": self._twin_spectra[layer]}


def twin_seed(seed: int, layer: int) -> int:
    """A different seed for every layer, also under neighbouring seeds."""
    return (seed + 1) * 100_003 + layer


def _captured(layer: LayerModel, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Projections ``Z = X Wᵀ`` ``[n_tokens, n_out]``, without bias, by module; and the layer's output.

    Always in float32: rounding to bfloat16 would add energy to the weak directions of a narrow spectrum.
    """
    batches: dict[str, list[torch.Tensor]] = {}

    def keep(module: str, z: torch.Tensor) -> None:
        batches.setdefault(module, []).append(z.reshape(-1, z.shape[-1]))

    with layer.watching_outputs(keep):
        output = layer.forward(hidden, exact=True)
    return {module: torch.cat(some) for module, some in batches.items()}, output


def _spectra(projections: dict[str, torch.Tensor], layer: LayerModel, n_threads: int) -> dict[str, Spectrum]:
    """Spectra by role, several at a time with one thread each: LAPACK's threads mostly wait on such small matrices."""
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            roles = {m: t.role for m, t in layer.tensors.items() if m in projections and not t.of_experts}
            spectra = pool.map(energy_spectrum, (projections[module] for module in roles))
            return dict(zip(roles.values(), spectra, strict=True))
    finally:
        torch.set_num_threads(n_threads)

"""Families whose file can have the model's head for multi-token prediction, with which llama.cpp guesses tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config
from lieq_gguf.architectures.decoder import MTP_KEPT, Decoder
from lieq_gguf.architectures.modules import LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.records.spec import TensorSpec

MTP_TYPE = "Q8_0"  # nothing measures the importance of a head, and a wrong guess costs time but no quality


class WithMtp(Decoder):
    """A family with such a head: one more block behind the layers, that no pass runs."""

    keeps_mtp: ClassVar[bool] = True

    def mtp_modules(self, config: Config) -> tuple[LayerModule, ...]:
        """The modules of the head; their names are those in the source after ``mtp.``."""
        raise NotImplementedError(f"{self.gguf_name} has none")

    def mtp_tensors(self, config: Config) -> Iterator[TensorSpec]:
        """The tensors of the head, with its matrices in Q8_0."""
        sizes, block = self.sizes(config), config["num_hidden_layers"]
        for module in self.mtp_modules(config):
            for tensor in self._module_tensors(config, frozenset(), sizes, block, module):
                assert tensor.source_name is not None
                source = tensor.source_name.replace(f"model.layers.{block}.", "mtp.", 1)
                of_head = replace(tensor, layer=None, source_name=source)
                yield replace(of_head, is_fixed=True, fixed_type=MTP_TYPE) if of_head.is_matrix else of_head

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, where a head is one of the blocks."""
        super().add_hyper_parameters(config, writer)
        n_kept = config.get(MTP_KEPT, 0)
        if n_kept:
            writer.add_block_count(config["num_hidden_layers"] + n_kept)
            writer.add_nextn_predict_layers(n_kept)

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, without the head in the number and in the kinds of layers."""
        config = super().source_config(stored)
        n_kept = stored.value("nextn_predict_layers", 0)
        n_layers = config["num_hidden_layers"] - n_kept
        kinds = {"layer_types": config["layer_types"][:n_layers]} if "layer_types" in config else {}
        return config | kinds | {"num_hidden_layers": n_layers, MTP_KEPT: n_kept}


def within(place: str, modules: Sequence[LayerModule]) -> tuple[LayerModule, ...]:
    """Modules of a layer as those of a head that has the layer at ``place``."""
    return tuple(replace(module, name=f"{place}.{module.name}") for module in modules)

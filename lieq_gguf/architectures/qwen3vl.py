"""Qwen 3 VL, its language model: a Qwen 3 whose positions have three parts, which are the same in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count
from lieq_gguf.architectures.qwen3 import Qwen3
from lieq_gguf.architectures.stored_parameters import StoredParameters

_USUAL_SECTIONS = (24, 20, 20)


class Qwen3Vl(Qwen3):
    """What is seen in images is added to the first layers, whose number the file tells."""

    gguf_name = "qwen3vl"
    model_type = "qwen3_vl_text"
    source_classes = ("Qwen3VLTextModel",)
    rope_types = ("default",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128, "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "vocab_size": 151_936,
    }  # fmt: skip

    def check(self, config: Config) -> None:
        """Refuse also a number of layers that is none.

        With the published sections llama.cpp does not rotate two of the slowest pairs of dimensions, which turn by a
        tenth at the end of the longest context.
        """
        super().check(config)
        require_count("n_deepstack_layers", config.get("n_deepstack_layers", 0), least=0)

    def rope_sections(self, config: Config) -> list[int]:
        """Pairs of dimensions rotated by time, height and width."""
        return list(self.rope(config).get("mrope_section") or _USUAL_SECTIONS)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and how many layers see images."""
        super().add_hyper_parameters(config, writer)
        writer.add_num_deepstack_layers(config.get("n_deepstack_layers", 0))

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and the sections."""
        super().add_rope(config, writer)
        writer.add_rope_dimension_sections([*self.rope_sections(config), 0])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and how many layers see images."""
        return super().source_config(stored) | {"n_deepstack_layers": stored.value("n_deepstack_layers", 0)}

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The common parameters and the sections."""
        return super().source_rope(stored, head_dim) | {
            "mrope_section": list(stored.per_layer("rope.dimension_sections")[:3])
        }

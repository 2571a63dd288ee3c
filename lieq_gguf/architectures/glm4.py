"""GLM-4-0414: norms before and after each half of a layer, half of each head rotated, gate and up in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_number
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import ATTENTION, NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

GLM_ATTENTION = (*ATTENTION[:3], replace(ATTENTION[3], bias=""))
GLM_FEED_FORWARD = (
    LayerModule("ffn_up", "mlp.gate_up_proj", ("gate_up_width", "width")),
    LayerModule("ffn_down", "mlp.down_proj", ("width", "n_ff")),
)


class Glm4(Decoder):
    """transformers, too, rotates neighbouring rows, so none is reordered."""

    gguf_name = "glm4"
    model_type = "glm4"
    source_classes: ClassVar[tuple[str, ...]] = ("Glm4ForCausalLM",)
    modules: ClassVar[tuple[LayerModule, ...]] = (
        NORMS[0],
        *GLM_ATTENTION,
        LayerModule("post_attention_norm", "post_self_attn_layernorm", ("width",)),
        NORMS[1],
        *GLM_FEED_FORWARD,
        LayerModule("post_ffw_norm", "post_mlp_layernorm", ("width",)),
    )
    biases = ("attention_bias",)
    default_head_dim = 128
    defaults: ClassVar[Mapping[str, Any]] = {"attention_bias": True}

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes and the rows of the fused matrix."""
        sizes = super().sizes(config)
        return sizes | {"gate_up_width": 2 * sizes["n_ff"]}

    def check(self, config: Config) -> None:
        """Refuse also a rotation that does not fit the heads."""
        super().check(config)
        head_dim, n_dimensions = self.head_dim(config), self._n_rotated(config)
        if not 0 < n_dimensions <= head_dim or n_dimensions % 2:
            raise ArchitectureError(
                f"by partial_rotary_factor in config.json, {n_dimensions} of {head_dim} dimensions of each head are "
                "rotated; expected pairs of dimensions"
            )

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters, with the share of the dimensions of a head that is rotated."""
        rope = super().rope(config, layer_type)
        rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
        return rope

    def check_rope(self, rope: Config) -> None:
        """Refuse also a share that is no number."""
        super().check_rope(rope)
        require_number("partial_rotary_factor", rope["partial_rotary_factor"])

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write also the number of rotated dimensions."""
        super().add_rope(config, writer)
        writer.add_rope_dimension_count(self._n_rotated(config))

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The common parameters and the rotated share."""
        n_dimensions = stored.count("rope.dimension_count", head_dim)
        return super().source_rope(stored, n_dimensions) | {"partial_rotary_factor": n_dimensions / head_dim}

    def _n_rotated(self, config: Config) -> int:
        return int(self.head_dim(config) * self.rope(config)["partial_rotary_factor"])

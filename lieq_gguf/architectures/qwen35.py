"""Qwen 3.5: three of four layers have a gated delta rule in place of attention, the fourth attention with a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_kinds
from lieq_gguf.architectures.decoder import MTP_KEPT
from lieq_gguf.architectures.modules import ATTENTION, FEED_FORWARD, HEAD_NORMS, LayerModule
from lieq_gguf.architectures.mtp import WithMtp, within
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import HeadOrder

_LAYER_NORMS = (
    LayerModule("attn_norm", "input_layernorm", ("width",)),
    LayerModule("post_attention_norm", "post_attention_layernorm", ("width",)),
)
_GATED_ATTENTION = (
    LayerModule("attn_q", "self_attn.q_proj", ("query_and_gate_width", "width"), bias="attention_bias"),
    *ATTENTION[1:],
    *HEAD_NORMS,
)
_DELTA_RULE = (
    LayerModule("attn_qkv", "linear_attn.in_proj_qkv", ("n_channels", "width"), rows="values_of_qkv"),
    LayerModule("attn_gate", "linear_attn.in_proj_z", ("value_width", "width"), rows="values"),
    LayerModule(
        "ssm_conv1d", "linear_attn.conv1d", ("n_channels", "n_kernel"), rows="values_of_qkv", is_fixed=True,
        stored_shape=("n_channels", "one", "n_kernel"),
    ),
    LayerModule("ssm_dt", "linear_attn.dt_bias", ("n_value_heads",), rows="value_heads", suffixes=(".bias", "")),
    LayerModule(
        "ssm_a", "linear_attn.A_log", ("n_value_heads",), rows="value_heads", suffixes=("", ""), is_negated_exp=True
    ),
    LayerModule("ssm_beta", "linear_attn.in_proj_b", ("n_value_heads", "width"), rows="value_heads"),
    LayerModule("ssm_alpha", "linear_attn.in_proj_a", ("n_value_heads", "width"), rows="value_heads"),
    LayerModule("ssm_norm", "linear_attn.norm", ("value_head_dim",), has_own_scale=True),
    LayerModule("ssm_out", "linear_attn.out_proj", ("width", "value_width"), columns="values"),
)  # fmt: skip
_JOINS_NEXT_TOKEN = (  # the last hidden state and the embedding of the next token
    LayerModule("nextn.eh_proj", "fc", ("width", "two_widths")),
    LayerModule("nextn.enorm", "pre_fc_norm_embedding", ("width",)),
    LayerModule("nextn.hnorm", "pre_fc_norm_hidden", ("width",)),
    LayerModule("nextn.shared_head_norm", "norm", ("width",)),
)
_KINDS = ("linear_attention", "full_attention")
_USUAL_SECTIONS = (11, 11, 10)
_USUAL_INTERVAL = 4


class Qwen35(WithMtp):
    """The dense models. Norms multiply by one plus their weight, except that of the delta rule.

    llama.cpp repeats key heads in turn, so value heads, which transformers keeps by key head, are reordered: in the
    rows of what makes values, and in the columns of what reads them.
    """

    gguf_name = "qwen35"
    model_type = "qwen3_5_text"
    source_classes: ClassVar[tuple[str, ...]] = ("Qwen3_5ForCausalLM",)
    network: ClassVar[tuple[LayerModule, ...]] = FEED_FORWARD
    modules: ClassVar[tuple[LayerModule, ...]] = (*_LAYER_NORMS, *_GATED_ATTENTION, *_DELTA_RULE, *FEED_FORWARD)
    rope_types: ClassVar[tuple[str, ...]] = ("default", "yarn")
    norm_offset = 1.0
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256, "hidden_size": 4096, "intermediate_size": 12288, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "max_position_embeddings": 32768, "num_attention_heads": 16,
        "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 248320,
    }  # fmt: skip

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the kind of every layer."""
        result = super().completed(config)
        if result.get("layer_types") is None:
            interval = int(result.get("full_attention_interval") or _USUAL_INTERVAL)
            n_layers = int(result["num_hidden_layers"])
            result["layer_types"] = [_KINDS[(layer + 1) % interval == 0] for layer in range(n_layers)]
        return result

    def check(self, config: Config) -> None:
        """Refuse also heads and rotations that the graph does not compute."""
        super().check(config)
        keys = [key for key in self.defaults if key.startswith("linear_")]
        for key in keys:
            require_count(key, config[key])
        require_kinds(config, _KINDS)
        sizes = self.sizes(config)
        if sizes["key_head_dim"] != sizes["value_head_dim"]:
            raise ArchitectureError(
                f"linear_key_head_dim is {sizes['key_head_dim']} and linear_value_head_dim {sizes['value_head_dim']}, "
                f"but llama.cpp runs {self.gguf_name} only where they are equal"
            )
        if sizes["n_value_heads"] % sizes["n_key_heads"]:
            raise ArchitectureError(
                f"linear_num_value_heads is {sizes['n_value_heads']}; expected a multiple of linear_num_key_heads, "
                f"{sizes['n_key_heads']}"
            )
        if not config.get("attn_output_gate", True):
            raise ArchitectureError("attn_output_gate is off, but llama.cpp's graph has a gate after attention")
        self._check_sections(config)

    def _check_sections(self, config: Config) -> None:
        """Refuse sections that give some dimensions the position of nothing: each goes up to three times its number."""
        sections = self.rope_sections(config)
        n_pairs = sum(sections)
        for pair in range(self.rotary_dims(config) // 2):
            if pair % n_pairs >= 3 * sections[pair % n_pairs % 3]:
                raise ArchitectureError(f"mrope_section {sections} leaves dimensions of a head without a rotation")

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, and those of the delta rule."""
        sizes = super().sizes(config)
        n_key_heads, n_value_heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
        key_dim, value_dim = int(config["linear_key_head_dim"]), int(config["linear_value_head_dim"])
        return sizes | {
            "two_widths": 2 * sizes["width"],
            "query_and_gate_width": 2 * sizes["q_width"],
            "n_key_heads": n_key_heads,
            "n_value_heads": n_value_heads,
            "key_head_dim": key_dim,
            "value_head_dim": value_dim,
            "value_width": n_value_heads * value_dim,
            "n_channels": 2 * n_key_heads * key_dim + n_value_heads * value_dim,
            "n_kernel": int(config["linear_conv_kernel_dim"]),
        }

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """Attention or the delta rule, and a feed-forward network."""
        mixer = _DELTA_RULE if config["layer_types"][layer] == _KINDS[0] else _GATED_ATTENTION
        return (_LAYER_NORMS[0], *mixer, _LAYER_NORMS[1], *self.network)

    def mtp_modules(self, config: Config) -> tuple[LayerModule, ...]:  # noqa: ARG002
        """A layer with attention, and what joins its inputs."""
        layer = (_LAYER_NORMS[0], *_GATED_ATTENTION, _LAYER_NORMS[1], *self.network)
        return (*within("layers.0", layer), *_JOINS_NEXT_TOKEN)

    def orders(self, config: Config) -> Mapping[str, HeadOrder]:
        """Value heads, in transformers by key head."""
        sizes = self.sizes(config)
        heads = HeadOrder(1, sizes["n_key_heads"], sizes["n_value_heads"] // sizes["n_key_heads"])
        values = HeadOrder(1, heads.n_first, heads.n_second, sizes["value_head_dim"])
        before = sizes["n_channels"] - sizes["value_width"]
        of_qkv = HeadOrder(1, heads.n_first, heads.n_second, sizes["value_head_dim"], start=before)
        return {"value_heads": heads, "values": values, "values_of_qkv": of_qkv}

    def rotary_dims(self, config: Config) -> int:
        """Dimensions of a head that are rotated."""
        share = self.rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0.25
        return int(self.head_dim(config) * share)

    def rope_sections(self, config: Config) -> list[int]:
        """Pairs of dimensions rotated by time, height and width, which are the same number in a text."""
        return list(self.rope(config).get("mrope_section") or _USUAL_SECTIONS)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys and those of the delta rule."""
        super().add_hyper_parameters(config, writer)
        sizes = self.sizes(config)
        writer.add_ssm_conv_kernel(sizes["n_kernel"])
        writer.add_ssm_state_size(sizes["key_head_dim"])
        writer.add_ssm_group_count(sizes["n_key_heads"])
        writer.add_ssm_time_step_rank(sizes["n_value_heads"])
        writer.add_ssm_inner_size(sizes["value_width"])
        is_recurrent = [kind == _KINDS[0] for kind in config["layer_types"]] + [False] * config.get(MTP_KEPT, 0)
        writer.add_array(f"{self.gguf_name}.attention.recurrent_layers", is_recurrent)
        writer.add_full_attention_interval(config.get("full_attention_interval", _USUAL_INTERVAL))

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and which dimensions are rotated."""
        super().add_rope(config, writer)
        writer.add_rope_dimension_count(self.rotary_dims(config))
        writer.add_rope_dimension_sections([*self.rope_sections(config), 0])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys and those of the delta rule."""
        config = super().source_config(stored)
        n_layers, n_value_heads = config["num_hidden_layers"], stored.count("ssm.time_step_rank")
        interval = stored.count("full_attention_interval", _USUAL_INTERVAL)
        is_recurrent = stored.per_layer(
            "attention.recurrent_layers", [(layer + 1) % interval != 0 for layer in range(n_layers)]
        )
        return config | {
            "linear_conv_kernel_dim": stored.count("ssm.conv_kernel"),
            "linear_key_head_dim": stored.count("ssm.state_size"),
            "linear_num_key_heads": stored.count("ssm.group_count"),
            "linear_num_value_heads": n_value_heads,
            "linear_value_head_dim": stored.count("ssm.inner_size") // n_value_heads,
            "layer_types": [_KINDS[0] if recurrent else _KINDS[1] for recurrent in is_recurrent[:n_layers]],
        }

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """The common parameters, and which dimensions are rotated."""
        n_rotated = stored.count("rope.dimension_count", head_dim)
        return super().source_rope(stored, n_rotated) | {
            "partial_rotary_factor": n_rotated / head_dim,
            "mrope_section": list(stored.per_layer("rope.dimension_sections")[:3]),
        }

"""Granite 4: Mamba-2 in most layers, attention in the others, with or without experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_experts, require_kinds
from lieq_gguf.architectures.granite import Granite
from lieq_gguf.architectures.mamba2 import Mamba2, mamba_modules
from lieq_gguf.architectures.modules import INTERLEAVED_ATTENTION, NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_MAMBA = mamba_modules("mamba")
_FEED_FORWARD = (
    LayerModule("ffn_gate", "shared_mlp.gate_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_up", "shared_mlp.up_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_down", "shared_mlp.down_proj", ("width", "n_shared_ff")),
)
_EXPERTS = (
    LayerModule("ffn_gate_inp", "block_sparse_moe.router", ("n_experts", "width"), is_fixed=True),
    LayerModule("ffn_gate_exps", "block_sparse_moe.experts.{}.gate_proj", ("n_experts", "n_ff", "width")),
    LayerModule("ffn_up_exps", "block_sparse_moe.experts.{}.up_proj", ("n_experts", "n_ff", "width")),
    LayerModule("ffn_down_exps", "block_sparse_moe.experts.{}.down_proj", ("n_experts", "width", "n_ff")),
    LayerModule("ffn_gate_shexp", "shared_mlp.gate_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_up_shexp", "shared_mlp.up_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_down_shexp", "shared_mlp.down_proj", ("width", "n_shared_ff")),
)
_KINDS = ("linear_attention", "full_attention")
_RENAMED = {"mamba": _KINDS[0], "attention": _KINDS[1]}  # in published files
_ANY_LENGTH = 1 << 20  # what llama.cpp's converter writes where nothing depends on positions


class GraniteHybrid(Mamba2, Granite):
    """Models with Mamba-2 layers. Of these, transformers and llama.cpp's converter rotate none by default."""

    gguf_name = "granitehybrid"
    model_type = "granitemoehybrid"
    source_classes = ("GraniteMoeHybridForCausalLM",)
    modules = (NORMS[0], *INTERLEAVED_ATTENTION, *_MAMBA, NORMS[1], *_FEED_FORWARD, *_EXPERTS)
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096, "intermediate_size": 11008, "mamba_conv_bias": True, "mamba_d_conv": 4,
        "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128,
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_local_experts": 8, "rms_norm_eps": 1e-6, "shared_intermediate_size": 1024, "vocab_size": 32000,
    }  # fmt: skip

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the kind of every layer, and the width of a Mamba-2 head."""
        result = dict(super().completed(config))
        if result.get("mamba_d_head", "auto") == "auto":
            result["mamba_d_head"] = result["mamba_expand"] * result["hidden_size"] // result["mamba_n_heads"]
        return result | {"layer_types": _kinds(result)}

    def has_model(self, config: Config) -> bool:
        """Whether there are Mamba-2 layers."""
        return _KINDS[0] in _kinds({**self.defaults, **config})

    def has_file(self, keys: Collection[str]) -> bool:  # noqa: ARG002
        """All files of the architecture."""
        return True

    def check(self, config: Config) -> None:
        """Refuse also kinds of layers and sizes that the graph does not have."""
        super().check(config)
        require_kinds(config, _KINDS)
        require_count("shared_intermediate_size", config["shared_intermediate_size"])
        require_count("num_local_experts", config["num_local_experts"], least=0)
        if config["num_local_experts"]:
            require_experts(config, "num_local_experts")
        sizes = self.sizes(config)
        if sizes["ssm_width"] != 2 * sizes["width"]:
            raise ArchitectureError(
                f"{sizes['n_ssm_heads']} Mamba-2 heads of width {sizes['ssm_head_dim']} are {sizes['ssm_width']} wide, "
                f"but llama.cpp runs {self.gguf_name} only with twice hidden_size, {2 * sizes['width']}"
            )

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, and those of experts; without experts, the shared network is the only one."""
        n_shared, n_experts = int(config["shared_intermediate_size"]), int(config["num_local_experts"])
        of_experts = {"n_experts": n_experts, "n_experts_used": int(config["num_experts_per_tok"] or 0)}
        return super().sizes(config) | {"n_shared_ff": n_shared} | (of_experts if n_experts else {"n_ff": n_shared})

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """Mamba-2 or attention, and a feed-forward network or experts."""
        mixer = _MAMBA if config["layer_types"][layer] == _KINDS[0] else INTERLEAVED_ATTENTION
        return (NORMS[0], *mixer, NORMS[1], *(_EXPERTS if config["num_local_experts"] else _FEED_FORWARD))

    def kv_heads(self, config: Config) -> list[int]:
        """None in a layer with Mamba-2."""
        n_kv_heads = self.sizes(config)["n_kv_heads"]
        return [n_kv_heads if kind == _KINDS[1] else 0 for kind in config["layer_types"]]

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, those of experts, and whether there is a rotation."""
        is_rotated = config.get("position_embedding_type") == "rope"
        length = {} if is_rotated else {"max_position_embeddings": _ANY_LENGTH}
        super().add_hyper_parameters({**config, **length}, writer)
        writer.add_rope_scaling_finetuned(is_rotated)  # which Granite's graphs take as a switch
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"] or 0)
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, the kinds of layers, those of experts, and whether there is a rotation."""
        config = super().source_config(stored)
        counts = stored.per_layer("attention.head_count_kv")
        counts = counts if isinstance(counts, list) else [counts] * config["num_hidden_layers"]
        n_experts = stored.value("expert_count", 0)
        n_used = stored.value("expert_used_count", 0)
        return config | {
            "layer_types": [_KINDS[1] if count else _KINDS[0] for count in counts],
            "mamba_expand": 2,
            "num_local_experts": stored.count("expert_count") if n_experts else 0,
            "num_experts_per_tok": stored.count("expert_used_count") if n_used else 0,
            "shared_intermediate_size": stored.count("expert_shared_feed_forward_length"),
            "position_embedding_type": "rope" if stored.value("rope.scaling.finetuned", True) else "nope",
        }


class GraniteWithoutMamba(GraniteHybrid):
    """Models of the same class with attention in all layers: llama.cpp's converter takes Granite 3's graph for them."""

    gguf_name = "granite"
    modules = (NORMS[0], *INTERLEAVED_ATTENTION, NORMS[1], *_FEED_FORWARD)

    def has_model(self, config: Config) -> bool:
        """Whether there are no Mamba-2 layers."""
        return not super().has_model(config)

    def has_file(self, keys: Collection[str]) -> bool:
        """Whether the file tells of Mamba-2 layers, although it has none."""
        return "ssm.inner_size" in keys

    def check(self, config: Config) -> None:
        """Refuse also experts, for which llama.cpp has another graph."""
        super().check(config)
        if config["num_local_experts"]:
            raise ArchitectureError("experts in a model without Mamba-2 layers are not supported; expected none")


def _kinds(config: Config) -> Any:
    """Kinds of the layers, by transformers' names; as they were read if they are no list."""
    found = config.get("layer_types") or config.get("layers_block_type")
    if found is None:
        return [_KINDS[0]] * int(config["num_hidden_layers"])
    return [_RENAMED.get(kind, kind) for kind in found] if isinstance(found, list) else found

"""Nemotron-H and Nemotron 3: every layer is one of Mamba-2, attention, a feed-forward network, or experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_count, require_experts, require_kinds, require_number
from lieq_gguf.architectures.decoder import MTP_KEPT
from lieq_gguf.architectures.experts import add_expert_counts, expert_sizes, source_expert_counts
from lieq_gguf.architectures.mamba2 import Mamba2, mamba_modules
from lieq_gguf.architectures.modules import LayerModule
from lieq_gguf.architectures.mtp import WithMtp, within
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

_NORM = LayerModule("attn_norm", "norm", ("width",))
_MAMBA = mamba_modules("mixer")
_ATTENTION = (  # not rotated, but llama.cpp's converter reorders the rows, of both alike
    LayerModule("attn_q", "mixer.q_proj", ("q_width", "width"), rows="rotated_queries"),
    LayerModule("attn_k", "mixer.k_proj", ("kv_width", "width"), rows="rotated_keys"),
    LayerModule("attn_v", "mixer.v_proj", ("kv_width", "width")),
    LayerModule("attn_output", "mixer.o_proj", ("width", "q_width")),
)
_FEED_FORWARD = (
    LayerModule("ffn_up", "mixer.up_proj", ("n_ff", "width"), bias="mlp_bias"),
    LayerModule("ffn_down", "mixer.down_proj", ("width", "n_ff"), bias="mlp_bias"),
)
_EXPERTS = (
    LayerModule("ffn_gate_inp", "mixer.gate", ("n_experts", "width"), is_fixed=True),
    LayerModule("exp_probs_b", "mixer.gate.e_score_correction_bias", ("n_experts",), suffixes=(".bias", "")),
    LayerModule("ffn_up_exps", "mixer.experts.{}.up_proj", ("n_experts", "n_expert_ff", "expert_width")),
    LayerModule("ffn_down_exps", "mixer.experts.{}.down_proj", ("n_experts", "expert_width", "n_expert_ff")),
    LayerModule("ffn_up_shexp", "mixer.shared_experts.up_proj", ("n_shared_ff", "width")),
    LayerModule("ffn_down_shexp", "mixer.shared_experts.down_proj", ("width", "n_shared_ff")),
)
_LATENT = (  # Nemotron 3 Super: experts work in a narrower space
    LayerModule("ffn_latent_down", "mixer.fc1_latent_proj", ("expert_width", "width")),
    LayerModule("ffn_latent_up", "mixer.fc2_latent_proj", ("width", "expert_width")),
)
_JOINS_NEXT_TOKEN = (  # the last hidden state and the embedding of the next token
    LayerModule("nextn.eh_proj", "layers.0.eh_proj", ("width", "two_widths")),
    LayerModule("nextn.enorm", "layers.0.enorm", ("width",)),
    LayerModule("nextn.hnorm", "layers.0.hnorm", ("width",)),
    LayerModule("nextn.shared_head_norm", "layers.1.final_layernorm", ("width",)),
)
_MAMBA_KIND, _ATTENTION_KIND, _MLP_KIND, _MOE_KIND = "linear_attention", "full_attention", "mlp", "moe"
_BY_LETTER = {"M": _MAMBA_KIND, "*": _ATTENTION_KIND, "-": _MLP_KIND, "E": _MOE_KIND}
_RENAMED = {"mamba": _MAMBA_KIND, "attention": _ATTENTION_KIND}  # in older files
_OLDER_KEYS = {"mamba_conv_bias": "use_conv_bias", "mamba_d_conv": "conv_kernel", "mamba_n_groups": "n_groups"}
_ANY_LENGTH = 1 << 20  # what llama.cpp's converter writes where nothing depends on positions


class NemotronH(Mamba2):
    """Models without experts. There are no rotations.

    The file says by zeros which layer is of which kind: no heads of keys, or no feed-forward network.
    """

    gguf_name = "nemotron_h"
    model_type = "nemotron_h"
    source_classes = ("NemotronHForCausalLM",)
    modules: ClassVar[tuple[LayerModule, ...]] = (_NORM, *_MAMBA, *_ATTENTION, *_FEED_FORWARD)
    final_norm = ("output_norm", "norm_f")
    norm_epsilon = "layer_norm_epsilon"
    activation = "relu2"
    default_head_dim = 128
    mamba_keys: ClassVar[Mapping[str, str]] = {
        "n_kernel": "conv_kernel", "state_size": "ssm_state_size", "n_groups": "n_groups",
        "n_ssm_heads": "mamba_num_heads", "ssm_head_dim": "mamba_head_dim",
    }  # fmt: skip
    convolution_bias = "use_conv_bias"
    projection_biases = ("use_bias",)
    kinds: ClassVar[Mapping[str, tuple[LayerModule, ...]]] = {
        _MAMBA_KIND: _MAMBA, _ATTENTION_KIND: _ATTENTION, _MLP_KIND: _FEED_FORWARD,
    }  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {
        "conv_kernel": 4, "hidden_size": 4096, "intermediate_size": 21504, "layer_norm_epsilon": 1e-5,
        "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 128, "max_position_embeddings": 4096,
        "mlp_hidden_act": "relu2", "moe_intermediate_size": 7688, "moe_latent_size": None,
        "moe_shared_expert_intermediate_size": 7688, "n_group": 1, "n_groups": 8, "n_routed_experts": 8,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_key_value_heads": 8, "routed_scaling_factor": 1.0, "ssm_state_size": 128,
        "topk_group": 1, "use_conv_bias": True, "vocab_size": 131_072,
    }  # fmt: skip

    def has_model(self, config: Config) -> bool:
        """Whether no layer has experts; transformers' configuration has experts by default, also where none has."""
        return _MOE_KIND not in _kinds(config)

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the kind of every layer, whose number is the model's, and with newer keys."""
        renamed = {_OLDER_KEYS.get(key, key): value for key, value in config.items()}
        kinds = _kinds(config)
        return {**super().completed(renamed), "layer_types": kinds, "num_hidden_layers": len(kinds)}

    def check(self, config: Config) -> None:
        """Refuse also kinds of layers that the graph does not have."""
        super().check(config)
        require_kinds(config, tuple(self.kinds))

    def check_activation(self, config: Config) -> None:
        """Refuse activations other than the graph's, which has one in Mamba-2 and another in networks."""
        for key, expected in (("mamba_hidden_act", "silu"), ("mlp_hidden_act", self.activation)):
            if config[key] != expected:
                raise ArchitectureError(
                    f"{key} is '{config[key]}', but llama.cpp runs {self.gguf_name} models only with '{expected}'"
                )

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """A norm, and the modules of the layer's kind."""
        return (_NORM, *self.kinds[config["layer_types"][layer]])

    def kv_heads(self, config: Config) -> list[int]:
        """Only in layers with attention."""
        n_kv_heads = self.sizes(config)["n_kv_heads"]
        return [n_kv_heads if kind == _ATTENTION_KIND else 0 for kind in config["layer_types"]]

    def feed_forward_lengths(self, config: Config) -> list[int]:
        """Widths of the feed-forward networks, 0 in a layer without."""
        return [int(config["intermediate_size"]) if kind == _MLP_KIND else 0 for kind in config["layer_types"]]

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and the size of the vocabulary."""
        super().add_hyper_parameters({**config, "max_position_embeddings": _ANY_LENGTH}, writer)
        writer.add_vocab_size(config["vocab_size"])

    def add_norm_epsilon(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Under the key of other norms too; under that of these, the converter writes it if it finds another name."""
        writer.add_layer_norm_eps(config[self.norm_epsilon])
        if "norm_eps" in config or "rms_norm_eps" in config:
            writer.add_layer_norm_rms_eps(config[self.norm_epsilon])

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The keys of a rotation that there is not; the converter takes what it finds."""
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_rope_scaling_finetuned(False)
        if config.get("rope_theta") or config.get("rope_parameters"):
            writer.add_rope_freq_base(self.rope(config)["rope_theta"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and the kinds of layers."""
        config = super().source_config(stored)
        del config["rope_parameters"]
        n_layers = config["num_hidden_layers"]
        heads, widths = (
            value if isinstance(value := stored.per_layer(key), list) else [value] * n_layers
            for key in ("attention.head_count_kv", "feed_forward_length")
        )
        with_network = _MOE_KIND if _MOE_KIND in self.kinds else _MLP_KIND
        kinds = [
            _ATTENTION_KIND if n_heads else with_network if width else _MAMBA_KIND
            for n_heads, width in zip(heads, widths, strict=True)
        ]
        return config | {"layer_types": kinds}

    def source_epsilon(self, stored: StoredParameters) -> float:
        """The key of these norms, or of others."""
        return stored.number("attention.layer_norm_rms_epsilon", stored.number("attention.layer_norm_epsilon"))

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: its keys mean nothing."""
        for key in ("dimension_count", "freq_base", "scaling.finetuned"):
            stored.value(f"rope.{key}", None)
        return {}


class NemotronHMoe(WithMtp, NemotronH):
    """Models with experts: no gates, a sigmoid router whose choice is biased, and a shared expert."""

    gguf_name = "nemotron_h_moe"
    modules = (_NORM, *_MAMBA, *_ATTENTION, *_EXPERTS, *_LATENT)
    kinds: ClassVar[Mapping[str, tuple[LayerModule, ...]]] = {
        _MAMBA_KIND: _MAMBA, _ATTENTION_KIND: _ATTENTION, _MOE_KIND: _EXPERTS,
    }  # fmt: skip

    def has_model(self, config: Config) -> bool:
        """Whether some layer has experts."""
        return not super().has_model(config)

    def check(self, config: Config) -> None:
        """Refuse also numbers of experts that cannot be."""
        super().check(config)
        for key in ("n_routed_experts", "moe_intermediate_size", "n_group", "topk_group",
                    "moe_shared_expert_intermediate_size"):  # fmt: skip
            require_count(key, config[key])
        if config["moe_latent_size"] is not None:
            require_count("moe_latent_size", config["moe_latent_size"])
        require_number("routed_scaling_factor", config["routed_scaling_factor"])
        n_experts, n_groups = config["n_routed_experts"], config["n_group"]
        if n_experts % n_groups or config["topk_group"] > n_groups:
            raise ArchitectureError(
                f"{n_experts} experts in {n_groups} groups, of which {config['topk_group']} are used"
            )
        require_experts(config, "n_routed_experts", n_chosen_from=n_experts // n_groups * config["topk_group"])

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, and those of experts."""
        sizes = super().sizes(config)
        return (
            sizes
            | expert_sizes(config, int(config["n_routed_experts"]))
            | {
                "n_shared_ff": int(config["moe_shared_expert_intermediate_size"]),
                "expert_width": int(config["moe_latent_size"] or sizes["width"]),
                "two_widths": 2 * sizes["width"],
            }
        )

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """The modules of the layer's kind; with experts in a narrower space, also the ways to it and back."""
        modules = super().layer_modules(config, layer)
        return (*modules, *_latent(config)) if config["layer_types"][layer] == _MOE_KIND else modules

    def mtp_modules(self, config: Config) -> tuple[LayerModule, ...]:
        """Attention, then experts with a norm of another name, and what joins the inputs of both."""
        norm = replace(_NORM, role="post_attention_norm")
        experts = (norm, *_EXPERTS, *_latent(config))
        return (*within("layers.0", (_NORM, *_ATTENTION)), *within("layers.1", experts), *_JOINS_NEXT_TOKEN)

    def kv_heads(self, config: Config) -> list[int]:
        """Only in layers with attention, and in the head for multi-token prediction."""
        return super().kv_heads(config) + [self.sizes(config)["n_kv_heads"]] * config.get(MTP_KEPT, 0)

    def feed_forward_lengths(self, config: Config) -> list[int]:
        """Widths of an expert, 0 in a layer without."""
        n_ff = int(config["moe_intermediate_size"])
        widths = [n_ff if kind == _MOE_KIND else 0 for kind in config["layer_types"]]
        return widths + [n_ff] * config.get(MTP_KEPT, 0)

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and those of experts."""
        super().add_hyper_parameters(config, writer)
        sizes = self.sizes(config)
        add_expert_counts(sizes, writer)
        writer.add_expert_shared_feed_forward_length(sizes["n_shared_ff"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        if config["moe_latent_size"] is not None:
            writer.add_moe_latent_size(config["moe_latent_size"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and those of experts."""
        n_latent = stored.value("moe_latent_size", None)
        return (
            super().source_config(stored)
            | source_expert_counts(stored, "n_routed_experts")
            | {
                "moe_shared_expert_intermediate_size": stored.count("expert_shared_feed_forward_length"),
                "n_shared_experts": stored.count("expert_shared_count", 1),
                "norm_topk_prob": stored.value("expert_weights_norm", False),
                "routed_scaling_factor": stored.number("expert_weights_scale", 1.0),
                "n_group": stored.count("expert_group_count", 1),
                "topk_group": stored.count("expert_group_used_count", 1),
                "moe_latent_size": None if n_latent is None else stored.count("moe_latent_size"),
            }
        )


def _latent(config: Config) -> tuple[LayerModule, ...]:
    """The ways to the narrower space of experts and back; none where they work in the model's own."""
    return () if config["moe_latent_size"] is None else _LATENT


def _kinds(config: Config) -> list[str]:
    """Kinds of the layers by transformers' names, from a list or a text with a letter for each layer."""
    found = config.get("layers_block_type") or config.get("layer_types") or config.get("hybrid_override_pattern")
    if isinstance(found, str):
        return [_BY_LETTER.get(letter, letter) for letter in found]
    if not isinstance(found, list):
        raise ArchitectureError(
            f"hybrid_override_pattern in config.json is {found!r}; expected a letter for each layer"
        )
    return [_RENAMED.get(str(kind), str(kind)) for kind in found]

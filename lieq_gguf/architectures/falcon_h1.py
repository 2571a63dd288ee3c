"""Falcon-H1: attention and Mamba-2 side by side in every layer, with factors that the file has in its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, require_number
from lieq_gguf.architectures.mamba2 import Mamba2, mamba_modules
from lieq_gguf.architectures.modules import ATTENTION, NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import TensorSpec

_MAMBA = mamba_modules("mamba")
_FEED_FORWARD = (
    LayerModule("ffn_norm", "pre_ff_layernorm", ("width",), suffixes=("", ".weight")),
    LayerModule("ffn_gate", "feed_forward.gate_proj", ("n_ff", "width"), bias="mlp_bias"),
    LayerModule("ffn_up", "feed_forward.up_proj", ("n_ff", "width"), bias="mlp_bias"),
    LayerModule("ffn_down", "feed_forward.down_proj", ("width", "n_ff"), bias="mlp_bias"),
)
_FACTORS = (
    "attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier",
    "lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip
_LISTS_OF_FACTORS = {"mlp_multipliers": 2, "ssm_multipliers": 5}


class FalconH1(Mamba2):
    """llama.cpp's graph has no factors: what comes out of a matrix is multiplied by multiplying its rows."""

    gguf_name = "falcon-h1"
    model_type = "falcon_h1"
    source_classes = ("FalconH1ForCausalLM",)
    modules = (NORMS[0], *ATTENTION, *_MAMBA, *_FEED_FORWARD)
    final_norm = ("output_norm", "final_layernorm")
    projection_biases = ("mamba_proj_bias", "projectors_bias")
    folded_settings: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(_FACTORS, 1.0), **{key: [1.0] * n for key, n in _LISTS_OF_FACTORS.items()}
    }  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {
        **folded_settings, "hidden_size": 4096, "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4,
        "mamba_d_ssm": 1024, "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128,
        "mamba_norm_before_gate": True, "mamba_rms_norm": False, "max_position_embeddings": 8192,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "vocab_size": 128_000,
    }  # fmt: skip

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the widths of all heads, and without factors that are null."""
        given = {key: value for key, value in config.items() if value is not None or key not in self.folded_settings}
        result = {**self.defaults, **given}
        if result["mamba_d_ssm"] is None:
            result["mamba_d_ssm"] = result["mamba_expand"] * result["hidden_size"]
        if result.get("mamba_d_head", "auto") == "auto":
            result["mamba_d_head"] = result["mamba_d_ssm"] // result["mamba_n_heads"]
        return result | {"head_dim": self.head_dim(result)}

    def check(self, config: Config) -> None:
        """Refuse also a norm before the gate, and factors that are no numbers."""
        super().check(config)
        for key in _FACTORS:
            require_number(key, config[key])
        for key, n_factors in _LISTS_OF_FACTORS.items():
            if not isinstance(config[key], list) or len(config[key]) != n_factors:
                raise ArchitectureError(f"{key} in config.json is {config[key]!r}; expected {n_factors} numbers")
            for factor in config[key]:
                require_number(key, factor)
        if config["mamba_rms_norm"] and config["mamba_norm_before_gate"]:
            raise ArchitectureError(
                f"mamba_norm_before_gate is set, but llama.cpp runs {self.gguf_name} with the norm behind the gate"
            )
        sizes = self.sizes(config)
        if sizes["ssm_width"] != config["mamba_d_ssm"]:
            raise ArchitectureError(
                f"mamba_d_ssm is {config['mamba_d_ssm']}; expected {sizes['n_ssm_heads']} heads of width "
                f"{sizes['ssm_head_dim']}"
            )

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:  # noqa: ARG002
        """All modules, but for a norm that not all models have."""
        return tuple(m for m in self.modules if config["mamba_rms_norm"] or m.role != "ssm_norm")

    def tensors(self, config: Config, source_names: frozenset[str]) -> tuple[TensorSpec, ...]:
        """All tensors in file order."""
        tensors = super().tensors(config, source_names)
        is_tied = not any(tensor.name == "output.weight" for tensor in tensors)
        if is_tied and config["embedding_multiplier"] != config["lm_head_multiplier"]:
            raise ArchitectureError(
                "embedding and output are one matrix, which llama.cpp can multiply only by one factor, but "
                f"embedding_multiplier is {config['embedding_multiplier']:g} and lm_head_multiplier "
                f"{config['lm_head_multiplier']:g}; expected an output matrix of its own"
            )
        return tensors

    def factors(self, config: Config, name: str) -> Sequence[tuple[slice, float]]:
        """The factors of a tensor's input and output, in the converter's order."""
        gate, down = config["mlp_multipliers"]
        before_attention = config["attention_in_multiplier"]
        factors = {
            "model.embed_tokens": (config["embedding_multiplier"],),
            "lm_head": (config["lm_head_multiplier"],),
            "feed_forward.gate_proj": (gate,),
            "feed_forward.down_proj": (down,),
            "self_attn.q_proj": (before_attention,),
            "self_attn.k_proj": (config["key_multiplier"], before_attention),
            "self_attn.v_proj": (before_attention,),
            "self_attn.o_proj": (config["attention_out_multiplier"],),
            "mamba.in_proj": (config["ssm_in_multiplier"],),
            "mamba.out_proj": (config["ssm_out_multiplier"],),
        }
        module = name.removesuffix(".weight")
        found = next((found for end, found in factors.items() if module.endswith(end)), ())
        result = [(slice(None), factor) for factor in found]
        if module.endswith("mamba.in_proj"):
            sizes = self.sizes(config)
            state_width = (sizes["n_channels"] - sizes["ssm_width"]) // 2
            widths = (sizes["ssm_width"], sizes["ssm_width"], state_width, state_width, sizes["n_ssm_heads"])
            ends = accumulate(widths)
            result += [
                (slice(end - width, end), factor)
                for end, width, factor in zip(ends, widths, config["ssm_multipliers"], strict=True)
            ]
        return result

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and the size of the vocabulary."""
        super().add_hyper_parameters(config, writer)
        writer.add_vocab_size(config["vocab_size"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys; factors are in the weights."""
        return super().source_config(stored) | {
            "mamba_d_ssm": stored.count("ssm.inner_size"),
            "mamba_rms_norm": "blk.0.ssm_norm.weight" in stored.shapes,
            "mamba_norm_before_gate": False,
            **self.folded_settings,
        }

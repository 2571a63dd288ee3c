"""Gemma 4: windows in most layers, wider heads in the others, and a second table of tokens for every layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import gguf

from lieq_gguf.architectures.checks import Config, config_object, require_count, require_kinds, require_number
from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.modules import FEED_FORWARD, HEAD_NORMS, SANDWICH_NORMS, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import TensorSpec

if TYPE_CHECKING:
    import torch

_QUERIES = (LayerModule("attn_q", "self_attn.q_proj", ("q_width", "width"), bias="attention_bias"), HEAD_NORMS[0])
_KEYS = (LayerModule("attn_k", "self_attn.k_proj", ("kv_width", "width"), bias="attention_bias"), HEAD_NORMS[1])
_VALUES = (LayerModule("attn_v", "self_attn.v_proj", ("kv_width", "width"), bias="attention_bias"),)
_OUTPUT = (LayerModule("attn_output", "self_attn.o_proj", ("width", "q_width"), bias="attention_bias"),)
_TOKEN_INPUTS = (
    LayerModule("inp_gate", "per_layer_input_gate", ("n_token_inputs", "width")),
    LayerModule("proj", "per_layer_projection", ("width", "n_token_inputs")),
    LayerModule("post_norm", "post_per_layer_input_norm", ("width",)),
)
_SCALE = (LayerModule("layer_output_scale", "layer_scalar", ("one",), suffixes=(".weight", "")),)
_KINDS = ("sliding_attention", "full_attention")
_PERIOD = 6
_UNROTATED = 1e30  # a frequency divided by it rotates nothing


class Gemma4(Decoder):
    """E2B, E4B and the dense models.

    The last layers have no keys and values of their own: they use those of the last layer of their kind that has.
    """

    gguf_name = "gemma4"
    has_windows = True
    model_type = "gemma4_text"
    source_classes: ClassVar[tuple[str, ...]] = ("Gemma4ForCausalLM",)
    modules: ClassVar[tuple[LayerModule, ...]] = (
        *SANDWICH_NORMS, *_QUERIES, *_KEYS, *_VALUES, *_OUTPUT, *FEED_FORWARD, *_TOKEN_INPUTS, *_SCALE,
    )  # fmt: skip
    activation = "gelu_pytorch_tanh"
    rope_types = ("proportional",)
    default_theta = 1_000_000.0
    tied_by_default = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "attention_k_eq_v": False, "enable_moe_block": False, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_size": 2304, "hidden_size_per_layer_input": 256, "intermediate_size": 9216,
        "max_position_embeddings": 131072, "num_attention_heads": 8, "num_hidden_layers": 30,
        "num_key_value_heads": 4, "num_kv_shared_layers": 0, "rms_norm_eps": 1e-6, "sliding_window": 512,
        "use_double_wide_mlp": False, "vocab_size": 262_144, "vocab_size_per_layer_input": 262_144,
    }  # fmt: skip

    def has_model(self, config: Config) -> bool:
        """Whether there are no experts."""
        return not config.get("enable_moe_block")

    def has_file(self, keys: Collection[str]) -> bool:
        """Whether the file tells of no experts."""
        return "expert_count" not in keys

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the kinds of layers, and with the heads of layers without a window by one name."""
        result = super().completed(config)
        n_layers = int(result["num_hidden_layers"])
        given = list(result.get("layer_types") or [_KINDS[(i + 1) % _PERIOD == 0] for i in range(n_layers)])
        result["layer_types"] = [*given[:-1], _KINDS[1]]
        if not result.get("rope_parameters"):
            result["rope_parameters"] = {
                _KINDS[0]: {"rope_type": "default", "rope_theta": 10_000.0},
                _KINDS[1]: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
            }
        by_layer = config_object(config, "per_layer_config")
        for layer, settings in by_layer.items():
            renamed = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
            for key, value in settings.items():
                is_known = key in renamed and result["layer_types"][int(layer)] == _KINDS[1]
                if not is_known or config.get(renamed[key], value) != value:
                    raise ArchitectureError(
                        f"per_layer_config in config.json gives layer {layer} another {key}; expected that of all "
                        "layers without a window"
                    )
                result[renamed[key]] = value
        if not by_layer:
            result.setdefault("global_head_dim", 512)
            if not result["attention_k_eq_v"]:  # transformers looks at it only then
                result["num_global_key_value_heads"] = None
        return result

    def check(self, config: Config) -> None:
        """Refuse also rotations and orders of layers that the graph does not compute."""
        super().check(config)
        require_count("global_head_dim", config["global_head_dim"])
        if config.get("final_logit_softcapping") is not None:
            require_number("final_logit_softcapping", config["final_logit_softcapping"])
        if config.get("use_bidirectional_attention") == "all":
            raise ArchitectureError("use_bidirectional_attention is set; expected a model that generates text")
        require_kinds(config, _KINDS)
        n_shared = config["num_kv_shared_layers"]
        require_count("num_kv_shared_layers", n_shared, least=0)
        of_their_own = config["layer_types"][: config["num_hidden_layers"] - n_shared]
        missing = [kind for kind in config["layer_types"][len(of_their_own) :] if kind not in of_their_own]
        if missing:
            raise ArchitectureError(
                f"the last {n_shared} layers share keys and values, but no earlier layer has {missing[0]}"
            )
        if config["hidden_size_per_layer_input"] and config["vocab_size_per_layer_input"] != config["vocab_size"]:
            raise ArchitectureError(
                f"vocab_size_per_layer_input is {config['vocab_size_per_layer_input']}, but llama.cpp runs Gemma 4 "
                f"only with that of vocab_size, {config['vocab_size']}"
            )
        local = self.rope(config, _KINDS[0])
        if local["rope_type"] != "default" or local.get("partial_rotary_factor", 1.0) != 1.0:
            raise ArchitectureError(
                f"layers with a window have rope type '{local['rope_type']}', but llama.cpp runs them only with "
                "'default' and rotates whole heads"
            )
        if self.rope(config).get("factor", 1.0) != 1.0:
            raise ArchitectureError("the proportional rotation has a factor, which llama.cpp does not compute")

    def has_rotation_by_kind(self, config: Config) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def local_theta(self, config: Config) -> float:  # noqa: ARG002
        """That of layers with a window."""
        return 10_000.0

    def sizes(self, config: Config) -> dict[str, int]:
        """The common sizes, and those of what tokens give to every layer."""
        sizes = super().sizes(config)
        n_token_inputs = int(config["hidden_size_per_layer_input"] or 0)
        n_all = n_token_inputs * int(config["num_hidden_layers"])
        return sizes | {"n_token_inputs": n_token_inputs, "n_all_token_inputs": n_all, "one": 1}

    def layer_sizes(self, config: Config, layer: int, sizes: dict[str, int]) -> dict[str, int]:
        """Heads are wider without a window, and the feed-forward network where keys and values are shared."""
        result = dict(sizes)
        if config["layer_types"][layer] == _KINDS[1]:
            head_dim = int(config["global_head_dim"])
            n_kv_heads = int(config.get("num_global_key_value_heads") or sizes["n_kv_heads"])
            widths = {"q_width": sizes["n_heads"] * head_dim, "kv_width": n_kv_heads * head_dim}
            result |= {"head_dim": head_dim, "n_kv_heads": n_kv_heads, **widths}
        if config["use_double_wide_mlp"] and self._shares_keys(config, layer):
            result["n_ff"] *= 2
        return result

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:
        """Without keys where they are shared, without values where they are the keys."""
        keys: tuple[LayerModule, ...] = ()
        if not self._shares_keys(config, layer):
            has_values = not (config["attention_k_eq_v"] and config["layer_types"][layer] == _KINDS[1])
            keys = (*_KEYS, *(_VALUES if has_values else ()))
        attention = (SANDWICH_NORMS[0], *_QUERIES, *keys, *_OUTPUT, *SANDWICH_NORMS[1:3])
        of_tokens = _TOKEN_INPUTS if config["hidden_size_per_layer_input"] else ()
        return (*attention, *FEED_FORWARD, SANDWICH_NORMS[3], *of_tokens, *_SCALE)

    def never_read(self, config: Config) -> frozenset[str]:
        """Keys and values of layers that use those of earlier ones; published weights have them."""
        sharing = (layer for layer in range(config["num_hidden_layers"]) if self._shares_keys(config, layer))
        roles = [module.role for module in (*_KEYS, *_VALUES)]
        return frozenset(f"blk.{layer}.{role}.weight" for layer in sharing for role in roles)

    def outer_tensors(self, config: Config) -> Iterator[TensorSpec]:
        """The second table of tokens, and how the embedding is projected beside it."""
        sizes = self.sizes(config)
        n_inputs, n_all = sizes["n_token_inputs"], sizes["n_all_token_inputs"]
        if n_inputs:
            table, projection = "per_layer_token_embd.weight", "per_layer_model_proj.weight"
            yield TensorSpec(table, "model.embed_tokens_per_layer.weight", (sizes["n_vocab"], n_all))
            shape, source = (n_all, sizes["width"]), "model.per_layer_model_projection.weight"
            yield TensorSpec(projection, source, shape, is_fixed=True, fixed_type="F16")
            yield TensorSpec("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight", (n_inputs,))

    def computed_lengths(self, config: Config) -> dict[str, int]:
        """``rope_freqs.weight`` for layers without a window, where only some dimensions are rotated."""
        return {"rope_freqs.weight": int(config["global_head_dim"]) // 2}

    def computed_tensor(self, config: Config, name: str) -> torch.Tensor:  # noqa: ARG002
        """Divisors of frequencies ``[global_head_dim / 2]``.

        Source: ``rope_type: proportional`` in transformers' ``modeling_rope_utils``.
        """
        import torch

        n_pairs = int(config["global_head_dim"]) // 2
        n_rotated = int(self.rope(config).get("partial_rotary_factor", 1.0) * n_pairs)
        return torch.tensor([1.0] * n_rotated + [_UNROTATED] * (n_pairs - n_rotated))

    def kv_heads(self, config: Config) -> int | list[int]:
        """By layer, if layers without a window have other numbers."""
        of_all = config.get("num_global_key_value_heads")
        n_kv_heads = self.sizes(config)["n_kv_heads"]
        if of_all is None:
            return n_kv_heads
        return [int(of_all) if kind == _KINDS[1] else n_kv_heads for kind in config["layer_types"]]

    def feed_forward_lengths(self, config: Config) -> int | list[int]:
        """By layer, if some are twice as wide."""
        n_ff = self.sizes(config)["n_ff"]
        if not config["use_double_wide_mlp"]:
            return n_ff
        n_layers = config["num_hidden_layers"]
        return [n_ff * (1 + self._shares_keys(config, layer)) for layer in range(n_layers)]

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """The common keys, and which layers have windows, shared keys and inputs of tokens."""
        super().add_hyper_parameters(config, writer)
        writer.add_shared_kv_layers(config["num_kv_shared_layers"])
        writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"] or 0)
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == _KINDS[0] for kind in config["layer_types"]])
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_key_length(config["global_head_dim"])
        writer.add_value_length(config["global_head_dim"])
        writer.add_key_length_swa(config["head_dim"])
        writer.add_value_length_swa(config["head_dim"])

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Both rotations."""
        writer.add_rope_freq_base(self.rope(config)["rope_theta"])
        writer.add_rope_freq_base_swa(self.rope(config, _KINDS[0])["rope_theta"])
        writer.add_rope_dimension_count(config["global_head_dim"])
        writer.add_rope_dimension_count_swa(config["head_dim"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """The common keys, and which layers have windows, shared keys and inputs of tokens."""
        config = super().source_config(stored)
        n_layers, n_shared = config["num_hidden_layers"], stored.value("attention.shared_kv_layers", 0)
        head_dim = stored.count("attention.key_length_swa")
        if stored.count("attention.value_length_swa") != head_dim:
            raise ArchitectureError("keys and values differ in width")
        has_window = stored.per_layer("attention.sliding_window_pattern")
        kinds = [_KINDS[0] if window else _KINDS[1] for window in has_window]
        counts, lengths = (
            value if isinstance(value, list) else [value] * n_layers
            for value in (stored.per_layer("attention.head_count_kv"), stored.per_layer("feed_forward_length"))
        )
        is_wide = bool(n_shared) and lengths[-1] == 2 * lengths[0]
        with_values = {name for name in stored.shapes if name.endswith(".attn_v.weight")}
        full = kinds.index(_KINDS[1])
        n_kv_heads = counts[kinds.index(_KINDS[0])] if _KINDS[0] in kinds else counts[0]
        keys_are_values = f"blk.{full}.attn_v.weight" not in with_values
        config |= {
            "layer_types": kinds,
            "head_dim": head_dim,
            "num_key_value_heads": n_kv_heads,
            "intermediate_size": lengths[0],
            "num_kv_shared_layers": n_shared,
            "use_double_wide_mlp": is_wide,
            "attention_k_eq_v": keys_are_values,
            "enable_moe_block": False,
            "sliding_window": stored.count("attention.sliding_window"),
            "final_logit_softcapping": stored.value("final_logit_softcapping", None),
            "hidden_size_per_layer_input": stored.value("embedding_length_per_layer_input", 0),
            "vocab_size_per_layer_input": config["vocab_size"],
            "global_head_dim": stored.count("attention.key_length"),
            "num_global_key_value_heads": counts[full] if keys_are_values else None,
        }
        return config

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """Both rotations."""
        local = stored.count("attention.key_length_swa")
        dims = (stored.count("rope.dimension_count", head_dim), stored.count("rope.dimension_count_swa", local))
        if dims != (head_dim, local):
            raise ArchitectureError("the rotation covers only some dimensions of each head")
        divisors = stored.vector("rope_freqs.weight")
        n_rotated = sum(divisor == 1.0 for divisor in divisors)
        if divisors[:n_rotated] != [1.0] * n_rotated or any(
            divisor < _UNROTATED / 2 for divisor in divisors[n_rotated:]
        ):
            raise ArchitectureError("rope_freqs.weight is not that of a proportional rotation")
        return {
            _KINDS[0]: {"rope_type": "default", "rope_theta": stored.number("rope.freq_base_swa", 10_000.0)},
            _KINDS[1]: {
                "rope_type": "proportional",
                "rope_theta": stored.number("rope.freq_base"),
                "partial_rotary_factor": n_rotated / len(divisors),
            },
        }

    @staticmethod
    def _shares_keys(config: Config, layer: int) -> bool:
        return bool(layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"])

"""What the families have in common: RMS norms, rotary attention, a gated feed-forward network.

A family is a ``Decoder`` that states where it differs. llama.cpp has a hand-written graph for each family, so this room
refuses what a graph cannot express: it would run and give other numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gguf

from lieq_gguf.architectures.checks import Config, check_yarn, config_object, require_count, require_number
from lieq_gguf.architectures.modules import GatesAndUps, LayerModule
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError
from lieq_gguf.records.spec import HeadOrder, TensorSpec, rotary_order

if TYPE_CHECKING:
    import torch


MTP_KEPT = "mtp_heads_kept"
"""Key that a configuration has here for the number of heads for multi-token prediction that the file keeps."""
_WITH_WINDOW_SWITCH = ("qwen2", "qwen3", "qwen3_moe", "smollm3")  # families with use_sliding_window, off by default


class Decoder:
    """A family of models.

    Attributes:
        gguf_name: llama.cpp's name of the architecture.
        model_type: transformers' name of it.
        source_classes: Names in ``architectures`` of ``config.json`` that belong to the family.
        modules: Modules of every layer; of layers of different kinds, all modules that one can have.
        final_norm: Names of the norm after the last layer, in the file and in transformers' model.
        norm_epsilon: Key of ``config.json`` with the number that norms add to the mean square.
        activation: The only activation that llama.cpp's graph computes.
        rope_types: Rotary scalings that the graph computes.
        default_theta: Rotary base, if ``config.json`` has none.
        default_head_dim: Width of a head, if ``config.json`` has none; None for the model's width over its heads.
        tied_by_default: Whether the embedding is also the output matrix, if ``config.json`` does not say.
        norm_offset: Added to the weights of norms, since the graph multiplies by the weight alone.
        has_windows: Whether the graph supports layers that look back only some tokens.
        biases: Keys of ``config.json`` that switch on biases which the graph adds.
        has_network: Whether there is a feed-forward network besides experts.
        defaults: What transformers' configuration has where ``config.json`` has nothing.
        header_parameters: Names in the source's layers of single numbers that the file keeps in its header. A
            configuration has them by these names, one number for each layer.
        folded_settings: Settings of transformers' configuration that the graph has no place for, and their values once
            :meth:`factors` are in the weights.
        keeps_mtp: Whether the file can have the model's head for multi-token prediction.
        output_matrix: Which output matrix the graph takes: always the ``embedding``, always its ``own``, or ``either``.
        gates_and_ups: Rows of gates and ups of experts where transformers stacks them: two halves, or in turn in
            matrices that are transposed, or halves that stay ``together`` in the file.
    """

    gguf_name: ClassVar[str]
    model_type: ClassVar[str]
    source_classes: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[LayerModule, ...]]
    final_norm: ClassVar[tuple[str, str]] = ("output_norm", "norm")
    norm_epsilon: ClassVar[str] = "rms_norm_eps"
    activation: ClassVar[str] = "silu"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    default_theta: ClassVar[float] = 10000.0
    default_head_dim: ClassVar[int | None] = None
    tied_by_default: ClassVar[bool] = False
    norm_offset: ClassVar[float] = 0.0
    has_windows: ClassVar[bool] = False
    biases: ClassVar[tuple[str, ...]] = ()
    has_network: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {}
    header_parameters: ClassVar[tuple[str, ...]] = ()
    folded_settings: ClassVar[Mapping[str, Any]] = {}
    keeps_mtp: ClassVar[bool] = False
    output_matrix: ClassVar[Literal["embedding", "own", "either"]] = "either"
    gates_and_ups: ClassVar[GatesAndUps] = "halves"

    def has_model(self, config: Config) -> bool:  # noqa: ARG002
        """Whether a model of one of ``source_classes`` belongs to the family; ``config`` is as it was read."""
        return True

    def has_file(self, keys: Collection[str]) -> bool:  # noqa: ARG002
        """Whether a file of the architecture belongs to the family, by its keys without the architecture."""
        return True

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with what it leaves out and this family needs."""
        return {**self.defaults, **config}

    def check(self, config: Config) -> None:
        """Raise ArchitectureError for what llama.cpp's graph cannot express, and KeyError for a missing key."""
        for key in ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size",
                    *(("intermediate_size",) if self.has_network else ())):  # fmt: skip
            require_count(key, config[key])
        for key in ("num_key_value_heads", "head_dim", "sliding_window"):
            if config.get(key) is not None:
                require_count(key, config[key])
        require_number(self.norm_epsilon, config[self.norm_epsilon])
        if not isinstance(config.get("layer_types") or [], list):
            raise ArchitectureError(f"layer_types in config.json is {config['layer_types']!r}; expected a list")
        self.check_activation(config)
        self.check_biases(config)
        self.check_rope(self.rope(config))

    def caveats(self, config: Config) -> tuple[str, ...]:
        """Where llama.cpp computes differently, but the model is still usable."""
        caveats = []
        window = config.get("sliding_window")
        is_used = config.get("use_sliding_window", self.model_type not in _WITH_WINDOW_SWITCH)
        if not self.has_windows and is_used and window is not None and window < config["max_position_embeddings"]:
            caveats.append(
                f"layers of this model look back at most {window} tokens, but llama.cpp runs {self.gguf_name} without "
                "such a window: in longer contexts the results will differ"
            )
        unused, theta = config_object(config, "rope_parameters").get("rope_theta"), self.rope(config)["rope_theta"]
        if config_object(config, "rope_scaling") and unused not in (None, theta):
            caveats.append(
                f"config.json has rope_scaling, which takes the place of all rope_parameters: as in transformers, the "
                f"rotary base is {theta:g}, not the {unused:g} given there; move the scaling into rope_parameters if "
                "that is not meant"
            )
        return tuple(caveats)

    def check_activation(self, config: Config) -> None:
        """Refuse an activation other than the graph's."""
        key = next((k for k in ("hidden_activation", "hidden_act") if config.get(k) is not None), None)
        if key is not None and config[key] != self.activation:
            raise ArchitectureError(
                f"{key} is '{config[key]}', but llama.cpp runs {self.gguf_name} models only with '{self.activation}'"
            )

    def check_biases(self, config: Config) -> None:
        """Refuse biases that the graph does not add."""
        for key in dict.fromkeys(m.bias for m in self.modules if m.bias not in ("", "always")):
            if config.get(key) and key not in self.biases:
                raise ArchitectureError(
                    f"{key} is set, but llama.cpp runs {self.gguf_name} models without these biases"
                )

    def check_rope(self, rope: Config) -> None:
        """Refuse rotary parameters that the graph does not support."""
        require_number("rope_theta", rope["rope_theta"])
        kind = rope["rope_type"]
        if kind not in self.rope_types:
            raise ArchitectureError(
                f"rope type '{kind}' is not supported; expected one of {', '.join(self.rope_types)}"
            )
        if kind in ("linear", "llama3", "yarn") and not isinstance(rope.get("factor"), float | int):
            raise ArchitectureError(f"rope type '{kind}' has no factor in config.json; expected a number")
        if kind == "yarn":
            check_yarn(rope)

    def sizes(self, config: Config) -> dict[str, int]:
        """All sizes that occur in shapes, by name."""
        n_heads = int(config["num_attention_heads"])
        n_kv_heads = int(config.get("num_key_value_heads") or n_heads)
        head_dim = self.head_dim(config)
        return {
            "one": 1,
            "width": int(config["hidden_size"]),
            "n_ff": int(config["intermediate_size"]) if self.has_network else 0,
            "n_vocab": int(config["vocab_size"]),
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "q_width": n_heads * head_dim,
            "kv_width": n_kv_heads * head_dim,
        }

    def layer_modules(self, config: Config, layer: int) -> tuple[LayerModule, ...]:  # noqa: ARG002
        """The modules of one layer."""
        return self.modules

    def layer_sizes(self, config: Config, layer: int, sizes: dict[str, int]) -> dict[str, int]:  # noqa: ARG002
        """The sizes of one layer, from those of all."""
        return sizes

    def outer_tensors(self, config: Config) -> Iterator[TensorSpec]:  # noqa: ARG002
        """Tensors outside the layers, besides the usual ones."""
        return iter(())

    def never_read(self, config: Config) -> frozenset[str]:  # noqa: ARG002
        """Tensors that files of llama.cpp's converter can have, and that nothing reads."""
        return frozenset()

    def orders(self, config: Config) -> Mapping[str, HeadOrder]:
        """Orders of rows and columns in the file, by the names that modules have for them."""
        sizes = self.sizes(config)
        return {
            "rotated_queries": rotary_order(sizes["q_width"], sizes["n_heads"]),
            "rotated_keys": rotary_order(sizes["kv_width"], sizes["n_kv_heads"]),
        }

    def head_dim(self, config: Config) -> int:
        """Width of an attention head."""
        given = config.get("head_dim", self.default_head_dim)  # null is not missing: it is the width over the heads
        return int(given or config["hidden_size"] // config["num_attention_heads"])

    def rope(self, config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
        """Rotary parameters in one form, with type and base: those that transformers 5 makes of ``config.json``.

        It writes ``rope_parameters``, in some families one set for each kind of attention; files of version 4 have
        ``rope_scaling`` and ``rope_theta``. If a file has both, ``rope_scaling`` takes the place of the newer key.
        """
        stored, scaling = config_object(config, "rope_parameters"), config_object(config, "rope_scaling")
        theta = config.get("rope_theta") or self.usual_theta(config)
        if not self.has_rotation_by_kind(config):
            rope = dict(scaling or stored)
        elif layer_type == "full_attention":
            rope = {**config_object(stored, layer_type), **scaling}
        else:
            rope, theta = {**config_object(stored, layer_type)}, self.local_theta(config)
        rope["rope_type"] = str(rope.get("rope_type") or rope.get("type") or "default").lower()
        rope.setdefault("rope_theta", theta)
        return rope

    def has_rotation_by_kind(self, config: Config) -> bool:  # noqa: ARG002
        """Whether transformers has rotary parameters for each kind of attention."""
        return False

    def usual_theta(self, config: Config) -> float:  # noqa: ARG002
        """Rotary base, if ``config.json`` has none."""
        return self.default_theta

    def local_theta(self, config: Config) -> float:
        """Rotary base of layers with a window, if ``rope_parameters`` has none."""
        return self.usual_theta(config)

    def tensors(self, config: Config, source_names: frozenset[str]) -> tuple[TensorSpec, ...]:
        """All tensors in file order; ``source_names`` shows which optional ones exist."""
        return tuple(self._tensors(config, source_names))

    def _tensors(self, config: Config, source_names: frozenset[str]) -> Iterator[TensorSpec]:
        sizes = self.sizes(config)
        matrix = (sizes["n_vocab"], sizes["width"])
        yield TensorSpec("token_embd.weight", "model.embed_tokens.weight", matrix)
        for name, length in self.computed_lengths(config).items():
            yield TensorSpec(name, None, (length,))
        yield from self.outer_tensors(config)
        for layer in range(config["num_hidden_layers"]):
            of_layer = self.layer_sizes(config, layer, sizes)
            for module in self.layer_modules(config, layer):
                yield from self._module_tensors(config, source_names, of_layer, layer, module)
        name, source = self.final_norm
        yield TensorSpec(f"{name}.weight", f"model.{source}.weight", matrix[1:], offset=self.norm_offset)
        has_own = "lm_head.weight" in source_names or not config.get("tie_word_embeddings", self.tied_by_default)
        if has_own and self.output_matrix == "embedding":
            raise ArchitectureError(
                f"the model has an output matrix besides the embedding, but llama.cpp runs {self.gguf_name} models "
                "only with the embedding in its place"
            )
        if not has_own and self.output_matrix == "own":
            raise ArchitectureError(
                f"the model has no output matrix besides the embedding, but llama.cpp runs {self.gguf_name} models "
                "only with one"
            )
        if has_own:
            yield TensorSpec("output.weight", "lm_head.weight", matrix)
        if config.get(MTP_KEPT):
            yield from self.mtp_tensors(config)

    def mtp_tensors(self, config: Config) -> Iterator[TensorSpec]:
        """The tensors of the head for multi-token prediction."""
        raise NotImplementedError(f"{self.gguf_name} keeps none")

    def _module_tensors(
        self, config: Config, source_names: frozenset[str], sizes: Mapping[str, int], layer: int, module: LayerModule
    ) -> Iterator[TensorSpec]:
        source = f"model.layers.{layer}.{module.name}"
        shape = tuple(sizes[name] for name in module.shape)
        row_order, column_order = (self._order(config, name) for name in (module.rows, module.columns))
        of_expert = "{}" in module.name
        adds_one = module.role.endswith("norm") and not module.has_own_scale
        active_share = sizes["n_experts_used"] / sizes["n_experts"] if of_expert else 1.0
        yield TensorSpec(
            f"blk.{layer}.{module.role}{module.suffixes[0]}",
            f"{source}{module.suffixes[1]}",
            shape,
            layer,
            row_order=row_order,
            column_order=column_order,
            offset=self.norm_offset if adds_one else 0.0,
            is_negated_exp=module.is_negated_exp,
            stored_shape=tuple(sizes[name] for name in module.stored_shape) or None,
            is_fixed=module.is_fixed,
            active_share=active_share,
        )
        has_bias = module.bias == "always" or bool(module.bias and config.get(module.bias, False))
        if f"{source}.bias" in source_names or has_bias:
            if not has_bias:
                raise ArchitectureError(
                    f"the weights hold {source}.bias, but {module.bias or 'a bias'} in config.json is not set, so "
                    "transformers would ignore it and llama.cpp would not; remove it from the weights"
                    + (f", or set {module.bias}" if module.bias else "")
                )
            yield TensorSpec(
                f"blk.{layer}.{module.role}.bias",
                f"{source}.bias",
                shape[:-1],
                layer,
                row_order=row_order,
                is_fixed=of_expert,
                active_share=active_share,
            )

    def _order(self, config: Config, name: str) -> HeadOrder | None:
        order = self.orders(config)[name] if name else None
        return None if order is None or order.changes_nothing else order

    def factors(self, config: Config, name: str) -> Sequence[tuple[slice, float]]:  # noqa: ARG002
        """By what the rows of a tensor of the source are multiplied in the file, one factor after the other."""
        return ()

    def add_hyper_parameters(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the keys that llama.cpp needs to build the graph, as its converter does."""
        sizes = self.sizes(config)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(sizes["width"])
        if self.has_network:
            writer.add_feed_forward_length(self.feed_forward_lengths(config))
        writer.add_head_count(sizes["n_heads"])
        writer.add_head_count_kv(self.kv_heads(config))
        self.add_norm_epsilon(config, writer)
        if config.get("head_dim") is not None or self.default_head_dim is not None:
            writer.add_key_length(sizes["head_dim"])
            writer.add_value_length(sizes["head_dim"])
        self.add_rope(config, writer)

    def add_norm_epsilon(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the number that norms add to the mean square."""
        writer.add_layer_norm_rms_eps(config[self.norm_epsilon])

    def kv_heads(self, config: Config) -> int | list[int]:
        """Heads of keys and values as the file counts them, one number or one for each layer."""
        return self.sizes(config)["n_kv_heads"]

    def feed_forward_lengths(self, config: Config) -> int | list[int]:
        """Widths of the feed-forward network as the file has them, one number or one for each layer."""
        return self.sizes(config)["n_ff"]

    def add_rope(self, config: Config, writer: gguf.GGUFWriter) -> None:
        """Write the rotary keys."""
        rope = self.rope(config)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(
                rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            )
            if rope.get("beta_fast") is not None:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            if rope.get("beta_slow") is not None:
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])

    def source_config(self, stored: StoredParameters) -> dict[str, Any]:
        """``config.json`` made from the keys of :meth:`add_hyper_parameters`.

        Raises:
            ArchitectureError: if a key is missing or has a value that transformers' model does not support.
        """
        n_heads = stored.count("attention.head_count")
        n_vocab, width = stored.shapes["token_embd.weight"]
        head_dim = stored.count("attention.key_length", width // n_heads)
        if stored.count("attention.value_length", head_dim) != head_dim:
            raise ArchitectureError("keys and values differ in width")
        stored.count("vocab_size", n_vocab)  # not needed: the embedding has the size
        config = {
            "architectures": [self.source_classes[0]],
            "model_type": self.model_type,
            "vocab_size": n_vocab,
            "hidden_size": stored.count("embedding_length"),
            "num_hidden_layers": stored.count("block_count"),
            "num_attention_heads": n_heads,
            "num_key_value_heads": stored.most("attention.head_count_kv", n_heads),
            "head_dim": head_dim,
            "max_position_embeddings": stored.count("context_length"),
            self.norm_epsilon: self.source_epsilon(stored),
            "tie_word_embeddings": "output.weight" not in stored.shapes,
        }
        if self.has_network:
            config["intermediate_size"] = stored.most("feed_forward_length")
        else:
            stored.per_layer("feed_forward_length", None)  # nothing has this width
        for module in self.modules:
            if module.bias not in ("", "always"):
                config[module.bias] = any(name.endswith(f".{module.role}.bias") for name in stored.shapes)
        return config | {"rope_parameters": self.source_rope(stored, head_dim)}

    def source_epsilon(self, stored: StoredParameters) -> float:
        """The number of :meth:`add_norm_epsilon`."""
        return stored.number("attention.layer_norm_rms_epsilon")

    def source_rope(self, stored: StoredParameters, head_dim: int) -> dict[str, Any]:
        """Rotary parameters made from the keys of :meth:`add_rope`."""
        if stored.count("rope.dimension_count", head_dim) != head_dim:
            raise ArchitectureError("the rotation covers only some dimensions of each head")
        kind = stored.value("rope.scaling.type", "none")
        rope = {"rope_type": kind, "rope_theta": stored.number("rope.freq_base", 10000.0)}
        if kind == "none":
            return rope | {"rope_type": "default"}
        if kind not in ("linear", "yarn"):
            raise ArchitectureError(f"the rope scaling is of type '{kind}'")
        rope["factor"] = stored.number("rope.scaling.factor")
        if kind == "yarn":
            rope["original_max_position_embeddings"] = stored.count(
                "rope.scaling.original_context_length", stored.count("context_length")
            )
            betas = {key: stored.value(f"rope.scaling.yarn_{key}", None) for key in ("beta_fast", "beta_slow")}
            rope |= {key: value for key, value in betas.items() if value is not None}
        return rope

    def computed_lengths(self, config: Config) -> dict[str, int]:  # noqa: ARG002
        """Names of the vectors that the source does not hold, and their lengths."""
        return {}

    def computed_tensor(self, config: Config, name: str) -> torch.Tensor:
        """A vector that the source does not hold, in float32."""
        raise NotImplementedError(f"{self.gguf_name} has no {name}")

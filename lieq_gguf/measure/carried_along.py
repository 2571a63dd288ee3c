"""What layers need besides the hidden states before them: numbers of each token, keys and values of earlier layers.

Only Gemma 4 has it. It travels with the hidden states, as further numbers of every token. So a part of the tokens, or
the same tokens on another way through the layers, has what belongs to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from lieq_gguf.measure.base_model import sharing_modes


class CarriedAlong:
    """The layout of the further numbers: the token's row in ``TokenInputs``, then keys and values by kind of attention.

    Attributes:
        width: How many numbers there are.
        has_tokens: Whether tokens give something to every layer.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._n_token_inputs = int(getattr(config, "hidden_size_per_layer_input", None) or 0)
        self.has_tokens = self._n_token_inputs > 0
        self._modes = sharing_modes(config)
        self._types: list[str] = list(getattr(config, "layer_types", None) or [])
        self._heads: dict[str, tuple[int, int]] = {}
        if "reuse" in self._modes:
            for index, kind in enumerate(self._types):
                of_layer = config.per_layer_config[index]
                self._heads[kind] = (of_layer.num_key_value_heads, of_layer.head_dim)
        self.width = int(self.has_tokens) + sum(2 * n_heads * dim for n_heads, dim in self._heads.values())

    def start(self, tokens: torch.Tensor) -> torch.Tensor:
        """Before the first layer ``[n_chunks, chunk_size, width]``, from the rows of the tokens in ``TokenInputs``."""
        result = torch.zeros(*tokens.shape, self.width)
        if self.has_tokens:
            result[..., 0] = tokens
        return result

    def arguments(self, carried: torch.Tensor, device: torch.device, inputs: torch.Tensor | None) -> dict[str, Any]:
        """What a layer is called with, from what is carried and the layer's inputs ``[n_tokens, width]`` by token."""
        result: dict[str, Any] = {}
        if self.has_tokens:
            if inputs is None:  # nothing has been embedded where a layer is only timed
                of_tokens = carried.new_zeros(*carried.shape[:-1], self._n_token_inputs)
            else:
                of_tokens = inputs[carried[..., 0].long()]
            result["per_layer_input"] = of_tokens.to(device)
        if self._heads:
            result["shared_kv_states"] = {
                kind: tuple(self._split(part, kind).to(device) for part in pair)
                for kind, pair in self._parts(carried).items()
            }
        return result

    def after(self, index: int, carried: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """What is carried on after layer ``index``, which may have stored its keys and values in the arguments."""
        if not self._heads or self._modes[index] != "store":
            return carried
        result, kind = carried.clone(), self._types[index]
        for part, stored in zip(self._parts(result)[kind], arguments["shared_kv_states"][kind], strict=True):
            part.copy_(stored.transpose(1, 2).flatten(2))
        return result

    def _parts(self, carried: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Views of keys and values ``[n_chunks, chunk_size, n_heads · head_dim]``."""
        result, start = {}, int(self.has_tokens)
        for kind, (n_heads, dim) in self._heads.items():
            middle, stop = start + n_heads * dim, start + 2 * n_heads * dim
            result[kind] = (carried[..., start:middle], carried[..., middle:stop])
            start = stop
        return result

    def _split(self, part: torch.Tensor, kind: str) -> torch.Tensor:
        n_heads, dim = self._heads[kind]
        return part.reshape(*part.shape[:2], n_heads, dim).transpose(1, 2)


class TokenInputs:
    """What a token gives to every layer: part of its row in a second table, and of its embedding, projected.

    As in transformers' ``get_per_layer_inputs`` and ``project_per_layer_inputs``, but layer by layer.
    """

    def __init__(self, model: nn.Module, embedded: torch.Tensor, table: torch.Tensor, projection: torch.Tensor) -> None:
        """Take norm and scales from a model.

        Args:
            model: transformers' base model.
            embedded: The scaled embedding ``[n_tokens, d_model]``.
            table: Rows of the second table ``[n_tokens, n_layers · width]``.
            projection: The projection of the embedding ``[n_layers · width, d_model]``.
        """
        self.table = table
        self._model: Any = model
        self._embedded = embedded
        self._projection = projection

    def of_layer(self, index: int, table: torch.Tensor | None = None) -> torch.Tensor:
        """``[n_tokens, width]``, from the table or one in its place."""
        model = self._model
        width: int = model.hidden_size_per_layer_input
        part = slice(index * width, (index + 1) * width)
        device = self._embedded.device
        rows = (self.table if table is None else table)[:, part].to(device).float()
        rows = rows * model.embed_tokens_per_layer.embed_scale.to(device)
        context = self._embedded @ self._projection[part].to(device).float().T * model.per_layer_model_projection_scale
        result: torch.Tensor = (model.per_layer_projection_norm(context) + rows) * model.per_layer_input_scale
        return result

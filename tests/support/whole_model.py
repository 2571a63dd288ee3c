"""The plain way to everything that the streamed pass measures: whole models in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lieq_gguf.measure import layer_model
from lieq_gguf.measure.observers.projections import twin_seed
from lieq_gguf.measure.type_errors import probe_matrix
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.scorers import lieq
from lieq_gguf.sources.model_directory import ModelDirectory

PREFIX_ROWS, PREFIX_LENGTH = [0, 4], 128  # the sequences and heads that 256 tokens of five sequences are taken from
DAMAGE_ROWS, DAMAGE_LENGTH = [0, 4], 256
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class WholeModel:
    """transformers' model in one piece, and everything that passes through it."""

    def __init__(self, path: Path, ids: npt.NDArray[np.int64]) -> None:
        whole = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = whole.model
        self.inputs: dict[str, torch.Tensor] = {}
        self.projections: dict[str, torch.Tensor] = {}
        self.layers, self.rotary, self.n_layers = model.layers, model.rotary_emb, len(model.layers)
        last: list[torch.Tensor] = []
        for layer, module in enumerate(model.layers):
            for role, name in MODULES.items():
                module.get_submodule(name).register_forward_hook(self._hook(f"blk.{layer}.{role}.weight"))
        # the last of output_hidden_states has passed the final norm, which is no part of the layer
        model.layers[-1].register_forward_hook(lambda _module, _inputs, output: last.append(output))
        with torch.inference_mode():
            result = model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False)
        self.hidden = [*result.hidden_states[:-1], last[0]]
        self.inputs["token_embd.weight" if whole.config.tie_word_embeddings else "output.weight"] = result[0]

    def _hook(self, key: str) -> Callable[..., None]:
        def keep(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self.inputs[key] = inputs[0]
            self.projections[key] = output if module.bias is None else output - module.bias

        return keep

    def cosine(self, layer: int) -> float:
        before, after = self.hidden[layer].double(), self.hidden[layer + 1].double()
        return float(torch.cosine_similarity(before, after, dim=-1).mean())

    def input_sums(self) -> dict[str, npt.NDArray[np.float64]]:
        return {key: (x.double() ** 2).sum(dim=(0, 1)).numpy() for key, x in self.inputs.items()}

    def block_error(self, layer: int, role: str, importance: ImportanceMatrix) -> float:
        """Change of a layer's output on the first token heads, with one matrix at the probe type."""
        module, name = self.layers[layer], f"blk.{layer}.{role}.weight"
        before = self.hidden[layer][DAMAGE_ROWS, :DAMAGE_LENGTH]
        positions = torch.arange(before.shape[1])[None]
        linear = module.get_submodule(MODULES[role])
        exact = linear.weight.detach().clone()
        with torch.inference_mode():
            embeddings = self.rotary(before, positions)
            wanted = module(before, position_embeddings=embeddings)
            linear.weight.copy_(torch.from_numpy(probe_matrix(exact.numpy(), importance.mean(name)).decoded))
            found = module(before, position_embeddings=embeddings)
            linear.weight.copy_(exact)
        change = (found - wanted).double().square().sum(-1) / wanted.double().square().sum(-1)
        return float(change.mean())

    def spectrum(self, key: str) -> npt.NDArray[np.float64]:
        head = self.projections[key][PREFIX_ROWS, :PREFIX_LENGTH].double()
        energies = torch.linalg.svdvals(head.reshape(-1, head.shape[-1])) ** 2
        return np.asarray((energies / energies.sum()).numpy())


class OuterReference:
    """What quantising embedding, output and decoder with the probe does, in whole models.

    Attributes:
        embedding_error: Relative change of the first layer's output with the embedding quantised.
        output_kld: Divergence of the logits with the output matrix quantised.
        decoder_kld: The same with all matrices of the layers quantised.
    """

    def __init__(self, path: Path, ids: npt.NDArray[np.int64], importance: ImportanceMatrix) -> None:
        ids = ids[DAMAGE_ROWS, :DAMAGE_LENGTH]
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # apart from the embedding
        wanted, first = self._run(model, ids)
        output = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
        self.output_kld = self._kld(wanted, self._with(model, {"lm_head": importance.mean(output)}, ids)[0])
        found = self._with(model, {"model.embed_tokens": None}, ids)[1]
        change = (found - first).double().square().sum(-1) / first.double().square().sum(-1)
        self.embedding_error = float(change.mean())
        means = {
            f"model.layers.{layer}.{name}": importance.mean(f"blk.{layer}.{role}.weight")
            for layer in range(len(model.model.layers))
            for role, name in MODULES.items()
        }
        self.decoder_kld = self._kld(wanted, self._with(model, means, ids)[0])

    def _with(
        self, model: LlamaForCausalLM, modules: dict[str, npt.NDArray[np.float32] | None], ids: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = {name: model.get_parameter(f"{name}.weight") for name in modules}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, mean in modules.items():
                weights[name].copy_(torch.from_numpy(probe_matrix(kept[name].numpy(), mean).decoded))
        result = self._run(model, ids)
        with torch.no_grad():
            for name, weight in kept.items():
                weights[name].copy_(weight)
        return result

    @staticmethod
    def _run(model: LlamaForCausalLM, ids: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            result = model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False)
        return result.logits[:, ::2], result.hidden_states[1]

    @staticmethod
    def _kld(wanted: torch.Tensor, found: torch.Tensor) -> float:
        p, q = (torch.log_softmax(z.double(), dim=-1) for z in (wanted, found))
        return float((p.exp() * (p - q)).sum(-1).mean())


def whole_twin(path: Path, n_layers: int, ids: npt.NDArray[np.int64], seed: int) -> dict[str, torch.Tensor]:
    """Projections of an untrained model of all layers at once, by tensor name."""
    config = ModelDirectory(path).transformers_config()
    hidden = layer_model.LayerModel(config, torch.device("cpu")).embed_untrained(ids, seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(path)).model
    for layer, module in enumerate(model.layers):
        twin = layer_model.LayerModel(config, torch.device("cpu"))
        twin.initialise(twin_seed(seed, layer), layer)
        module.load_state_dict(twin.layer.state_dict())
    projections: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: projections.update({key: output.reshape(-1, output.shape[-1])})

    for layer in range(n_layers):
        for role, name in MODULES.items():
            model.layers[layer].get_submodule(name).register_forward_hook(keep(f"blk.{layer}.{role}.weight"))
    with torch.inference_mode():
        model(inputs_embeds=hidden, use_cache=False)
    return projections


def lieq_scores(path: Path, ids: npt.NDArray[np.int64], seed: int) -> tuple[float, ...]:
    """Compactness gain of every layer, on the heads of the first and the last of five sequences."""
    trained = WholeModel(path, ids)
    twin = whole_twin(path, trained.n_layers, ids[PREFIX_ROWS, :PREFIX_LENGTH], seed)
    torch.set_num_threads(1)  # more only wait for each other in matrices this small
    scores = []
    for layer in range(trained.n_layers):
        gains = []
        for role in MODULES:
            key = f"blk.{layer}.{role}.weight"
            energies = torch.linalg.svdvals(twin[key].double()) ** 2
            untrained = lieq.compactness((energies / energies.sum()).numpy())
            gains.append((untrained - lieq.compactness(trained.spectrum(key))) / untrained)
        scores.append(float(np.mean(gains)))
    return tuple(scores)

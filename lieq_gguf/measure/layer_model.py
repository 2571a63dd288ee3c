"""One decoder layer at a time: transformers' own arithmetic, weights loaded layer by layer, hooks to watch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import takewhile
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PretrainedConfig

from lieq_gguf.architectures import family_named
from lieq_gguf.errors import SourceError
from lieq_gguf.measure.base_model import given_to_layers, initialised, layer_kinds
from lieq_gguf.measure.carried_along import CarriedAlong, TokenInputs
from lieq_gguf.measure.experts import Experts
from lieq_gguf.measure.output_head import OutputHead
from lieq_gguf.measure.torch_setup import has_fast_bfloat16, torch_device
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.source import Source

_BATCH_TOKENS = 2048  # tokens in a batch; more do not fit the processor's caches


class Weights(Protocol):
    """What :meth:`LayerModel.load` needs of a source."""

    @property
    def spec(self) -> ModelSpec:
        """The tensors."""

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """A tensor as transformers has it."""

    def read_rows(self, tensor: TensorSpec, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a table of tokens."""

    def release(self) -> None:
        """Free memory used for reading."""


RowsOf: TypeAlias = Callable[[TensorSpec, Sequence[int]], torch.Tensor]
"""Rows ``[n_tokens, n_in]`` of a table of all tokens, by their ids."""

Recording: TypeAlias = dict[str, list[Any]]
"""Name of a module to its outputs, one per batch; in the order in which the modules finish."""


class LayerModel:
    """transformers' own model with one decoder layer: input and output are hidden states.

    Where layers need more than that, it is carried along behind the hidden states of every token (``CarriedAlong``).

    If layers differ in more than their weights (a sliding window, no rotation, no attention), there is one module for
    each kind, and they share the weights that they have in common. Until weights are loaded the layer has random ones.

    Where the file has the columns of a matrix in another order, they have that order here, as have the inputs that are
    watched: a block of a type is made of neighbours in the file.

    Attributes:
        index: Index of the layer whose weights are loaded.
        layer: Its module.
        modules: Quantised tensor of the layer to the names of the linear modules whose weights it holds: one module, or
            one for every expert.
        config: The configuration of the whole model.
        state_width: Numbers of a token between two layers: ``d_model``, and what is carried along.
        device: Where it runs.
        in_bfloat16: Whether its matrices are multiplied in bfloat16.
    """

    def __init__(self, config: PretrainedConfig, device: torch.device, *, in_bfloat16: bool = False) -> None:
        self.index = -1
        self.modules: Mapping[TensorSpec, tuple[str, ...]] = {}
        self.device = device
        self.in_bfloat16 = in_bfloat16
        kinds = layer_kinds(config)
        in_use = list(dict.fromkeys(kinds))
        self._slots = [in_use.index(kind) for kind in kinds]  # of every layer, the module of its kind
        self._model = initialised(config, n_vocab=1, seed=0).to(device).requires_grad_(False)
        self._model.get_input_embeddings().weight.fill_(1)  # type: ignore[operator]  # so embed sees the scale
        self._init_weights = self._model._init_weights
        self.config = config
        self._d_model: int = config.hidden_size
        self._carried = CarriedAlong(config)
        self.state_width: int = self._d_model + self._carried.width
        self._token_inputs: TokenInputs | None = None
        self._of_tokens: torch.Tensor | None = None  # what they give to the current layer
        self._layers: Sequence[nn.Module] = list(self._model.get_submodule("layers").children())
        for index, module in enumerate(self._layers):
            for other in self._layers[:index]:
                _share_weights(other, module)
        self.layer = self._layers[0]
        self._columns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._around: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._rounded_weights: dict[str, nn.Parameter] = {}  # of the current weights
        self._forgotten: list[tuple[torch.Tensor, torch.Size]] = []

    @classmethod
    def of(cls, source: Source, compute: ComputeOptions, config: PretrainedConfig | None = None) -> LayerModel:
        """The layers of a model as ``compute`` says, which also sets torch's number of threads.

        They are those of ``config`` if it is given, and otherwise of the source's own.

        Raises:
            CalibrationError: if the device is not available.
            SourceError: if transformers cannot make the model.
        """
        torch.set_num_threads(compute.n_threads)
        device = torch_device(compute.device)
        in_bfloat16 = not compute.in_float32 and has_fast_bfloat16(device)
        return cls(config or source.transformers_config(), device, in_bfloat16=in_bfloat16)

    def embed(self, source: Weights, ids: npt.NDArray[np.int64], rows_of: RowsOf | None = None) -> torch.Tensor:
        """States before the first layer ``[n_chunks, chunk_size, state_width]``.

        Args:
            source: The model.
            ids: Token ids ``[n_chunks, chunk_size]``.
            rows_of: Rows of its tables; None for those of the source.
        """
        rows_of = rows_of or source.read_rows
        outer = {t.name: t for t in source.spec.tensors if t.layer is None}
        used: list[int] = np.unique(ids).tolist()
        embedded = rows_of(source.spec.embedding, used).float() * self._scales()
        if "per_layer_token_embd.weight" in outer:
            norm = self._model.get_submodule("per_layer_projection_norm")
            norm.load_state_dict({"weight": source.read(outer["per_layer_proj_norm.weight"])})
            table = rows_of(outer["per_layer_token_embd.weight"], used)
            projection = source.read(outer["per_layer_model_proj.weight"])
            self._token_inputs = TokenInputs(self._model, embedded.to(self.device), table, projection.to(self.device))
        return self._states(ids, embedded)

    def embed_untrained(self, ids: npt.NDArray[np.int64], seed: int) -> torch.Tensor:
        """The same of an untrained twin, whose tables have only the tokens that occur; others would take memory.

        Layers of a kind share what a token gives to them.
        """
        fresh: Any = initialised(self.config, n_vocab=len(np.unique(ids)), seed=seed, narrow=True)
        fresh.requires_grad_(False)
        embedded = fresh.get_input_embeddings().weight.detach() * self._scales()
        if self._carried.has_tokens:
            fresh.layers = nn.ModuleList()  # only norm and scales are needed
            width: int = fresh.hidden_size_per_layer_input
            columns = torch.tensor([slot * width + i for slot in self._slots for i in range(width)])
            self._token_inputs = TokenInputs(
                fresh.to(self.device),
                embedded.to(self.device),
                fresh.embed_tokens_per_layer.weight.detach()[:, columns],
                fresh.per_layer_model_projection.weight.detach()[columns],
            )
        return self._states(ids, embedded)

    def _states(self, ids: npt.NDArray[np.int64], embedded: torch.Tensor) -> torch.Tensor:
        _, positions = np.unique(ids, return_inverse=True)
        tokens = torch.from_numpy(positions.reshape(ids.shape))
        return self._joined(embedded[tokens], self._carried.start(tokens))

    def _scales(self) -> torch.Tensor:
        """The factors ``[d_model]`` by which the model multiplies its embedding."""
        [(scales, _), *_] = given_to_layers(
            self._model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device)
        )
        return scales.cpu()[0, 0]

    def hidden_part(self, states: torch.Tensor) -> torch.Tensor:
        """The hidden states ``[…, d_model]``, without what is carried along."""
        return states[..., : self._d_model]

    def relative_change(self, intact: torch.Tensor, changed: torch.Tensor) -> float:
        """Mean over tokens of ``‖h' − h‖² / ‖h‖²``, for the hidden states in the states before and after a change."""
        before = self.hidden_part(intact).double()
        change = (self.hidden_part(changed).double() - before).square().sum(dim=-1)
        return float((change / before.square().sum(dim=-1)).mean())

    def with_hidden(self, states: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The same states with other hidden states."""
        return self._joined(hidden, states[..., self._d_model :])

    def _joined(self, hidden: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden, carried], dim=-1) if self._carried.width else hidden

    def initialise(self, seed: int, index: int) -> None:
        """Fill the layer with the model's own random initial weights, as layer ``index`` of an untrained twin."""
        self._prepare(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer.cpu().apply(self._init_weights)  # type: ignore[arg-type]  # on the CPU: the same on any device
        self.layer.to(self.device)

    def load(self, source: Weights, index: int) -> None:
        """Load a layer's weights, converted to float32."""
        self._prepare(index)
        weights: dict[str, torch.Tensor] = {}
        for tensor in (t for t in source.spec.tensors if t.layer == index):
            stored = source.read(tensor)
            weights |= zip(tensor.names_in_layer, stored if tensor.of_experts else (stored,), strict=True)
        weights |= self.header_parameters(source.spec, index)
        result = self.layer.load_state_dict(weights, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise SourceError(f"a layer's tensors do not match transformers' model: {result}")
        del weights
        source.release()
        self.modules = {
            tensor: tuple(name.rpartition(".")[0] for name in tensor.names_in_layer)
            for tensor in source.spec.layer_matrices[index]
        }
        self._columns = {
            module: (torch.from_numpy(tensor.column_order.in_source), torch.from_numpy(tensor.column_order.in_file))
            for module, tensor in self.tensors.items()
            if tensor.column_order is not None
        }

    def forget(self) -> None:
        """Free the memory of the matrices; the layer has none until new ones are loaded or initialised."""
        self.forget_rounded()
        linear = [module for module in self.layer.modules() if isinstance(module, nn.Linear)]
        self._forgotten = self._forgotten or [(module.weight, module.weight.shape) for module in linear]
        with torch.inference_mode(mode=False):  # a parameter cannot hold inference tensors
            for parameter, _ in self._forgotten:
                parameter.data = torch.empty(0, device=self.device)

    def forget_rounded(self) -> None:
        """Free the memory of the bfloat16 matrices; they are rounded again when needed."""
        self._rounded_weights.clear()

    def header_parameters(self, spec: ModelSpec, index: int) -> dict[str, torch.Tensor]:
        """Parameters of the layer that no file of llama.cpp has as a tensor."""
        family, own = family_named(spec.architecture), self.layer.state_dict()
        names = () if family is None else family.header_parameters
        return {name: torch.full_like(own[name], spec.config[name][index]) for name in names}

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Name of a linear module to the tensor that holds its weights."""
        return {module: tensor for tensor, modules in self.modules.items() for module in modules}

    def weight(self, module: str) -> torch.Tensor:
        """``[n_out, n_in]`` float32 weights of a linear module of the layer."""
        weight: torch.Tensor = self.layer.get_submodule(module).weight  # type: ignore[assignment]
        return self._as_in_file(module, weight.detach())

    def assign(self, module: str, weight: torch.Tensor) -> None:
        """Give a linear module other weights ``[n_out, n_in]`` until the next layer is loaded."""
        self.layer.get_submodule(module).weight.data.copy_(self._as_in_model(module, weight))  # type: ignore[operator]
        self._rounded_weights.pop(module, None)

    @contextmanager
    def replaced(self, module: str, weight: torch.Tensor) -> Iterator[None]:
        """Replace the weights of a linear module for the length of a ``with``."""
        self._rounded_weights.pop(module, None)
        given = nn.Parameter(self._as_in_model(module, weight).to(self.device), requires_grad=False)
        with _given_weight(self.layer.get_submodule(module), given):
            yield
        self._rounded_weights.pop(module, None)

    @property
    def has_token_inputs(self) -> bool:
        """Whether tokens give something to every layer besides the hidden states."""
        return self._carried.has_tokens

    @property
    def token_table(self) -> torch.Tensor | None:
        """Rows ``[n_tokens, n_in]`` of the second table of tokens that occur; None if the model has one table only."""
        return None if self._token_inputs is None else self._token_inputs.table

    @contextmanager
    def replaced_token_table(self, table: torch.Tensor) -> Iterator[None]:
        """Replace these rows for the length of a ``with``."""
        assert self._token_inputs is not None
        before, self._of_tokens = self._of_tokens, self._token_inputs.of_layer(self.index, table)
        yield
        self._of_tokens = before

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """For the length of a ``with``, record the output of each module inside the layer."""
        record: Recording = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _inputs, output: record.setdefault(name, []).append(output)

        with ExitStack() as hooks:
            for name, module in self.layer.named_modules():
                if module is not self.layer:
                    hooks.enter_context(module.register_forward_hook(hook(name)))
            yield record

    @contextmanager
    def replaying(self, record: Recording, until: str) -> Iterator[None]:
        """For the length of a ``with``, do not run modules again that had finished before ``until`` ran.

        They return the recorded outputs; so the input must be the recorded one, and only the weights of ``until`` may
        differ.
        """

        def next_of(outputs: Sequence[Any]) -> Callable[..., Any]:
            remaining = iter(outputs)
            return lambda *_args, **_kwargs: next(remaining)

        with ExitStack() as stack:
            for name in takewhile(lambda name: name != until, record):
                module = self.layer.get_submodule(name)
                module.forward = next_of(record[name])  # shadows the class's method
                stack.callback(delattr, module, "forward")
            yield

    def forward(self, hidden: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Run the layer in batches.

        Args:
            hidden: States ``[n_chunks, chunk_size, state_width]``.
            exact: Whether to multiply in float32 even if bfloat16 is in use.

        Returns:
            The same shape in float32, on the CPU.
        """
        result = torch.empty_like(hidden)
        for rows, output in self.outputs(hidden, exact=exact):
            result[rows] = output
        return result

    def outputs(self, hidden: torch.Tensor, *, exact: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Like :meth:`forward`, batch by batch: rows of ``hidden`` and their outputs.

        The weights of the layer must not change before the last batch.
        """
        in_bfloat16 = self.in_bfloat16 and not exact
        with self._rounded() if in_bfloat16 else nullcontext():
            for rows in self.batches(hidden):
                yield rows, self._output(hidden[rows], {}, in_bfloat16)

    def run(self, states: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the layer on one batch with other parameters, so that gradients reach them.

        Args:
            states: ``[n_chunks, chunk_size, state_width]``.
            weights: Name of a parameter of the layer to its numbers.

        Returns:
            The same shape in float32, on the CPU.
        """
        return self._output(states, weights, self.in_bfloat16)

    def _output(self, states: torch.Tensor, weights: Mapping[str, torch.Tensor], in_bfloat16: bool) -> torch.Tensor:
        """The states behind the layer, some of whose parameters may be replaced."""
        hidden, carried = self.hidden_part(states), states[..., self._d_model :]
        around = self._around_layers(hidden.shape)[self._layers.index(self.layer)]
        around = around | self._carried.arguments(carried, self.device, self._of_tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
            inputs = (hidden.to(self.device),)
            if weights:
                output = torch.func.functional_call(self.layer, dict(weights), inputs, around)
            else:
                output = self.layer(*inputs, **around)
        after = (output[0] if isinstance(output, tuple) else output).float().cpu()
        return self._joined(after, self._carried.after(self.index, carried, around))

    def batches(self, hidden: torch.Tensor) -> Iterator[slice]:
        """Rows of ``hidden`` for each batch."""
        step = max(1, _BATCH_TOKENS // hidden.shape[1])
        for start in range(0, hidden.shape[0], step):
            yield slice(start, start + step)

    def output_head(self, source: Weights, matrix: torch.Tensor) -> OutputHead:
        """What follows the last layer, from a source with the final norm, and the output matrix."""
        divisor = (getattr(self.config, "logits_scaling", None) or 1.0) / getattr(
            self.config, "lm_head_multiplier", 1.0
        )
        return OutputHead(
            self.final_norm(source), matrix, self.device, divisor,
            cap=getattr(self.config, "final_logit_softcapping", None),
        )  # fmt: skip

    def final_norm(self, source: Weights) -> nn.Module:
        """The norm after the last layer, with the weights of a source."""
        norm = source.spec.final_norm
        assert norm.source_name is not None
        module = self._model.get_submodule(norm.source_name.removeprefix("model.").removesuffix(".weight"))
        module.load_state_dict({"weight": source.read(norm)})
        return module

    def watching_inputs(self, see: Callable[[str, torch.Tensor], None], *, with_mixtures: bool = False) -> Any:
        """For the length of a ``with``, call ``see`` with name and input of each linear module that runs.

        And of each mixture, whose input is that of all its experts, if ``with_mixtures``.
        """
        kinds = (nn.Linear, Experts) if with_mixtures else (nn.Linear,)
        return self._watching(lambda name, _module, x, _z: see(name, self._as_in_file(name, x)), kinds)

    def watching_outputs(self, see: Callable[[str, torch.Tensor], None]) -> Any:
        """For the length of a ``with``, call ``see`` with name and output, without bias, of each linear module."""
        return self._watching(
            lambda name, module, _x, z: see(name, z - module.bias if isinstance(module.bias, torch.Tensor) else z)
        )

    @contextmanager
    def _watching(
        self,
        see: Callable[[str, Any, torch.Tensor, torch.Tensor], None],
        kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
    ) -> Iterator[None]:
        def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
            return lambda module, inputs, output: see(name, module, inputs[0], output)

        with ExitStack() as hooks:
            for name, module in self.layer.named_modules():
                if isinstance(module, kinds):
                    hooks.enter_context(module.register_forward_hook(hook(name)))
            yield

    def _as_in_file(self, module: str, columns: torch.Tensor) -> torch.Tensor:
        return columns[..., self._columns[module][0].to(columns.device)] if module in self._columns else columns

    def _as_in_model(self, module: str, columns: torch.Tensor) -> torch.Tensor:
        return columns[..., self._columns[module][1].to(columns.device)] if module in self._columns else columns

    def select(self, index: int) -> None:
        """Make this the layer of an index, without its weights, for :meth:`run`."""
        self.index = index
        self.layer = self._layers[self._slots[index]]
        self._of_tokens = None if self._token_inputs is None else self._token_inputs.of_layer(index)

    def _prepare(self, index: int) -> None:
        """Select the layer of an index, and make room for its weights."""
        self.select(index)
        self.forget_rounded()
        with torch.inference_mode(mode=False):
            for parameter, shape in self._forgotten:
                parameter.data = torch.empty(shape, device=self.device)
        self._forgotten = []

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """For the length of a ``with``, hold matrices in bfloat16; autocast would round them again for every batch."""
        with ExitStack() as given:
            for name, module in self.layer.named_modules():
                if isinstance(module, nn.Linear):
                    if name not in self._rounded_weights:
                        self._rounded_weights[name] = nn.Parameter(module.weight.bfloat16(), requires_grad=False)
                    given.enter_context(_given_weight(module, self._rounded_weights[name]))
            yield

    def _around_layers(self, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """The arguments of each kind of layer besides hidden states of a shape: positions, masks, rotations."""
        if shape not in self._around:
            given = given_to_layers(self._model, inputs_embeds=torch.zeros(shape, device=self.device))
            self._around[shape] = [around for _, around in given]
        return self._around[shape]


@contextmanager
def _given_weight(module: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    """Replace the weight of a module for the length of a ``with``."""
    original = module.weight
    module.weight = weight
    try:
        yield
    finally:
        module.weight = original


def _share_weights(source: nn.Module, target: nn.Module) -> None:
    """Let the target use the weights of the source that it has as well."""
    shapes = {name: parameter.shape for name, parameter in target.named_parameters()}
    for name, parameter in source.named_parameters():
        if shapes.get(name) == parameter.shape:
            owner, _, attribute = name.rpartition(".")
            setattr(target.get_submodule(owner), attribute, parameter)

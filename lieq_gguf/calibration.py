"""One streamed pass over the calibration tokens: importance matrix, measurements and type errors of every layer.

All sequences go through a layer together, then the layer's weights are replaced by the next one's; so a pass needs
memory for one layer and the hidden states, however many layers there are. The arithmetic is that of transformers' own
model with a single layer. The untrained twin goes the same way, one freshly initialised layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lieq_gguf.errors import CalibrationError, SourceError
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import LayerMeasurement, Spectrum
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.scorers.spectrum import energy_spectrum
from lieq_gguf.scorers.zd import z_share
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import SourceTokenizer
from lieq_gguf.type_errors import relative_errors

CHUNK_SIZE = 512
"""Tokens in a calibration sequence, as in llama-imatrix."""

SHIPPED_TEXT = "shipped"
_MIN_CHUNK_SIZE = 16
_BATCH_TOKENS = 2048  # tokens that pass a layer at once; bounds the memory of activations
_TWIN_PREFIX = 128  # tokens at the head of a sequence that the twin sees; causal, so a prefix stands for itself


@dataclass(frozen=True)
class CalibrationTokens:
    """Token sequences to calibrate on.

    Attributes:
        ids: ``[n_chunks, chunk_size]``.
        dataset: Name of the text.
    """

    ids: npt.NDArray[np.int64]
    dataset: str


@dataclass(frozen=True)
class Calibration:
    """What the pass has learnt.

    Attributes:
        importance: Importance matrix of all layer matrices.
        measurements: One a layer; empty if only the importance matrix was asked for.
        type_errors: Tensor name to type name to weighted relative error, for the types asked for.
    """

    importance: ImportanceMatrix
    measurements: tuple[LayerMeasurement, ...]
    type_errors: dict[str, dict[str, float]]


def read_calibration_text(file: Path | None) -> tuple[str, str]:
    """The text of a file, or the one this package ships, and its name.

    Raises:
        CalibrationError: if the file cannot be read, is not UTF-8, or is empty.
    """
    if file is None:
        text = resources.files("lieq_gguf").joinpath("data", "calibration.txt").read_text(encoding="utf-8")
        return text, SHIPPED_TEXT
    try:
        text = file.read_bytes().decode("utf-8")  # bytes, since text mode would change line ends
    except FileNotFoundError:
        raise CalibrationError(f"the calibration file {file} does not exist") from None
    except OSError as error:
        raise CalibrationError(f"the calibration file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the calibration file {file} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise CalibrationError(f"the calibration file {file} is empty; expected text, at least a few pages")
    return text, file.name


def tokenize(text: str, dataset: str, tokenizer: SourceTokenizer, n_tokens: int) -> CalibrationTokens:
    """Cut a text into sequences, evenly spread over it when it is longer than ``n_tokens``.

    As in llama-imatrix, the first token of every sequence is replaced by the beginning-of-text token where the
    tokenizer adds one.

    Raises:
        CalibrationError: if the text is too short to fill one sequence.
    """
    plain = tokenizer.encode(text, add_special_tokens=False)
    marked = tokenizer.encode(text[:64], add_special_tokens=True)
    unmarked = tokenizer.encode(text[:64], add_special_tokens=False)
    starts_with_bos = len(marked) > len(unmarked) and marked[1 : 1 + len(unmarked)] == unmarked
    chunk_size = min(CHUNK_SIZE, len(plain), n_tokens)
    if chunk_size < _MIN_CHUNK_SIZE:
        raise CalibrationError(
            f"the calibration text '{dataset}' gives {chunk_size} tokens; expected at least {_MIN_CHUNK_SIZE}, "
            "better some thousands"
        )
    n_available = len(plain) // chunk_size
    n_chunks = min(n_available, max(1, n_tokens // chunk_size))
    ids = np.array(plain[: n_available * chunk_size], dtype=np.int64).reshape(n_available, chunk_size)
    ids = ids[np.linspace(0, n_available - 1, n_chunks).round().astype(int)]
    if starts_with_bos:
        ids[:, 0] = marked[0]
    return CalibrationTokens(ids, dataset)


def calibrate(
    source: ModelDirectory,
    tokens: CalibrationTokens,
    *,
    measure: bool = True,
    n_score_tokens: int = 512,
    error_types: Sequence[QuantType] = (),
    importance: ImportanceMatrix | None = None,
    weigh_errors: bool = True,
    seed: int = 0,
    device: str = "cpu",
    n_threads: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Run the calibration pass.

    Args:
        source: The model.
        tokens: What to run it on.
        measure: Whether to measure the layers for the scorers, which needs the untrained twin.
        n_score_tokens: Tokens whose projections LieQ's spectra are computed from.
        error_types: Types whose quantisation error to estimate in every matrix they fit.
        importance: Importance matrix that the file will be made with, if not the one of this pass.
        weigh_errors: Whether errors are weighted by importance; off if the file will be made without.
        seed: Seed of the untrained twin.
        device: Torch device of the forward pass.
        n_threads: Threads of the forward pass and of the encoders.
        progress: Where to show and time the pass.

    Raises:
        CalibrationError: if the device is not there or the activations are not finite.
    """
    progress = progress or Progress()
    torch.set_num_threads(n_threads)
    spec = source.spec
    config = _model_config(source.path)
    trained = _OneLayerModel(config, _torch_device(device))
    hidden = _embed(source, tokens.ids)
    prefixes = _score_prefixes(tokens.ids, n_score_tokens)
    twin_hidden = _twin_embed(config, tokens.ids[prefixes], seed) if measure else None
    in_sum2: dict[str, npt.NDArray[np.float32]] = {}
    measurements: list[LayerMeasurement] = []
    type_errors: dict[str, dict[str, float]] = {}

    with torch.inference_mode(), progress.stage("calibrate", "Measuring layers", spec.n_layers) as advance:
        for layer, matrices in enumerate(spec.layer_matrices):
            module_of = {_module_name(t.source_name, layer): t for t in matrices}
            weights = {
                _module_name(t.source_name, layer, keep_suffix=True): source.read(t)
                for t in spec.tensors
                if t.layer == layer
            }
            trained.load(weights)
            with _InputSums(trained.layer, module_of) as sums:
                output, cosine = trained.forward_all(hidden)
            if not bool(torch.isfinite(output).all()):
                raise CalibrationError(f"the output of layer {layer} is not finite; the model's weights are damaged")
            layer_sums = {module_of[module].name: value for module, value in sums.result().items()}
            in_sum2 |= layer_sums
            if measure:
                assert twin_hidden is not None
                with _Projections(trained.layer, module_of) as projections:
                    trained.forward(hidden[prefixes])
                twin = _OneLayerModel(config, trained.device, seed=_twin_seed(seed, layer))
                with _Projections(twin.layer, module_of) as twin_projections:
                    twin_hidden = twin.forward(twin_hidden)
                measurements.append(
                    LayerMeasurement(
                        layer=layer,
                        cosine=cosine,
                        z_share=z_share([trained.weight(module).cpu() for module in module_of]),
                        spectra=_spectra(projections.captured, module_of, n_threads),
                        twin_spectra=_spectra(twin_projections.captured, module_of, n_threads),
                    )
                )
            if error_types:
                made_with = importance or ImportanceMatrix(layer_sums, tokens.ids.size, tokens.ids.shape[1], "")
                for module, tensor in module_of.items():
                    mean = made_with.mean(tensor.name) if weigh_errors else None
                    type_errors[tensor.name] = relative_errors(trained.weight(module), mean, error_types, n_threads)
            hidden = output
            advance(1)

    measured = ImportanceMatrix(in_sum2, tokens.ids.size, tokens.ids.shape[1], tokens.dataset)
    return Calibration(measured, tuple(measurements), type_errors)


class _OneLayerModel:
    """transformers' own model with one decoder layer: input and output are hidden states.

    With a seed the layer holds the initialiser's random weights, the untrained twin of any layer.
    """

    def __init__(self, config: PretrainedConfig, device: torch.device, seed: int | None = None) -> None:
        self.device = device
        self._model = _initialised(config, n_vocab=1, seed=seed or 0).to(device)
        self._model.norm = nn.Identity()  # the norm after the last layer is not part of a layer
        self.layer = self._model.get_submodule("layers.0")

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy a layer's weights in, by their names inside the layer, converting to float32."""
        result = self.layer.load_state_dict(weights, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise SourceError(f"a layer's tensors do not match transformers' model: {result}")

    def weight(self, module: str) -> torch.Tensor:
        """``[n_out, n_in]`` float32 weights of a linear module of the layer."""
        weight: torch.Tensor = self.layer.get_submodule(module).weight  # type: ignore[assignment]
        return weight.detach()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[n_chunks, chunk_size, d_model]`` to the same shape, on the CPU."""
        output = self._model(inputs_embeds=hidden.to(self.device), use_cache=False).last_hidden_state
        result: torch.Tensor = output.cpu()
        return result

    def forward_all(self, hidden: torch.Tensor) -> tuple[torch.Tensor, float]:
        """``forward`` in batches, and the mean cosine between a token's hidden state before and after."""
        result = torch.empty_like(hidden)
        step = max(1, _BATCH_TOKENS // hidden.shape[1])
        cosines = 0.0
        for start in range(0, hidden.shape[0], step):
            batch = hidden[start : start + step]
            output = self.forward(batch)
            result[start : start + step] = output
            cosines += float(torch.cosine_similarity(batch, output, dim=-1).sum(dtype=torch.float64))
        return result, cosines / (hidden.shape[0] * hidden.shape[1])


class _LinearHooks:
    """Watches the linear modules of a layer while it is run."""

    def __init__(self, layer: nn.Module, modules: Sequence[str]) -> None:
        self._handles = [layer.get_submodule(name).register_forward_hook(self._hook(name)) for name in modules]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def observe(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.observe(name, module, inputs[0], output)

        return observe

    def observe(self, name: str, module: nn.Module, x: torch.Tensor, z: torch.Tensor) -> None:
        raise NotImplementedError

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()


class _InputSums(_LinearHooks):
    """Sums of squared inputs per column; query, key and value share theirs, as do gate and up."""

    def __init__(self, layer: nn.Module, modules: Sequence[str] | dict[str, Any]) -> None:
        super().__init__(layer, tuple(modules))
        self._sums: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> _InputSums:
        return self

    def observe(self, name: str, module: nn.Module, x: torch.Tensor, z: torch.Tensor) -> None:  # noqa: ARG002
        if self._last is None or self._last[0] is not x:
            flat = x.reshape(-1, x.shape[-1])
            self._last = (x, torch.linalg.vecdot(flat, flat, dim=0).cpu().double())
        sums = self._last[1]
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def result(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: sums.numpy().astype(np.float32) for name, sums in self._sums.items()}


class _Projections(_LinearHooks):
    """Keeps the projections ``Z = X Wᵀ`` ``[n_tokens, n_out]``, without bias."""

    def __init__(self, layer: nn.Module, modules: Sequence[str] | dict[str, Any]) -> None:
        super().__init__(layer, tuple(modules))
        self.captured: dict[str, torch.Tensor] = {}

    def __enter__(self) -> _Projections:
        return self

    def observe(self, name: str, module: nn.Module, x: torch.Tensor, z: torch.Tensor) -> None:  # noqa: ARG002
        if isinstance(module.bias, torch.Tensor):
            z = z - module.bias
        self.captured[name] = z.reshape(-1, z.shape[-1])


def _spectra(
    projections: dict[str, torch.Tensor], module_of: dict[str, TensorSpec], n_threads: int
) -> dict[str, Spectrum]:
    """Energy spectra by role, several at a time with one thread each.

    LAPACK's own threads wait for each other more than they work on matrices this small.
    """
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            spectra = pool.map(energy_spectrum, projections.values())
            return {module_of[module].role: s for module, s in zip(projections, spectra, strict=True)}
    finally:
        torch.set_num_threads(n_threads)


def _twin_seed(seed: int, layer: int) -> int:
    """A seed for each layer that no other layer has under a neighbouring seed."""
    return (seed + 1) * 100_003 + layer


def _module_name(source_name: str | None, layer: int, keep_suffix: bool = False) -> str:
    """Name inside the layer: ``model.layers.3.mlp.up_proj.weight`` to ``mlp.up_proj``."""
    assert source_name is not None
    name = source_name.split(f"layers.{layer}.", 1)[1]
    return name if keep_suffix else name.rpartition(".")[0]


def _torch_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise CalibrationError(f"device '{name}' cannot be used: {first_line}; try --device cpu") from None
    return device


def _model_config(path: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"transformers does not read {path / 'config.json'}: {str(error).splitlines()[0]}") from None
    config.dtype = torch.float32
    return config


def _initialised(config: PretrainedConfig, n_vocab: int, seed: int) -> nn.Module:
    """A base model with one layer and a small vocabulary, as the model's own initialiser makes it."""
    special_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # outside of the small vocabulary
    sizes = {"num_hidden_layers": 1, "vocab_size": n_vocab}
    small = type(config).from_dict(config.to_dict() | sizes | special_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)  # type: ignore[no-untyped-call]
    base: nn.Module = model.eval().base_model
    return base


def _embed(source: ModelDirectory, ids: npt.NDArray[np.int64]) -> torch.Tensor:
    embedding = next(t for t in source.spec.tensors if t.name == "token_embd.weight")
    return source.read(embedding)[torch.from_numpy(ids)].float()


def _twin_embed(config: PretrainedConfig, ids: npt.NDArray[np.int64], seed: int) -> torch.Tensor:
    """Rows of a fresh embedding for the tokens that occur; the others would only take memory."""
    used, positions = np.unique(ids, return_inverse=True)
    embedding = _initialised(config, n_vocab=len(used), seed=seed).get_input_embeddings()  # type: ignore[operator]
    rows: torch.Tensor = embedding.weight.detach()[torch.from_numpy(positions.reshape(ids.shape))]
    return rows


def _score_prefixes(ids: npt.NDArray[np.int64], n_score_tokens: int) -> tuple[Any, slice]:
    """Index of the heads of evenly spread sequences, together about ``n_score_tokens`` tokens."""
    length = min(_TWIN_PREFIX, ids.shape[1], n_score_tokens)
    n_chunks = min(ids.shape[0], max(1, n_score_tokens // length))
    rows = np.linspace(0, ids.shape[0] - 1, n_chunks).round().astype(int)
    return rows, slice(0, length)

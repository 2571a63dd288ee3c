"""One streamed pass over the calibration tokens: all that is to be known of a model, measured layer by layer.

All sequences go through a layer together, then the layer's weights are replaced by the next one's; so a pass needs
memory for one layer and the hidden states, however many layers there are. What is learnt is up to the observers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.errors import CalibrationError
from lieq_gguf.measure.layer_model import (
    LayerModel,
    has_fast_bfloat16,
    keep_freed_memory,
    torch_device,
    twin_embedding,
)
from lieq_gguf.measure.observers import Observer, TokenSample
from lieq_gguf.measure.observers.input_sums import InputSums
from lieq_gguf.measure.observers.modification import Modification
from lieq_gguf.measure.observers.outer_damage import OuterDamage
from lieq_gguf.measure.observers.projections import Projections
from lieq_gguf.measure.observers.quantization_damage import QuantizationDamage
from lieq_gguf.measure.observers.removal import Removal
from lieq_gguf.measure.observers.weight_shape import WeightShape
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.progress import Progress
from lieq_gguf.quant_types import DEFAULT_LADDER, QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import LayerMeasurement
from lieq_gguf.sources.source import Source

_SCORE_PREFIX = 128  # tokens at the head of a sequence that stand for it: attention is causal, so a prefix can
_DAMAGE_PREFIX = 256


@dataclass(frozen=True)
class PassOptions:
    """What a pass is to learn, and how.

    Attributes:
        measure: Whether to measure the layers for the scorers, which needs the untrained twin.
        n_score_tokens: Tokens whose projections LieQ's spectra are computed from.
        n_damage_tokens: Tokens a layer is run on with each of its matrices quantised.
        removal: Whether to measure the perplexity without each layer as well.
        error_types: Types whose quantisation error to estimate in every matrix they fit.
        importance: Importance matrix that the file will be made with, if not the one of this pass.
        weigh_errors: Whether errors are weighted by importance; off if the file will be made without.
        seed: Seed of the untrained twin.
        device: Torch device of the forward pass.
        n_threads: Threads of the forward pass and of the encoders.
        in_float32: Whether to multiply in float32 even where the device is fast in bfloat16.
    """

    measure: bool = True
    n_score_tokens: int = 256
    n_damage_tokens: int = 512
    removal: bool = False
    error_types: Sequence[QuantType] = ()
    importance: ImportanceMatrix | None = None
    weigh_errors: bool = True
    seed: int = 0
    device: str = "cpu"
    n_threads: int = 1
    in_float32: bool = False


@dataclass(frozen=True)
class Calibration:
    """What the pass has learnt.

    Attributes:
        importance: Importance matrix of all layer matrices.
        measurements: One a layer; empty if only the importance matrix was asked for.
        type_errors: Tensor name to type name to weighted relative error, for the types asked for.
        sensitivities: Tensor name to block error per unit of relative error; empty if nothing was measured.
        kld_per_block_error: Divergence of the logits, in nats, per block error; None if it was not measured.
    """

    importance: ImportanceMatrix
    measurements: tuple[LayerMeasurement, ...]
    type_errors: dict[str, dict[str, float]]
    sensitivities: dict[str, float]
    kld_per_block_error: float | None = None


def calibrate(
    source: Source, tokens: CalibrationTokens, options: PassOptions, progress: Progress | None = None
) -> Calibration:
    """Run the calibration pass.

    Args:
        source: The model.
        tokens: What to run it on.
        options: What to learn.
        progress: Where to show and time the pass.

    Raises:
        CalibrationError: if the device is not there or the activations are not finite.
    """
    torch.set_num_threads(options.n_threads)
    config = source.transformers_config()
    device = torch_device(options.device)
    sums, modification, weight_shape = InputSums(), Modification(), WeightShape()

    # grows with the pass: a layer's entries are there when the layer is done
    measured = ImportanceMatrix(sums.in_sum2, tokens.ids.size, tokens.ids.shape[1], tokens.dataset, sums.counts)
    made_with = (options.importance or measured) if options.weigh_errors else None
    observers: list[Observer] = [sums]
    prefixes = _heads(tokens.ids.shape, options.n_score_tokens, _SCORE_PREFIX)
    sample = _heads(tokens.ids.shape, options.n_damage_tokens, _DAMAGE_PREFIX)
    projections = removal = None
    if options.measure:
        twin = LayerModel(config, device)
        projections = Projections(
            prefixes,
            twin.embed(twin_embedding(config, tokens.ids[prefixes[0].numpy(), prefixes[1]], options.seed)),
            twin,
            partial(_twin_seed, options.seed),
            options.n_threads,
        )
        observers += [modification, weight_shape, projections]
    if options.removal:
        removal = Removal(torch.from_numpy(tokens.ids), sample)
        observers.append(removal)
    damage = QuantizationDamage(options.error_types, made_with, sample if options.measure else None, options.n_threads)
    if options.measure or options.error_types:
        observers.append(damage)
    outer_damage = None
    if options.measure:
        matrices = [(tensor, source.read(tensor)) for tensor in source.spec.other_matrices]
        # by rule, embedding and output can have types that the layers are not offered
        types = tuple(dict.fromkeys([*options.error_types, *DEFAULT_LADDER]))
        outer_damage = OuterDamage(matrices, tokens.ids, sample, damage, types, options.n_threads)
        observers.append(outer_damage)
    layer = LayerModel(config, device, in_bfloat16=not options.in_float32 and has_fast_bfloat16(device))
    _stream(source, tokens.ids, layer, observers, progress or Progress())

    measurements: tuple[LayerMeasurement, ...] = ()
    if options.measure:
        assert projections is not None
        measurements = tuple(
            LayerMeasurement(
                layer=i,
                cosine=modification.cosines[i],
                z_share=weight_shape.z_shares[i],
                spectra=projections.spectra[i],
                twin_spectra=projections.twin_spectra[i],
                block_errors={t.role: damage.block_errors[t.name] for t in matrices},
                perplexity_drop=None if removal is None else removal.perplexity_drops[i],
            )
            for i, matrices in enumerate(source.spec.layer_matrices)
        )
    sensitivities = {name: error / (damage.probe_errors[name] or 1.0) for name, error in damage.block_errors.items()}
    if outer_damage is None:
        return Calibration(measured, measurements, damage.type_errors, sensitivities)
    return Calibration(
        measured,
        measurements,
        damage.type_errors | outer_damage.type_errors,
        sensitivities | outer_damage.sensitivities,
        outer_damage.kld_per_block_error,
    )


def _stream(
    source: Source,
    ids: npt.NDArray[np.int64],
    layer: LayerModel,
    observers: Sequence[Observer],
    progress: Progress,
) -> None:
    """Take all tokens through one layer after the other, and tell the observers."""
    spec = source.spec
    tensor_named = {t.name: t for t in spec.tensors}
    hidden = layer.embed(source.read(spec.embedding)[torch.from_numpy(ids)])
    output = torch.empty_like(hidden)
    keep_freed_memory()
    watching = [observer for observer in observers if observer.sees_inputs]

    def see_input(module: str, x: torch.Tensor) -> None:
        for observer in watching:
            observer.see_input(module, x)

    with torch.inference_mode(), progress.stage("calibrate", "Measuring layers", spec.n_layers) as advance:
        for index in range(spec.n_layers):
            layer.load(source, index)
            with layer.watching_inputs(see_input):
                for rows, result in layer.outputs(hidden):
                    output[rows] = result
                    for observer in observers:
                        observer.see_output(hidden[rows], output[rows])
            if not bool(output.sum().isfinite()):  # one number that is not finite makes the sum so
                raise CalibrationError(f"the output of layer {index} is not finite; the model's weights are damaged")
            for observer in observers:
                observer.finish(layer, hidden)
            hidden, output = output, hidden
            advance(1)
        head = tensor_named.get("output.weight", spec.embedding)
        layer.forget()
        outer = layer.head(source.read(tensor_named["output_norm.weight"]), source.read(head))
        for observer in observers:
            observer.conclude(outer, hidden)
        source.release()


def _twin_seed(seed: int, layer: int) -> int:
    """A seed for each layer that no other layer has under a neighbouring seed."""
    return (seed + 1) * 100_003 + layer


def _heads(shape: tuple[int, ...], n_tokens: int, length: int) -> TokenSample:
    """Index of the heads of evenly spread sequences, together about ``n_tokens`` tokens."""
    n_chunks, chunk_size = shape
    length = min(length, chunk_size, n_tokens)
    rows = np.linspace(0, n_chunks - 1, min(n_chunks, max(1, n_tokens // length))).round().astype(int)
    return torch.from_numpy(rows), slice(0, length)

"""One streamed pass over the calibration tokens: everything about a model, measured layer by layer.

All sequences go through a layer together, then the next layer's weights replace its own; so a pass needs memory for one
layer and the hidden states, however many layers there are. The observers decide what is measured.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.errors import CalibrationError
from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.measure.observers.input_sums import InputSums
from lieq_gguf.measure.observers.modification import Modification
from lieq_gguf.measure.observers.outer_damage import OuterDamage
from lieq_gguf.measure.observers.output_moments import OutputMoments
from lieq_gguf.measure.observers.projections import Projections
from lieq_gguf.measure.observers.quantization_damage import QuantizationDamage
from lieq_gguf.measure.observers.removal import Removal
from lieq_gguf.measure.observers.weight_shape import WeightShape
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import CalibrationTokens
from lieq_gguf.measure.torch_setup import keep_freed_memory
from lieq_gguf.progress import Progress
from lieq_gguf.records.measurement import LayerMeasurement
from lieq_gguf.sources.source import Source

STATISTICS_BY: tuple[type[Observer], ...] = (Modification, WeightShape, Projections, Removal, QuantizationDamage)
"""The observers that measure a statistic; a new one is added here."""


def run_pass(
    source: Source, tokens: CalibrationTokens, options: PassOptions, progress: Progress | None = None
) -> PassResult:
    """Run all tokens through the model, layer by layer.

    Args:
        source: The model.
        tokens: The calibration tokens.
        options: What to measure.
        progress: Where to show and time the pass.

    Raises:
        CalibrationError: if the device is not available or the activations are not finite.
    """
    layer = LayerModel.of(source, options.compute)
    setting = PassSetting(source, layer.config, layer.device, tokens, options)
    observers = Observers(_observer_kinds(options), setting)
    _stream(source, tokens.ids, layer, observers, progress or Progress())
    n_measured = source.spec.n_layers if options.statistics else 0
    return PassResult(
        observers[InputSums].importance(),
        tuple(_measurement(index, observers, options) for index in range(n_measured)),
        *_damage(observers),
        output_moments=observers[OutputMoments].moments if options.output_moments else None,
    )


def _observer_kinds(options: PassOptions) -> list[type[Observer]]:
    """The observers for a pass; ``Observers`` adds those that they need."""
    kinds: list[type[Observer]] = [InputSums]
    kinds += [kind for kind in STATISTICS_BY if kind.gives & options.statistics]
    if options.error_types:
        kinds.append(QuantizationDamage)
    if options.measures_damage:
        kinds.append(OuterDamage)
    if options.output_moments:
        kinds.append(OutputMoments)
    return kinds


def _measurement(layer: int, observers: Observers, options: PassOptions) -> LayerMeasurement:
    statistics = {
        name: value for o in observers if o.gives & options.statistics for name, value in o.statistics(layer).items()
    }
    return LayerMeasurement(layer=layer, **statistics)


def _damage(observers: Observers) -> tuple[dict[str, dict[str, float]], dict[str, float], float | None]:
    """Errors by type, sensitivities, and divergence per block error, for all matrices that were quantised."""
    if QuantizationDamage not in observers:
        return {}, {}, None
    decoder = observers[QuantizationDamage]
    sensitivities = {name: error / (decoder.probe_errors[name] or 1.0) for name, error in decoder.block_errors.items()}
    if OuterDamage not in observers:
        return decoder.type_errors, sensitivities, None
    outer = observers[OuterDamage]
    return decoder.type_errors | outer.type_errors, sensitivities | outer.sensitivities, outer.kld_per_block_error


def _stream(
    source: Source,
    ids: npt.NDArray[np.int64],
    layer: LayerModel,
    observers: Observers,
    progress: Progress,
) -> None:
    """Run all tokens through one layer after the other, and call the observers."""
    spec = source.spec
    hidden = layer.embed(source, ids)
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
                        observer.see_output(layer.hidden_part(hidden[rows]), layer.hidden_part(output[rows]))
            if not bool(output.sum().isfinite()):  # one infinite or NaN value makes the sum not finite
                raise CalibrationError(f"the output of layer {index} is not finite; the model's weights are damaged")
            for observer in observers:
                observer.finish(layer, hidden)
            hidden, output = output, hidden
            advance(1)
        layer.forget()
        output_head = layer.output_head(source, source.read(spec.output_matrix))
        for observer in observers:
            observer.conclude(output_head, hidden)
        source.release()

"""Everything in the file before the first tensor: metadata of the model and the file, and the place of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf

from lieq_gguf import __version__
from lieq_gguf.formats.gguf_header import HeaderWriter, TensorLayout, pack_header
from lieq_gguf.quant_types import F32, QUANT_TYPES
from lieq_gguf.records.bits import BitBudget, BitMeter, measure_bits, padded
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.source import SourceMetadata


@dataclass(frozen=True)
class ImatrixNote:
    """What a file says about the importance matrix it was made with.

    Attributes:
        file: Name of its file.
        dataset: Name of the calibration text.
        n_entries: Number of its matrices.
        n_chunks: Number of sequences it was measured on.
    """

    file: str
    dataset: str
    n_entries: int
    n_chunks: int


@dataclass(frozen=True)
class Provenance:
    """The origin of a file, stored inside it.

    Attributes:
        command_line: The command that made it.
        imatrix: The importance matrix that was used, if any.
        tune: What was tuned after the codes were chosen, as in ``WritingOptions``.
    """

    command_line: str
    imatrix: ImatrixNote | None = None
    tune: str = "none"


@dataclass(frozen=True)
class Header:
    """The header of a file, ready to write.

    Attributes:
        content: Everything before the first tensor.
        meter: The figures of the whole file.
    """

    content: bytes
    meter: BitMeter


@dataclass(frozen=True)
class PlanLabels:
    """What a file says about its plan besides the types.

    Attributes:
        method: Name of the allocation method.
        scorer: Name of the layer score.
        profile: What the file is made for.
        error_feedback: Whether it is written with error feedback.
        budget: The target.
        layer_scores: The score of each layer.
    """

    method: str
    scorer: str
    profile: str
    error_feedback: bool
    budget: BitBudget
    layer_scores: tuple[float, ...]


def make_header(spec: ModelSpec, metadata: SourceMetadata, plan: QuantPlan, provenance: Provenance) -> Header:
    """Lay out the file: metadata, and name, shape, type and place of every tensor.

    The metadata holds figures that depend on the size of the file, so the header is made twice, first to get the size.
    """
    labels = PlanLabels(plan.method, plan.scorer, plan.profile, plan.error_feedback, plan.budget, plan.layer_scores)
    layout = _Layout(spec, metadata, plan.types, labels, provenance)
    tensors_bytes = sum(padded(QUANT_TYPES[plan.types[t.name]].tensor_bytes(t.shape)) for t in spec.tensors)
    n_bytes = len(layout.content(measure_bits(spec.tensors, plan.types, 0)))
    meter = measure_bits(spec.tensors, plan.types, n_bytes + tensors_bytes)
    return Header(layout.content(meter), meter)


def header_bytes(spec: ModelSpec, metadata: SourceMetadata, labels: PlanLabels, provenance: Provenance) -> int:
    """Bytes before the first tensor. They depend neither on types nor on figures, so no plan is needed."""
    types = {t.name: F32.name for t in spec.tensors}
    layout = _Layout(spec, metadata, types, labels, provenance)
    return len(layout.content(measure_bits(spec.tensors, types, 0)))


@dataclass(frozen=True)
class _Layout:
    """A header without the figures of the file."""

    spec: ModelSpec
    metadata: SourceMetadata
    types: Mapping[str, str]
    labels: PlanLabels
    provenance: Provenance

    def content(self, meter: BitMeter) -> bytes:
        """The bytes of the header with the figures."""
        spec = self.spec
        writer = HeaderWriter(spec.architecture)
        writer.values.update(self.metadata.values)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(spec.layer_matrices, self.types))
        self._add_provenance(writer, meter)
        return pack_header(writer.values, map(self._tensor, spec.tensors))

    def _tensor(self, tensor: TensorSpec) -> TensorLayout:
        quant_type = QUANT_TYPES[self.types[tensor.name]]
        return TensorLayout(tensor.name, tensor.shape, quant_type.ggml_id, quant_type.tensor_bytes(tensor.shape))

    def _add_provenance(self, writer: gguf.GGUFWriter, meter: BitMeter) -> None:
        imatrix, labels = self.provenance.imatrix, self.labels
        if imatrix is not None:
            writer.add_string("quantize.imatrix.file", imatrix.file)
            writer.add_string("quantize.imatrix.dataset", imatrix.dataset)
            writer.add_uint32("quantize.imatrix.entries_count", imatrix.n_entries)
            writer.add_uint32("quantize.imatrix.chunks_count", imatrix.n_chunks)
        writer.add_string("lieq.version", __version__)
        writer.add_string("lieq.method", labels.method)
        writer.add_string("lieq.scorer", labels.scorer)
        writer.add_string("lieq.profile", labels.profile)
        writer.add_string("lieq.refine", "feedback" if labels.error_feedback else "none")
        writer.add_string("lieq.tune", self.provenance.tune)
        writer.add_array("lieq.layer_scores", [float(score) for score in labels.layer_scores])
        writer.add_string("lieq.target.kind", labels.budget.kind)
        writer.add_float64("lieq.target.value", labels.budget.value)  # a size needs more digits
        writer.add_float32("lieq.layer_bpw", meter.layer_bpw)
        writer.add_float32("lieq.file_bpw", meter.file_bpw)
        writer.add_float32("lieq.nominal_bits", meter.nominal_bits)
        writer.add_string("lieq.command_line", self.provenance.command_line)


def _file_type(layers: tuple[tuple[TensorSpec, ...], ...], types: Mapping[str, str]) -> int:
    """The file type for the type of most decoder weights; llama.cpp only displays it."""
    n_weights: dict[str, int] = {}
    for tensor in (t for layer in layers for t in layer):
        n_weights[types[tensor.name]] = n_weights.get(types[tensor.name], 0) + tensor.n_weights
    return QUANT_TYPES[max(n_weights, key=lambda name: n_weights[name])].file_type

"""The GGUF file, written tensor by tensor: read, quantise, append.

The header is complete before the first tensor, because every size is known from the plan. The file grows under a
temporary name beside the target and takes its place only when the caller is content with it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from lieq_gguf import __version__
from lieq_gguf.errors import OutputError, QuantizationError
from lieq_gguf.formats.gguf_header import HeaderWriter
from lieq_gguf.native import encoders
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitMeter, measure_bits, padded
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.spec import ModelSpec, TensorSpec
from lieq_gguf.sources.source import Source, SourceMetadata

_PART_WEIGHTS = 1 << 17  # that a thread encodes at a time: some ten milliseconds, with one part like another
_AHEAD = 3  # parts begun by thread, so that none runs dry while the file is written

_Rows: TypeAlias = tuple[TensorSpec, "npt.NDArray[np.float32] | npt.NDArray[np.uint8]", int, bool]
"""A tensor, some rows of it, float32 ``[n_rows, n_in]`` or encoded already, the first's index, and if they are last."""


@dataclass(frozen=True)
class EncodedRows:
    """Some rows of a tensor as the file has them, in file order.

    Attributes:
        tensor: The tensor.
        data: ``[n_rows, row_bytes]``.
        is_last: Whether they are its last.
    """

    tensor: TensorSpec
    data: npt.NDArray[np.uint8]
    is_last: bool


@dataclass(frozen=True)
class ImatrixNote:
    """What a file says of the importance matrix it was made with.

    Attributes:
        file: Its file name.
        dataset: Name of the calibration text.
        n_entries: Matrices in it.
        n_chunks: Sequences it was measured on.
    """

    file: str
    dataset: str
    n_entries: int
    n_chunks: int


@dataclass(frozen=True)
class Provenance:
    """Where a file comes from, kept inside it.

    Attributes:
        command_line: The command that made it.
        imatrix: The importance matrix that was used, if any.
    """

    command_line: str
    imatrix: ImatrixNote | None = None


@dataclass(frozen=True)
class Header:
    """The head of a file, ready to write.

    Attributes:
        content: Everything before the first tensor.
        meter: The figures of the whole file.
    """

    content: bytes
    meter: BitMeter


def make_header(spec: ModelSpec, metadata: SourceMetadata, plan: QuantPlan, provenance: Provenance) -> Header:
    """Lay out the file: metadata, and name, shape, type and place of every tensor.

    The figures of the file are themselves part of the metadata, so it is laid out twice, the first time to learn its
    size.
    """
    packed = _packed(spec, metadata)
    tensors_bytes = sum(padded(QUANT_TYPES[plan.types[t.name]].tensor_bytes(t.shape)) for t in spec.tensors)
    size = len(_header_content(spec, packed, plan, provenance, measure_bits(spec.tensors, plan.types, 0)))
    meter = measure_bits(spec.tensors, plan.types, size + tensors_bytes)
    return Header(_header_content(spec, packed, plan, provenance, meter), meter)


def header_size(spec: ModelSpec, metadata: SourceMetadata, plan: QuantPlan, provenance: Provenance) -> int:
    """Bytes before the first tensor; they do not depend on the types."""
    meter = measure_bits(spec.tensors, plan.types, 0)
    return len(_header_content(spec, _packed(spec, metadata), plan, provenance, meter))


def _packed(spec: ModelSpec, metadata: SourceMetadata) -> dict[str, bytes]:
    """The metadata as bytes: to pack a vocabulary takes a while."""
    writer = HeaderWriter(None, spec.architecture)
    metadata.add_to(writer)
    return writer.packed()


def write_file(
    target: Path,
    header: Header,
    encoded: Iterable[EncodedRows],
    advance: Callable[[float], None] = lambda _amount: None,
) -> None:
    """Write header and tensors.

    Args:
        target: File to write, replaced if it exists.
        header: Made for these tensors.
        encoded: All tensors, in file order.
        advance: Called with the number of weights written.

    Raises:
        OutputError: if the file is not of the size the header says.
    """
    with target.open("wb") as file:
        file.write(header.content)
        for rows in encoded:
            file.write(rows.data.data)
            if rows.is_last:
                file.write(bytes(padded(file.tell()) - file.tell()))
            advance(len(rows.data) / rows.tensor.n_rows * rows.tensor.n_weights)
        written = file.tell()
    if written != header.meter.file_bytes:
        raise OutputError(f"{target} has {written} bytes, planned were {header.meter.file_bytes}; please report this")


def encode_tensors(
    source: Source,
    tensors: Sequence[TensorSpec],
    plan: QuantPlan,
    importance: ImportanceMatrix | None,
    n_threads: int = 1,
) -> Iterator[EncodedRows]:
    """Read and quantise tensors, each by itself.

    Args:
        source: The model.
        tensors: What to encode, in file order.
        plan: One type per tensor.
        importance: Weights of the squared errors, or None.
        n_threads: Threads of the encoders.

    Raises:
        QuantizationError: if a tensor cannot be encoded.
    """
    n_threads = max(1, n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        begun: deque[tuple[_Rows, Future[npt.NDArray[np.uint8]]]] = deque()
        for part in _rows_in_order(source, tensors, plan):
            begun.append((part, pool.submit(_encoded, part, QUANT_TYPES[plan.types[part[0].name]], importance)))
            if len(begun) > _AHEAD * n_threads:
                yield _finished(*begun.popleft())
        while begun:
            yield _finished(*begun.popleft())


def _encoded(part: _Rows, quant_type: QuantType, importance: ImportanceMatrix | None) -> npt.NDArray[np.uint8]:
    tensor, rows, first_row, _ = part
    if rows.dtype == np.uint8:
        return rows.astype(np.uint8, copy=False)
    mean = None if importance is None else importance.mean(tensor.name)
    if mean is not None and tensor.of_experts:
        mean = mean[first_row // tensor.shape[1]]
    try:
        return encoders.quantize(rows.astype(np.float32, copy=False), quant_type, mean)
    except QuantizationError as error:
        raise QuantizationError(f"{tensor.name}: {error}") from None


def _finished(part: _Rows, data: Future[npt.NDArray[np.uint8]]) -> EncodedRows:
    return EncodedRows(part[0], data.result(), is_last=part[3])


def _rows_in_order(source: Source, tensors: Sequence[TensorSpec], plan: QuantPlan) -> Iterator[_Rows]:
    """Weights as the file has them, some rows at a time."""
    for tensor in tensors:
        n_left = tensor.n_rows
        step = max(1, _PART_WEIGHTS // tensor.shape[-1])
        for read in source.encoded_rows(tensor, QUANT_TYPES[plan.types[tensor.name]]) or source.rows(tensor):
            for start in range(0, len(read), step):
                rows = read[start : start + step]
                yield tensor, rows, tensor.n_rows - n_left, n_left == len(rows)
                n_left -= len(rows)
        source.release()


def _header_content(
    spec: ModelSpec, packed: Mapping[str, bytes], plan: QuantPlan, provenance: Provenance, meter: BitMeter
) -> bytes:
    writer = HeaderWriter(None, spec.architecture)
    for key, value in packed.items():
        writer.add_bytes(key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(spec.layer_matrices, plan.types))
    _add_provenance(writer, plan, provenance, meter)
    for tensor in spec.tensors:
        quant_type = QUANT_TYPES[plan.types[tensor.name]]
        writer.add_encoded_tensor(tensor.name, tensor.shape, quant_type.ggml_id, quant_type.tensor_bytes(tensor.shape))
    # The writer fills open files only; an open file in memory saves writing the header to disk twice.
    content = io.BytesIO()
    writer.fout = [content]  # type: ignore[list-item]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    size = content.tell()
    return content.getvalue() + bytes(padded(size) - size)


def _file_type(layers: tuple[tuple[TensorSpec, ...], ...], types: Mapping[str, str]) -> int:
    """The file type of the type that most decoder weights have; llama.cpp only shows it."""
    n_weights: dict[str, int] = {}
    for tensor in (t for layer in layers for t in layer):
        n_weights[types[tensor.name]] = n_weights.get(types[tensor.name], 0) + tensor.n_weights
    return QUANT_TYPES[max(n_weights, key=lambda name: n_weights[name])].file_type


def _add_provenance(writer: gguf.GGUFWriter, plan: QuantPlan, provenance: Provenance, meter: BitMeter) -> None:
    if provenance.imatrix is not None:
        writer.add_string("quantize.imatrix.file", provenance.imatrix.file)
        writer.add_string("quantize.imatrix.dataset", provenance.imatrix.dataset)
        writer.add_uint32("quantize.imatrix.entries_count", provenance.imatrix.n_entries)
        writer.add_uint32("quantize.imatrix.chunks_count", provenance.imatrix.n_chunks)
    writer.add_string("lieq.version", __version__)
    writer.add_string("lieq.method", plan.method)
    writer.add_string("lieq.scorer", plan.scorer)
    writer.add_string("lieq.profile", plan.profile)
    writer.add_string("lieq.refine", plan.refine)
    writer.add_array("lieq.layer_scores", [float(score) for score in plan.layer_scores])
    writer.add_string("lieq.target.kind", plan.budget.kind)
    writer.add_float64("lieq.target.value", plan.budget.value)  # a size needs more digits
    writer.add_float32("lieq.layer_bpw", meter.layer_bpw)
    writer.add_float32("lieq.file_bpw", meter.file_bpw)
    writer.add_float32("lieq.nominal_bits", meter.nominal_bits)
    writer.add_string("lieq.command_line", provenance.command_line)

"""Estimates the error of each type in a matrix, from blocks where a fast type has large errors.

Errors are heavy-tailed: a few columns carry most of the importance, and a few blocks most of the error. Rows spread
evenly over a matrix miss them (in SmolLM2, 20 % off on average). So the whole matrix is first quantised with a fast
type, the probe; blocks are drawn in proportion to the probe's error; and the other types' errors are estimated as
multiples of the probe's, which differ little from block to block (docs/experiments.md has the accuracy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.spec import TensorSpec

FloatArray = npt.NDArray[np.float32]

_SAMPLED_WEIGHTS = 48 * 256  # if no unit divides a row
_N_SAMPLED_EXPERTS = 4  # their errors by type stand for those of all experts
_PROBES = tuple(QUANT_TYPES[name] for name in ("Q3_K", "Q4_0", "F16"))  # the fastest encoders of each block size
_SAMPLED_UNITS = {256: 48, 64: 384, 32: 384}
"""Weights in a unit to number of units to draw. The largest unit that divides a row is used; types that fit the row fit
the unit."""

_EVEN_SHARE = 0.3  # weight of a unit's energy, beside the probe's error, in the chance to be drawn

_CHUNK_WEIGHTS = 1 << 16  # weights per task of a thread
_TINY = float(np.finfo(np.float64).tiny)  # avoids 0 / 0 for a unit of zeros


@dataclass(frozen=True)
class Probe:
    """A matrix quantised with a fast type.

    Attributes:
        quant_type: The type.
        weights: ``[n_out, n_in]`` float32.
        decoded: The weights after encoding and decoding.
        importance: ``[n_in]``, weight of each column's squared error, or None.
        unit: Number of neighbouring weights of a row that are drawn together.
        unit_errors: ``[n_out, n_in / unit]``, weighted squared error of each unit.
        unit_energies: ``[n_out, n_in / unit]``, weighted squares of each unit's weights.
    """

    quant_type: QuantType
    weights: FloatArray
    decoded: FloatArray
    importance: FloatArray | None
    unit: int
    unit_errors: npt.NDArray[np.float64]
    unit_energies: npt.NDArray[np.float64]

    @property
    def energy(self) -> float:
        """``Σ im·W²``."""
        return float(self.unit_energies.sum())

    @property
    def relative_error(self) -> float:
        """``Σ im·(W − Ŵ)² / Σ im·W²``; 0 = exact, 1 = as bad as all zeros."""
        return float(self.unit_errors.sum()) / self.energy if self.energy > 0 else 0.0


def probe_type(n_in: int) -> QuantType:
    """The type with the fastest encoder that fits rows of ``n_in`` weights."""
    return next(t for t in _PROBES if t.fits(n_in))


def probe_matrix(weights: FloatArray, importance: FloatArray | None, n_threads: int = 1) -> Probe:
    """Quantise a matrix with the fastest type that fits; arguments as in :func:`probe_matrices`."""
    return probe_matrices([(weights, importance)], n_threads)[0]


def probe_matrices(matrices: Sequence[tuple[FloatArray, FloatArray | None]], n_threads: int = 1) -> list[Probe]:
    """Quantise matrices, each with the fastest type that fits.

    Args:
        matrices: Pairs of weights ``[n_out, n_in]`` and mean squared input of each column ``[n_in]``, or None to weight
            all columns equally.
        n_threads: Threads of the encoder.
    """
    probes = []
    for weights, importance in matrices:
        n_out, n_in = weights.shape
        unit = next((u for u in _SAMPLED_UNITS if n_in % u == 0), n_in)
        of_units = np.empty((2, n_out, n_in // unit))
        probes.append(Probe(probe_type(n_in), weights, np.empty_like(weights), importance, unit, *of_units))
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        slices = [(probe, rows) for probe in probes for rows in _row_slices(probe.weights)]
        for _ in pool.map(_probe_rows, slices):  # the loop re-raises what a thread raised
            pass
    return probes


def _row_slices(weights: FloatArray) -> Iterator[slice]:
    n_out, n_in = weights.shape
    step = max(1, _CHUNK_WEIGHTS // n_in)
    return (slice(start, start + step) for start in range(0, n_out, step))


def _probe_rows(row_slice: tuple[Probe, slice]) -> None:
    probe, rows = row_slice
    weights = np.ascontiguousarray(probe.weights[rows])
    encoded = encoders.quantize(weights, probe.quant_type, probe.importance)
    probe.decoded[rows] = ggml.dequantize(encoded, probe.quant_type)
    probe.unit_errors[rows] = _unit_sums(weights - probe.decoded[rows], probe.importance, probe.unit)
    probe.unit_energies[rows] = _unit_sums(weights, probe.importance, probe.unit)


def relative_errors(probes: Sequence[Probe], types: Sequence[QuantType], n_threads: int = 1) -> list[dict[str, float]]:
    """Importance-weighted relative error ``Σ im·(W − Ŵ)² / Σ im·W²`` for each type that fits the rows.

    Args:
        probes: Matrices.
        types: Candidate types; the result leaves out types whose blocks do not fit ``n_in`` and, without importance,
            types that need it.
        n_threads: Number of types tried at a time.

    Returns:
        For each matrix, type name to error, 0 = exact, 1 = as bad as all zeros.
    """
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        # all matrices at once, so that threads are idle only at the end
        pending = [{name: pool.submit(error) for name, error in _errors(probe, types).items()} for probe in probes]
        return [{name: error.result() for name, error in of_matrix.items()} for of_matrix in pending]


@dataclass(frozen=True)
class TensorProbe:
    """The probes of a tensor's matrices: one, or one for every expert.

    Attributes:
        tensor: The tensor.
        matrices: The probes.
        shares: Weight of each matrix ``[n_matrices]``: the share of the tokens that reach it.
    """

    tensor: TensorSpec
    matrices: tuple[Probe, ...]
    shares: FloatArray

    @property
    def relative_error(self) -> float:
        """``Σ im·(W − Ŵ)² / Σ im·W²`` over all matrices."""
        energies = [probe.energy * float(share) for probe, share in zip(self.matrices, self.shares, strict=True)]
        errors = [probe.relative_error * energy for probe, energy in zip(self.matrices, energies, strict=True)]
        return sum(errors) / sum(energies) if sum(energies) > 0 else 0.0

    def sampled(self) -> list[Probe]:
        """The matrix, or the matrices of the experts that most tokens reach."""
        most = np.argsort(-self.shares, kind="stable")[:_N_SAMPLED_EXPERTS]
        return [self.matrices[i] for i in most]

    def errors_by_type(self, of_sampled: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Relative error by type of all matrices: that of the sampled ones, scaled by the ratio of probe errors."""
        if len(of_sampled) == 1:
            return dict(of_sampled[0])
        probed = sum(probe.relative_error for probe in self.sampled())
        scale = self.relative_error / probed if probed > 0 else 1 / len(of_sampled)
        return {name: sum(errors[name] for errors in of_sampled) * scale for name in of_sampled[0]}


def probe_tensors(
    tensors: Sequence[tuple[TensorSpec, Sequence[FloatArray]]], importance: ImportanceMatrix | None, n_threads: int = 1
) -> list[TensorProbe]:
    """Quantise the matrices of tensors, each with the fastest type that fits.

    Args:
        tensors: Tensors and their matrices ``[n_out, n_in]``: one, or one for every expert.
        importance: Weights of the squared errors, or None.
        n_threads: Threads of the encoder.
    """
    weighted: list[tuple[FloatArray, FloatArray | None]] = []
    for tensor, matrices in tensors:
        means = None if importance is None else importance.mean(tensor.name)
        of_expert = means if tensor.of_experts and means is not None else [means] * len(matrices)
        weighted += zip(matrices, of_expert, strict=True)
    probes = iter(probe_matrices(weighted, n_threads))
    return [
        TensorProbe(tensor, tuple(islice(probes, len(matrices))), _shares(tensor, len(matrices), importance))
        for tensor, matrices in tensors
    ]


def _shares(tensor: TensorSpec, n_matrices: int, importance: ImportanceMatrix | None) -> FloatArray:
    """Share of the tokens that reach each matrix."""
    if tensor.of_experts and importance is not None:
        return importance.expert_shares(tensor.name, n_matrices)
    return np.full(n_matrices, 1 / n_matrices, dtype=np.float32)


def errors_of_tensors(
    probes: Sequence[TensorProbe], types: Sequence[QuantType], n_threads: int = 1
) -> dict[str, dict[str, float]]:
    """Tensor name to type name to weighted relative error, for each type that fits the rows."""
    sampled = [probe.sampled() for probe in probes]
    errors = iter(relative_errors([p for some in sampled for p in some], types, n_threads))
    return {
        probe.tensor.name: probe.errors_by_type(list(islice(errors, len(some))))
        for probe, some in zip(probes, sampled, strict=True)
    }


def _errors(probe: Probe, types: Sequence[QuantType]) -> dict[str, Callable[[], float]]:
    """A function for the error of every type that fits a matrix."""
    n_in = probe.weights.shape[1]
    fitting = [t for t in types if t.fits(n_in) and (probe.importance is not None or not t.needs_imatrix)]
    if probe.energy <= 0:
        return {t.name: lambda: 0.0 for t in fitting}
    chances = probe.unit_errors + probe.unit_energies * (_EVEN_SHARE * probe.relative_error)
    if not chances.any():  # the probe is exact, so only the weights can guide the draw
        chances = probe.unit_energies
    # Sorted by the probe's relative error, so that even steps draw from units of every error.
    order = np.argsort(probe.unit_errors.ravel() / (probe.unit_energies.ravel() + _TINY), kind="stable")
    n_drawn = _SAMPLED_UNITS.get(probe.unit) or max(1, _SAMPLED_WEIGHTS // probe.unit)
    drawn = order[_systematic_sample(chances.ravel()[order], n_drawn)]
    scale = float(chances.sum()) / len(drawn) / probe.energy

    def error(quant_type: QuantType) -> float:
        if quant_type is probe.quant_type:
            return probe.relative_error
        return scale * sum(
            float((_unit_errors(probe, quant_type, column, rows) / chances[rows, column]).sum())
            for column, rows in _by_column(drawn, chances.shape[1])
        )

    return {t.name: partial(error, t) for t in fitting}


def _unit_errors(
    probe: Probe, quant_type: QuantType, column: int, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Weighted squared errors of a type in some rows of one column of units ``[n_rows]``."""
    columns = slice(column * probe.unit, (column + 1) * probe.unit)
    weights = np.ascontiguousarray(probe.weights[rows, columns])
    importance = None if probe.importance is None else probe.importance[columns]
    decoded = ggml.dequantize(encoders.quantize(weights, quant_type, importance), quant_type)
    return _unit_sums(weights - decoded, importance, probe.unit)[:, 0]


def _unit_sums(values: FloatArray, importance: FloatArray | None, unit: int) -> npt.NDArray[np.float64]:
    """``Σ im·v²`` over each unit of each row ``[n_rows, n_units]``."""
    squares = values * values if importance is None else values * values * importance
    sums: npt.NDArray[np.float64] = squares.reshape(values.shape[0], -1, unit).sum(axis=2, dtype=np.float64)
    return sums


def _systematic_sample(chances: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.int64]:
    """Indices drawn in proportion to ``chances``, at even steps of their running sum; large ones occur repeatedly."""
    running = np.cumsum(chances)
    drawn: npt.NDArray[np.int64] = np.searchsorted(running, (np.arange(n) + 0.5) / n * running[-1])
    return drawn


def _by_column(drawn: npt.NDArray[np.int64], n_columns: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Drawn units, given as flat indices, grouped by column of units: the column and its drawn rows."""
    rows, columns = np.divmod(drawn, n_columns)
    return [(int(column), rows[columns == column]) for column in np.unique(columns)]

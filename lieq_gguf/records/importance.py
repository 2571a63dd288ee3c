"""``ImportanceMatrix``: how strongly each column of each matrix is used, in the file format of llama-imatrix."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import CalibrationError, FormatError
from lieq_gguf.records.files import replaced_when_complete
from lieq_gguf.records.spec import ModelSpec

_DAT_CHUNK_SIZE = 512

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs of every matrix.

    Attributes:
        in_sum2: Tensor name to ``[n_in]``, the sum over tokens of the squared input of each column; for experts
            ``[n_experts, n_in]``.
        n_tokens: Tokens summed over.
        chunk_size: Tokens in a calibration sequence.
        dataset: Name of the calibration text.
        counts: Name of a tensor of experts to ``[n_experts]``, the tokens that reached each.
    """

    in_sum2: Mapping[str, FloatArray]
    n_tokens: int
    chunk_size: int
    dataset: str
    counts: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def n_chunks(self) -> int:
        """Calibration sequences."""
        return self.n_tokens // self.chunk_size

    def mean(self, name: str) -> FloatArray | None:
        """Mean squared input of each column ``[n_in]``, what ggml's encoders take; None for a tensor without entry.

        For experts ``[n_experts, n_in]``, over the tokens of each; one that no token has reached gets the mean of all.
        """
        sums = self.in_sum2.get(name)
        if sums is None or name not in self.counts:
            return None if sums is None else sums / np.float32(self.n_tokens)
        counts = self.counts[name]
        means = np.asarray(sums / np.maximum(counts, 1)[:, None], dtype=np.float32)
        means[counts == 0] = sums.sum(axis=0) / np.maximum(counts.sum(), 1)
        return means

    @property
    def n_unseen(self) -> int:
        """Matrices of experts that no token has reached."""
        return sum(int((counts == 0).sum()) for counts in self.counts.values())

    def expert_shares(self, name: str, n_experts: int) -> FloatArray:
        """Share of the tokens that reached each expert ``[n_experts]``; all alike where that is not known."""
        counts = self.counts.get(name, np.ones(n_experts, dtype=np.float32))
        return np.asarray(counts / np.maximum(counts.sum(), 1), dtype=np.float32)

    def digest(self) -> str:
        """A digest of all sums."""
        result = hashlib.sha256(str(self.n_tokens).encode())
        for name in sorted(self.in_sum2):
            result.update(name.encode() + np.ascontiguousarray(self.in_sum2[name]).tobytes())
            if name in self.counts:
                result.update(self.counts[name].tobytes())
        return result.hexdigest()

    def check(self, spec: ModelSpec) -> None:
        """Require an entry of the right width for every matrix of the layers.

        Raises:
            CalibrationError: naming what is missing or of another width.
        """
        matrices = [t for layer in spec.layer_matrices for t in layer]
        missing = [t.name for t in matrices if t.name not in self.in_sum2]
        if missing:
            raise CalibrationError(
                f"the importance matrix lacks {len(missing)} of {len(matrices)} matrices of the model, "
                f"for example {missing[0]}; expected one made from this model"
            )
        for tensor in matrices:
            found, expected = self.in_sum2[tensor.name].shape, tensor.importance_shape
            if found != expected:
                experts = f" of {expected[0]} experts" if tensor.of_experts else ""
                raise CalibrationError(
                    f"the importance matrix has {' x '.join(map(str, found))} columns for {tensor.name}, the model "
                    f"{' x '.join(map(str, expected))}{experts}; expected one made from this model"
                )

    def save(self, target: Path) -> None:
        """Write the GGUF that llama-imatrix writes and llama-quantize reads."""
        with replaced_when_complete(target) as temporary:
            writer = gguf.GGUFWriter(None, "")
            writer.kv_data[0].clear()  # the format has no general.architecture
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", [self.dataset])
            writer.add_uint32("imatrix.chunk_count", self.n_chunks)
            writer.add_uint32("imatrix.chunk_size", self.chunk_size)
            for name in sorted(self.in_sum2):
                sums = self.in_sum2[name].astype(np.float32)
                counts = self.counts.get(name, np.array([self.n_tokens], dtype=np.float32))
                writer.add_tensor(f"{name}.in_sum2", sums.reshape(len(counts), -1))
                writer.add_tensor(f"{name}.counts", counts[:, None].astype(np.float32))
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    @classmethod
    def load(cls, file: Path) -> ImportanceMatrix:
        """Read what llama-imatrix or ``save`` has written, in GGUF or in the older ``.dat`` form.

        Raises:
            FormatError: if the file is no importance matrix, or an entry saw no token.
        """
        try:
            if file.is_file() and not _is_gguf(file):
                return _read_dat(file)
            reader = gguf.GGUFReader(file)
        except FileNotFoundError:
            raise FormatError(f"{file} does not exist; expected an importance matrix") from None
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise FormatError(f"{file} is not an importance matrix in GGUF form ({error})") from None
        kind = reader.get_field("general.type")
        if kind is None or kind.contents() != "imatrix":
            raise FormatError(f"{file} is a GGUF, but not an importance matrix; expected what llama-imatrix writes")
        arrays = {t.name: np.array(t.data, dtype=np.float32).reshape(-1) for t in reader.tensors}
        counts = {n.removesuffix(".counts"): a for n, a in arrays.items() if n.endswith(".counts")}
        sums = {n.removesuffix(".in_sum2"): a for n, a in arrays.items() if n.endswith(".in_sum2")}
        if not sums or sums.keys() != counts.keys():
            raise FormatError(f"{file} is incomplete; expected a pair in_sum2 and counts for every matrix")
        for name, values in sums.items():
            count = counts[name]
            if not (
                np.isfinite(count).all() and (count >= 0).all() and count.max() >= 1 and values.size % count.size == 0
            ):
                raise FormatError(f"{file} has no usable count for {name}; make it again on more text")
            if not np.isfinite(values).all() or (values < 0).any():
                raise FormatError(f"{file} has sums for {name} that are no squares; make it again")
        # llama-imatrix sees every token in every dense matrix; scale the odd entry so that one count serves all.
        of_experts = {name: count for name, count in counts.items() if count.size > 1}
        dense = {name: float(count[0]) for name, count in counts.items() if count.size == 1}
        n_tokens = max(dense.values(), default=1.0)
        scaled = {n: sums[n] if c == n_tokens else sums[n] * np.float32(n_tokens / c) for n, c in dense.items()}
        return cls(
            in_sum2=scaled | {n: sums[n].reshape(c.size, -1) for n, c in of_experts.items()},
            n_tokens=int(n_tokens),
            chunk_size=_value(reader, "imatrix.chunk_size", 512),
            dataset=_dataset(reader),
            counts=of_experts,
        )


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _read_dat(file: Path) -> ImportanceMatrix:
    """The form of llama-imatrix before August 2025: little-endian counts, names, and means times calls.

    An entry's values are ``Σ x² / n_rows · n_calls``, so that over ``n_calls`` they are the means. It does not tell the
    number of tokens; a call is a sequence of 512 unless the user said otherwise.
    """
    content = file.read_bytes()
    place = 0

    def number() -> int:
        nonlocal place
        place += 4
        return int(struct.unpack_from("<i", content, place - 4)[0])

    def text() -> str:
        nonlocal place
        n_bytes = number()
        if not 0 < n_bytes <= len(content) - place:
            raise ValueError(f"a name of {n_bytes} bytes at byte {place}")
        place += n_bytes
        return content[place - n_bytes : place].decode("utf-8")

    try:
        means: dict[str, FloatArray] = {}
        n_entries, most_calls = number(), 0
        if n_entries < 1:
            raise ValueError(f"{n_entries} entries")
        for _ in range(n_entries):
            name, n_calls, n_values = text(), number(), number()
            if n_calls < 1 or n_values < 1:
                raise ValueError(f"{name} with {n_values} values of {n_calls} calls")
            values = np.frombuffer(content, dtype="<f4", count=n_values, offset=place)
            place += values.nbytes
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"{name} with sums that are no squares")
            means[name] = (values / np.float32(n_calls)).astype(np.float32)
            most_calls = max(most_calls, n_calls)
        has_more = place < len(content)
        n_chunks = number() if has_more else most_calls
        dataset = text() if has_more and place < len(content) else "unknown"
    except (struct.error, ValueError) as error:
        why = f"it ends at byte {len(content)}" if isinstance(error, struct.error) else str(error)
        raise FormatError(
            f"{file} is not an importance matrix ({why}); expected what llama-imatrix writes, .gguf or .dat"
        ) from None
    n_tokens = max(1, n_chunks) * _DAT_CHUNK_SIZE
    sums = {name: mean * np.float32(n_tokens) for name, mean in means.items()}
    return ImportanceMatrix(sums, n_tokens, _DAT_CHUNK_SIZE, dataset)


def _value(reader: gguf.GGUFReader, key: str, default: int) -> int:
    field = reader.get_field(key)
    return default if field is None else int(field.contents())


def _dataset(reader: gguf.GGUFReader) -> str:
    field = reader.get_field("imatrix.datasets")
    names = [] if field is None else list(field.contents())
    return str(names[0]) if names else "unknown"

"""The time to decode a weight of each type: a token reads all weights once, and types differ in more than bytes.

The package has a table for each class of processor; ``bench --types`` measures this machine and keeps its table in the
user's data folder, since a cache may be emptied at any time. Speeds predicted from another machine's table are good for
comparing files, but they are no promises.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lieq_gguf.errors import FormatError, OutputError
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.files import SCHEMA_VERSION, read_json, write_json
from lieq_gguf.records.folders import cache_root, data_root
from lieq_gguf.records.spec import TensorSpec

_OWN_FILE = "decode-costs.json"
_ARM_NAMES = ("aarch64", "arm64")


@dataclass(frozen=True)
class DecodeCosts:
    """Time by type, on one machine with one number of threads.

    Attributes:
        machine: The machine and the number of threads.
        source: Origin and date of the figures.
        picoseconds: Type name to 10⁻¹² seconds per weight.
        is_own: Whether it was measured on this machine.
    """

    machine: str
    source: str
    picoseconds: Mapping[str, float]
    is_own: bool = False

    def matrix_seconds(self, tensor: TensorSpec, quant_type: QuantType, is_tied: bool) -> float:
        """Time that a matrix adds to a token: zero if it reads a single row."""
        if tensor.is_looked_up(is_tied):
            return 0.0
        return self._per_weight(quant_type) * tensor.n_weights * tensor.active_share

    def seconds(self, tensors: Sequence[TensorSpec], types: Mapping[str, str]) -> float:
        """Seconds per token.

        Args:
            tensors: All tensors of the model.
            types: Tensor name to type name; matrices that are missing take no time.
        """
        is_tied = all(t.name != "output.weight" for t in tensors)
        matrices = [t for t in tensors if t.is_matrix and t.name in types]
        return sum(self.matrix_seconds(t, QUANT_TYPES[types[t.name]], is_tied) for t in matrices)

    def _per_weight(self, quant_type: QuantType) -> float:
        """Seconds per weight; for a type that was not measured, that of Q8_0 in proportion to the bytes."""
        cost = self.picoseconds.get(quant_type.name)
        if cost is None:
            q8 = QUANT_TYPES["Q8_0"]
            cost = self.picoseconds[q8.name] * quant_type.bits_per_weight / q8.bits_per_weight
        return cost * 1e-12

    def to_json(self) -> dict[str, Any]:
        """The document of a costs file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "decode-costs",
            "machine": self.machine,
            "source": self.source,
            "picoseconds_per_weight": dict(self.picoseconds),
        }

    def save(self) -> Path:
        """Save it as this machine's own table.

        Raises:
            OutputError: if the data folder cannot be created or written.
        """
        target = place_to_save()
        write_json(target, self.to_json())
        return target

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str, is_own: bool) -> DecodeCosts:
        """Read a document of ``to_json``.

        Raises:
            FormatError: if it is not complete.
        """
        try:
            costs = cls(
                machine=str(document["machine"]),
                source=str(document["source"]),
                picoseconds={str(k): float(v) for k, v in document["picoseconds_per_weight"].items()},
                is_own=is_own,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{where} is not a complete table of decode costs ({error}); measure with bench --types"
            ) from None
        if "Q8_0" not in costs.picoseconds or not all(v > 0 for v in costs.picoseconds.values()):
            raise FormatError(f"{where} lacks Q8_0 or has costs that are not positive; measure with bench --types")
        return costs


def place_to_save() -> Path:
    """The file of this machine's own table, in a folder that exists and can be written.

    Raises:
        OutputError: if there is no such folder; before minutes of measuring.
    """
    target = data_root() / _OWN_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write into the folder {target.parent}: {error.strerror}; name another with LIEQ_GGUF_DATA"
        ) from None
    return target


def decode_costs() -> DecodeCosts:
    """This machine's own table if there is one, otherwise the table of its class of processor."""
    own = _own_file()
    if own is not None:
        return DecodeCosts.from_json(read_json(own, "decode-costs"), str(own), is_own=True)
    name = "arm64" if platform.machine().lower() in _ARM_NAMES else "x86-64"
    file = resources.files("lieq_gguf") / "data" / "decode_costs.json"
    return DecodeCosts.from_json(json.loads(file.read_text(encoding="utf-8"))[name], file.name, is_own=False)


def _own_file() -> Path | None:
    """This machine's own table: in the data folder, or in the cache folder, where older versions kept it."""
    places = (data_root() / _OWN_FILE, cache_root() / _OWN_FILE)
    return next((file for file in places if file.is_file()), None)

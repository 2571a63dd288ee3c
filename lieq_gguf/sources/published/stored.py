"""What the formats of published weights have in common: parts of a matrix, codes in 32-bit words, scales of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lieq_gguf.errors import SourceError
from lieq_gguf.sources.weight_files import PLAIN_DTYPES, StoredTensor

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, StoredTensor]
"""The stored tensors of a module by the ends of their names, such as ``weight_scale``."""

_CHUNK_WEIGHTS = 1 << 20  # fit the processor's caches


class WeightFormat(Protocol):
    """How the matrices of a published model are stored. A module is quantised if the files have one of its marks."""

    @property
    def name(self) -> str:
        """Its name in ``config.json``."""

    @property
    def marks(self) -> Sequence[str]:
        """Ends of names that only quantised modules have."""

    @property
    def parts(self) -> Sequence[str]:
        """Ends of the names of all tensors that make up a matrix; some may be missing."""

    def check(self, module: str, parts: Parts, shape: tuple[int, int]) -> None:
        """Require the parts of a matrix ``(n_out, n_in)``, by their headers.

        Raises:
            SourceError: naming what is missing or wrong.
        """

    def decode(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The matrix ``[n_out, n_in]``, in the type that transformers gives it.

        Raises:
            SourceError: if a part holds numbers that cannot be.
        """


def require_part(module: str, parts: Parts, end: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> None:
    """Require a part in one of some types, with one of some shapes.

    Raises:
        SourceError: naming what is missing or wrong.
    """
    if end not in parts:
        beside = next(iter(parts.values()))
        raise SourceError(f"{beside.file} has {beside.name}, but there is no {module}.{end}; download the model again")
    part = parts[end]
    if part.dtype not in dtypes:
        raise SourceError(f"{part.name} in {part.file} is {part.dtype}; expected {', '.join(dtypes)}")
    if part.shape not in shapes:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise SourceError(f"{part.name} in {part.file} has shape {part.shape}; by config.json expected {expected}")


def require_scale(module: str, parts: Parts, end: str, *shapes: tuple[int, ...]) -> None:
    """Require a part that holds ordinary numbers.

    Raises:
        SourceError: naming what is missing or wrong.
    """
    require_part(module, parts, end, PLAIN_DTYPES, *shapes)


def one_of(settings: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any) -> Any:
    """A value of ``quantization_config``.

    Raises:
        SourceError: if it is not allowed; the message begins with the key.
    """
    value = settings.get(key)
    value = default if value is None else value
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise SourceError(f"{key} {value!r}; expected {', '.join(str(choice) for choice in allowed)}")
    return value


def count(settings: Mapping[str, Any], key: str, value: object) -> int:
    """A size that ``quantization_config`` gives under some key.

    Raises:
        SourceError: if it is no positive integer; the message begins with the key.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(f"{key} {settings.get(key)!r}; expected positive integers")
    return value


def unpacked(words: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Codes in 32-bit words ``[n_rows, n_words]``, the lowest bits first, as bytes ``[n_rows, n_codes]``.

    Bits are 2, 4 or 8, so no code lies in two bytes.
    """
    import torch

    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8)
    codes = (words.contiguous().view(torch.uint8)[..., None] >> shifts) & ((1 << n_bits) - 1)
    return codes.flatten(1)


def scaled(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    zeros: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(code - zero) * scale``, in the type of the scales.

    Args:
        codes: ``[n_out, n_in]``.
        scales: ``[n_blocks_out, n_blocks_in]``.
        block: Rows and columns of a block; the last ones may have fewer.
        zeros: As ``scales``, or None for 0.
        groups: Which block of columns each column belongs to ``[n_in]``; None if they are in order.
    """
    import torch

    result: torch.Tensor = codes.contiguous().to(scales.dtype)
    zeros = None if zeros is None else zeros.to(scales.dtype)
    n_out, n_in = codes.shape
    is_even = groups is None and n_in % block[1] == 0
    columns = torch.arange(n_in) // block[1] if groups is None else groups
    step = max(1, _CHUNK_WEIGHTS // n_in)
    for start in range(0, n_out, step):  # some rows at a time, since there can be as many factors as weights
        part = result[start : start + step]
        rows = torch.arange(start, start + len(part)) // block[0]
        part = part.view(len(part), -1, block[1]) if is_even else part
        for grid, change in ((zeros, part.sub_), (scales, part.mul_)):
            if grid is not None:
                change(grid[rows, :, None] if is_even else grid[rows][:, columns])
    return result


def column_groups(module: str, groups: torch.Tensor | None, n_groups: int, group_size: int) -> torch.Tensor | None:
    """The group of every column, or None if columns are in the order of their groups.

    Raises:
        SourceError: if there is no such group.
    """
    import torch

    if groups is None or torch.equal(groups.long(), torch.arange(len(groups)) // group_size):
        return None
    if int(groups.min()) < 0 or int(groups.max()) >= n_groups:
        raise SourceError(
            f"{module} has columns in groups {int(groups.min())} to {int(groups.max())} of {n_groups}; the model is "
            "damaged: download it again"
        )
    return groups

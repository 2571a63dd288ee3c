"""What published files call their tensors, and where in them a matrix of transformers' models is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lieq_gguf.architectures.modules import GatesAndUps

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MTP_PREFIX = "mtp."
SEVERAL_MATRICES = re.compile(r"\.(experts|shared_mlp)\.(gate_up_proj|up_proj|down_proj)(_bias)?\b")
"""In names of tensors that hold several matrices."""

_RENAMED = (  # names in published files, and in transformers' models
    (re.compile(r"\b(backbone|model)\.embeddings\."), r"\1.embed_tokens."),
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight"), ".block_sparse_moe.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight"), ".block_sparse_moe.experts.down_proj"),
    (re.compile(r"\.router\.layer\."), ".router."),
    (re.compile(r"\.shared_mlp\.input_linear\."), ".shared_mlp.gate_up_proj."),
    (re.compile(r"\.shared_mlp\.output_linear\."), ".shared_mlp.down_proj."),
    (re.compile(r"\.experts\.(\d+)\.w1\."), r".experts.\1.gate_proj."),
    (re.compile(r"\.experts\.(\d+)\.w2\."), r".experts.\1.down_proj."),
    (re.compile(r"\.experts\.(\d+)\.w3\."), r".experts.\1.up_proj."),
)
# one tensor for all experts: of their matrices, their biases, or the parts of matrices in MXFP4
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|up_proj|down_proj)(|_bias|_blocks|_scales)")
_FUSED = re.compile(r"(.*\.shared_mlp)\.gate_up_proj\.weight")
_GATE_AND_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: a tensor of a file, a matrix of those stacked in it, or some rows of either.

    Attributes:
        shard: The file.
        stored_name: Name of the tensor in it.
        expert: Index of the matrix, if the tensor has those of all experts.
        rows: The rows, if the tensor has others besides.
        is_transposed: Whether the rows are columns in the file.
    """

    shard: Path
    stored_name: str
    expert: int | None = None
    rows: slice | None = None
    is_transposed: bool = False

    @property
    def is_part(self) -> bool:
        """Whether the file has it as a part of a larger tensor."""
        return self.expert is not None or self.rows is not None

    def shape_in(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor, for that of the stored one."""
        shape = stored if self.expert is None else stored[1:]
        if self.is_transposed:
            shape = shape[::-1]
        return shape if self.rows is None else (len(range(shape[0])[self.rows]), *shape[1:])


def own_name(name: str) -> str:
    """The name in transformers' model of a tensor in a file, but for the prefix."""
    for published, own in _RENAMED:
        name = published.sub(own, name)
    return name


def with_usual_names(places: Mapping[str, Place]) -> tuple[Mapping[str, Place], str]:
    """Names as in a saved ``…ForCausalLM``, and the prefix that the files have in place of ``model.``.

    A base model saved alone has no prefix, the text part of a model of images and text has a longer one.
    """
    if EMBEDDING in places:
        return places, "model."
    ending = EMBEDDING.removeprefix("model.")
    prefixes = [name.removesuffix(ending) for name in places if name.endswith(ending)]
    if len(prefixes) != 1:
        return places, "model."
    [prefix] = prefixes
    usual = {f"model.{name.removeprefix(prefix)}": place for name, place in places.items() if name.startswith(prefix)}
    usual |= {name: place for name, place in places.items() if name.startswith(MTP_PREFIX)}
    head = places.get(f"{prefix.removesuffix('model.')}{HEAD}", places.get(HEAD))
    return usual if head is None else usual | {HEAD: head}, prefix


def with_single_matrices(
    places: Mapping[str, Place], shape_of: Callable[[Place], tuple[int, ...]], gates_and_ups: GatesAndUps
) -> Iterator[tuple[str, Place]]:
    """Replace a tensor of all experts ``[n_experts, …]``, and one of gate and up, by its matrices.

    Args:
        places: Name of a tensor to its place.
        shape_of: Gives the shape of what is at a place.
        gates_and_ups: Where stacked experts have the rows of gates and ups: the ups below the gates, also if they stay
            ``together``, or both in turn, in matrices that are transposed unless they are published quantised.
    """
    for name, place in places.items():
        stacked, fused = _STACKED.fullmatch(name), _FUSED.fullmatch(name)
        if stacked is not None and len(shape_of(place)) > 1:
            experts, module, kind = stacked.groups()
            of_one = replace(place, expert=0, is_transposed=gates_and_ups == "in turn" and not kind)
            n_experts, n_rows = shape_of(place)[0], shape_of(of_one)[0]
            rows = _rows_of(gates_and_ups, n_rows) if module == "gate_up_proj" else {module: None}
            for expert in range(n_experts):
                for part, some in rows.items():
                    part_name = f"{experts}.{expert}.{part}.{kind.removeprefix('_') or 'weight'}"
                    yield part_name, replace(of_one, expert=expert, rows=some)
        elif fused is not None:
            for part, some in _rows_of("halves", shape_of(place)[0]).items():
                yield f"{fused[1]}.{part}.weight", replace(place, rows=some)
        else:
            yield name, place


def _rows_of(gates_and_ups: GatesAndUps, n_rows: int) -> dict[str, slice | None]:
    """Modules of a stacked ``gate_up_proj`` to their rows."""
    if gates_and_ups == "together":
        return {"gate_up_proj": None}
    half = n_rows // 2
    in_turn = gates_and_ups == "in turn"
    slices = (slice(0, None, 2), slice(1, None, 2)) if in_turn else (slice(0, half), slice(half, None))
    return dict(zip(_GATE_AND_UP, slices, strict=True))

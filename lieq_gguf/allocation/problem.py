"""The problem of dividing bits: what is fixed, what can be chosen, and how much of the budget each choice takes.

All bits are integers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lieq_gguf.errors import FormatError
from lieq_gguf.quant_types import DEFAULT_LADDER, Family, QuantType

if TYPE_CHECKING:  # `--help` lists profiles and defaults, and need not wait for more
    from lieq_gguf.allocation.decode_costs import DecodeCosts
    from lieq_gguf.records.bits import BitBudget
    from lieq_gguf.records.scores import LayerScores
    from lieq_gguf.records.spec import ModelSpec, TensorSpec

Granularity = Literal["layer", "tensor"]


@dataclass(frozen=True)
class Pin:
    """Tensors whose type the user has fixed.

    Attributes:
        pattern: Regular expression, searched in tensor names like llama-quantize's ``--tensor-type``.
        quant_type: Their type.
    """

    pattern: str
    quant_type: QuantType

    def matches(self, name: str) -> bool:
        """Whether the pin applies to a tensor."""
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Profile:
    """What a file is made for.

    Attributes:
        summary: What it is for, in one line.
        families: Families of offered types.
        limits_time: Whether a token may take no longer than with K types in a file of the same size.
    """

    summary: str
    families: tuple[Family, ...] = get_args(Family)
    limits_time: bool = False


PROFILES = {
    "cpu": Profile("tokens as fast as from K types in a file of that size", limits_time=True),
    "quality": Profile("any type, however slow"),
    "edge": Profile("K and legacy types only", families=("float", "legacy", "K")),
}


@dataclass(frozen=True)
class AllocationOptions:
    """How to divide the bits.

    Attributes:
        method: A key of ``METHODS``.
        scorer: Layer score that ranks or weights the layers, or None for the method's own.
        granularity: ``layer``: one type per layer; ``tensor``: one type per matrix; None: the method's own.
        types: Offered types; a row never gets a type that does not fit it.
        embedding_type: Type of the token embedding, or None to leave it to the method or the rule.
        output_type: Type of the output matrix, or None to leave it to the method or the rule.
        pins: Types fixed by hand; the first pin that matches a tensor applies.
        profile: A key of ``PROFILES``.
        min_tokens_per_sec: Required speed, instead of the speed of K types.
    """

    method: str = "best"
    scorer: str | None = None
    granularity: Granularity | None = None
    types: tuple[QuantType, ...] = DEFAULT_LADDER
    embedding_type: QuantType | None = None
    output_type: QuantType | None = None
    pins: tuple[Pin, ...] = ()
    profile: str = "cpu"
    min_tokens_per_sec: float | None = None


@dataclass(frozen=True)
class Group:
    """Matrices that share one type.

    Attributes:
        layer: Their layer; None for embedding and output.
        tensors: The matrices.
        choices: Types that fit all of them.
    """

    layer: int | None
    tensors: tuple[TensorSpec, ...]
    choices: tuple[QuantType, ...]

    def cost(self, budget: BitBudget, quant_type: QuantType) -> int:
        """Bits of the budget that the group takes in a type."""
        return sum(budget.cost(quant_type, t) for t in self.tensors)

    def weighted_error(self, scores: LayerScores, quant_type: QuantType) -> float:
        """Relative error of the group in a type, weighted by number of weights."""
        return sum(t.n_weights * scores.type_errors[t.name][quant_type.name] for t in self.tensors)

    def block_error(self, scores: LayerScores, quant_type: QuantType) -> float:
        """How far the relative error of a type moves the layer's output, ``mean ‖h' − h‖² / ‖h‖²``.

        Raises:
            FormatError: if the scores have no block errors.
        """
        missing = [t.name for t in self.tensors if t.name not in scores.sensitivities]
        if missing:
            raise FormatError(
                f"the scores have no block error of {missing[0]}; score again, or use --method lieq-ladder"
            )
        return sum(scores.sensitivities[t.name] * scores.type_errors[t.name][quant_type.name] for t in self.tensors)


@dataclass(frozen=True)
class Problem:
    """The choices and limits of an allocation.

    Attributes:
        spec: The model.
        budget: The target.
        options: The user's options.
        offered_types: Offered types.
        costs: Decoding time of each type; None to ignore speed.
        header_bytes: Bytes before the first tensor of the file.
        error_feedback: Whether the file will be written with error feedback, which leaves less error.
        has_imatrix: Whether it will be made with an importance matrix, which some types need.
        fixed: Types that are not chosen: those fixed by hand or by rule, and those of vectors.
        groups: The choices.
        scorer: Layer score that ranks or weights the layers.
        granularity: Whether a layer or a tensor gets one type.
    """

    spec: ModelSpec
    budget: BitBudget
    options: AllocationOptions
    offered_types: tuple[QuantType, ...]
    costs: DecodeCosts | None
    header_bytes: int
    error_feedback: bool
    has_imatrix: bool
    fixed: Mapping[str, QuantType]
    groups: tuple[Group, ...]
    scorer: str
    granularity: Granularity

    @property
    def has_single_choice(self) -> bool:
        """Whether nothing is left to choose, so that no score is needed."""
        return all(len(g.choices) == 1 for g in self.groups)

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor may get a type with blocks."""
        return any(q.is_quantized for q in (*self.offered_types, *(pin.quant_type for pin in self.options.pins)))

    @property
    def limit(self) -> int:
        """Bits that all groups together may take."""
        return self.budget.limit(self.spec, self.header_bytes) - self.fixed_cost

    @property
    def fixed_cost(self) -> int:
        """Bits of the budget that the fixed tensors take."""
        return sum(self.budget.cost(self.fixed[t.name], t) for t in self.spec.tensors if t.name in self.fixed)

    def amount(self, bits: int) -> float:
        """The total in the budget's unit, if the groups take ``bits``."""
        return self.budget.amount(bits + self.fixed_cost, self.spec, self.header_bytes)

    @property
    def least(self) -> int:
        """Smallest number of bits that the groups can take."""
        return sum(min(g.cost(self.budget, q) for q in g.choices) for g in self.groups)

    def range(self) -> tuple[float, float]:
        """Smallest and largest amount that can be reached."""
        most = sum(max(g.cost(self.budget, q) for q in g.choices) for g in self.groups)
        return self.amount(self.least), self.amount(most)

    @property
    def is_within_range(self) -> bool:
        """Whether the target can be met.

        One above the largest type is a mistake of the user; the factor allows for rounding of the decimal.
        """
        return self.least <= self.limit and self.budget.value <= self.range()[1] * 1.0001

    def types(self, chosen: Sequence[QuantType]) -> dict[str, str]:
        """Type name of every tensor, with one type chosen per group."""
        types = {name: q.name for name, q in self.fixed.items()}
        types |= {t.name: q.name for g, q in zip(self.groups, chosen, strict=True) for t in g.tensors}
        return {t.name: types[t.name] for t in self.spec.tensors}

    def seconds(self, group: Group, quant_type: QuantType) -> float:
        """Time that a group adds to a token."""
        if self.costs is None:
            return 0.0
        is_tied = self.spec.has_tied_embeddings
        return sum(self.costs.matrix_seconds(t, quant_type, is_tied) for t in group.tensors)

    @property
    def layer_bpw_range(self) -> tuple[float, float]:
        """Smallest and largest stored bits per weight of the layers' matrices, whatever the budget counts."""
        matrices = [t for layer in self.spec.layer_matrices for t in layer]
        fixed = sum(self.fixed[t.name].tensor_bytes(t.shape) for t in matrices if t.name in self.fixed)
        free = [
            [sum(q.tensor_bytes(t.shape) for t in g.tensors) for q in g.choices]
            for g in self.groups
            if g.layer is not None
        ]
        least, most = fixed + sum(map(min, free)), fixed + sum(map(max, free))
        return 8 * least / self.spec.n_layer_weights, 8 * most / self.spec.n_layer_weights

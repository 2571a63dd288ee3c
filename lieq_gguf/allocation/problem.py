"""The problem of dividing bits: what is fixed, what can be chosen, and what each choice takes of the budget.

Bits are integers throughout. Types whose blocks do not divide a row are never offered to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lieq_gguf.allocation.decode_costs import DecodeCosts
from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.quant_types import DEFAULT_LADDER, F16, QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec, TensorSpec

_K_OR_LEGACY = re.compile(r"Q\d_[K01]|B?F16|F32")


@dataclass(frozen=True)
class Pin:
    """Tensors whose type the user has fixed.

    Attributes:
        pattern: Regular expression searched in tensor names, as llama-quantize searches its ``--tensor-type``.
        quant_type: Their type.
    """

    pattern: str
    quant_type: QuantType

    def matches(self, name: str) -> bool:
        """Whether a tensor is meant."""
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Allocation:
    """How to divide the bits.

    Attributes:
        method: A key of ``METHODS``.
        scorer: Layer score that ranks or weighs the layers, or None for the method's own.
        granularity: ``layer``: one type in a layer; ``tensor``: one type a matrix; None: what the method is made for.
        types: Types on offer; those that do not fit a row are never given to it.
        embedding_type: Type of the token embedding, or None for the method or the rule.
        output_type: Type of the output matrix, or None for the method or the rule.
        pins: Types fixed by hand; the first that matches a tensor holds.
        profile: ``quality``: any type; ``cpu``: a token takes no longer than with K types in a file of that size;
            ``edge``: K and legacy types only.
        min_tokens_per_sec: Speed to keep to instead of that of K types.
        costs: What decoding takes by type; None to leave speed out of it.
    """

    method: str = "best"
    scorer: str | None = None
    granularity: str | None = None
    types: tuple[QuantType, ...] = DEFAULT_LADDER
    embedding_type: QuantType | None = None
    output_type: QuantType | None = None
    pins: tuple[Pin, ...] = ()
    profile: str = "quality"
    min_tokens_per_sec: float | None = None
    costs: DecodeCosts | None = None


@dataclass(frozen=True)
class Group:
    """Matrices that get one type together.

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
        """How far the layer's output moves, ``mean ‖h' − h‖² / ‖h‖²``, by the relative error of a type.

        Raises:
            FormatError: if the scores have no block errors.
        """
        unknown = [t.name for t in self.tensors if t.name not in scores.sensitivities]
        if unknown:
            raise FormatError(
                f"the scores have no block error of {unknown[0]}; score again, or use --method lieq-ladder"
            )
        return sum(scores.sensitivities[t.name] * scores.type_errors[t.name][quant_type.name] for t in self.tensors)


@dataclass(frozen=True)
class Problem:
    """What there is to choose, and within what limits.

    Attributes:
        spec: The model.
        budget: The target.
        allocation: Method and choices.
        header_bytes: What comes before the first tensor of the file.
        fixed: Types that are no choice: by hand, by rule, or of vectors.
        groups: The choices.
        scorer: Layer score that ranks or weighs the layers.
    """

    spec: ModelSpec
    budget: BitBudget
    allocation: Allocation
    header_bytes: int
    fixed: Mapping[str, QuantType]
    groups: tuple[Group, ...]
    scorer: str

    @property
    def limit(self) -> int:
        """Bits that the groups may take together."""
        return self.budget.limit(self.spec, self.header_bytes) - self.fixed_cost

    @property
    def fixed_cost(self) -> int:
        """Bits of the budget that are taken already."""
        return sum(self.budget.cost(self.fixed[t.name], t) for t in self.spec.tensors if t.name in self.fixed)

    def amount(self, bits: int) -> float:
        """What so many bits in the groups make of the whole, in the budget's unit."""
        return self.budget.amount(bits + self.fixed_cost, self.spec, self.header_bytes)

    @property
    def least(self) -> int:
        """Bits that the groups take at the least."""
        return sum(min(g.cost(self.budget, q) for q in g.choices) for g in self.groups)

    def range(self) -> tuple[float, float]:
        """Least and largest amount that can be reached."""
        most = sum(max(g.cost(self.budget, q) for q in g.choices) for g in self.groups)
        return self.amount(self.least), self.amount(most)

    def types(self, chosen: Sequence[QuantType]) -> dict[str, str]:
        """Type name of every tensor, with one type chosen per group."""
        types = {name: q.name for name, q in self.fixed.items()}
        types |= {t.name: q.name for g, q in zip(self.groups, chosen, strict=True) for t in g.tensors}
        return {t.name: types[t.name] for t in self.spec.tensors}

    def seconds(self, group: Group, quant_type: QuantType) -> float:
        """What a group adds to the time of a token."""
        costs = self.allocation.costs
        return (
            0.0
            if costs is None
            else sum(costs.matrix_seconds(t, quant_type, self.spec.has_tied_embeddings) for t in group.tensors)
        )


def offered_types(types: Sequence[QuantType], has_imatrix: bool, profile: str = "quality") -> tuple[QuantType, ...]:
    """The types that can be made: those that need an importance matrix only if there is one, for ``edge`` K and legacy.

    Raises:
        BudgetError: if none is left.
    """
    wanted = tuple(t for t in types if profile != "edge" or _K_OR_LEGACY.fullmatch(t.name))
    names = ", ".join(t.name for t in types)
    if not wanted:
        raise BudgetError(f"--profile edge has K and legacy types only, asked for are {names}; add a K type")
    left = tuple(t for t in wanted if has_imatrix or not t.needs_imatrix)
    if not left:
        raise BudgetError(f"all types asked for ({names}) need an importance matrix; drop --no-imatrix or add a K type")
    return left


def pose(
    spec: ModelSpec,
    budget: BitBudget,
    allocation: Allocation,
    header_bytes: int,
    *,
    scorer: str,
    by_layer: bool,
    weighs_outer: bool,
) -> Problem:
    """What is fixed, and the groups of the rest with the types that fit.

    Args:
        spec: The model.
        budget: The target.
        allocation: The user's choices.
        header_bytes: What comes before the first tensor of the file.
        scorer: Layer score that ranks or weighs the layers.
        by_layer: Whether the matrices of a layer get one type together.
        weighs_outer: Whether embedding and output are a choice where the file is the target.

    Raises:
        BudgetError: if no type fits one of them, or a type asked for does not fit.
    """
    fixed = {t.name: QUANT_TYPES[t.fixed_type] for t in spec.tensors if not t.is_matrix}
    fixed |= _pinned(spec, allocation.pins)
    groups = []
    for tensor in spec.other_matrices:
        asked = _asked_outer_type(tensor, spec, allocation)
        if tensor.name in fixed:
            if asked not in (None, fixed[tensor.name]):
                raise BudgetError(
                    f"{tensor.name} is pinned to {fixed[tensor.name].name} and asked to be {asked and asked.name}; "
                    "leave out one of the two"
                )
            continue
        if asked is not None:
            fixed[tensor.name] = asked
        elif budget.covers_file and weighs_outer:
            groups.append(Group(None, (tensor,), _choices((tensor,), allocation)))
        else:
            fixed[tensor.name] = _outer_type_by_rule(tensor, spec, budget, allocation)
    for layer, matrices in enumerate(spec.layer_matrices):
        free = tuple(t for t in matrices if t.name not in fixed)
        parts = ([free] if free else []) if by_layer else [(t,) for t in free]
        groups += [Group(layer, tensors, _choices(tensors, allocation)) for tensors in parts]
    return Problem(spec, budget, allocation, header_bytes, fixed, tuple(groups), scorer)


def _choices(tensors: Sequence[TensorSpec], allocation: Allocation) -> tuple[QuantType, ...]:
    """The types that fit all of some matrices; no embedding or output has an importance matrix."""
    is_outer = tensors[0].layer is None
    fitting = tuple(q for q in allocation.types if all(q.fits(t.shape[-1]) for t in tensors))
    choices = tuple(q for q in fitting if not (is_outer and q.needs_imatrix))
    if not choices:
        widths = ", ".join(str(n) for n in sorted({t.shape[-1] for t in tensors}))
        names = ", ".join(q.name for q in allocation.types)
        where = tensors[0].name if is_outer else f"layer {tensors[0].layer}"
        if fitting:
            raise BudgetError(
                f"all of the types {names} need an importance matrix, which no embedding has; "
                f"name a type for {where} with {'--output-type' if where == 'output.weight' else '--embedding-type'}"
            )
        raise BudgetError(
            f"none of the types {names} fits rows of {widths} weights in {where}; "
            "allow types with blocks of 32, for example --types Q4_0,IQ4_NL,Q5_0,Q8_0"
        )
    return choices


def _pinned(spec: ModelSpec, pins: Sequence[Pin]) -> dict[str, QuantType]:
    """Types fixed by hand.

    Raises:
        BudgetError: if a pin matches no matrix, or its type does not fit one.
    """
    fixed = {}
    matrices = [t for t in spec.tensors if t.is_matrix]
    for pin in pins:
        if not any(pin.matches(t.name) for t in matrices):
            raise BudgetError(f"--pin '{pin.pattern}' matches no matrix; their names are like {matrices[-1].name}")
    for tensor in matrices:
        pin_used = next((pin for pin in pins if pin.matches(tensor.name)), None)
        if pin_used is not None:
            _check_fit(tensor, pin_used.quant_type)
            fixed[tensor.name] = pin_used.quant_type
    return fixed


def _check_fit(tensor: TensorSpec, quant_type: QuantType) -> None:
    """Require that a tensor can have a type."""
    why = None
    if not quant_type.fits(tensor.shape[-1]):
        why = "does not fit its rows"
    elif quant_type.needs_imatrix and tensor.layer is None:
        why = "needs an importance matrix, which no embedding has"
    if why is not None:
        raise BudgetError(f"{tensor.name} of shape {tensor.shape} cannot be {quant_type.name}: it {why}")


def _asked_outer_type(tensor: TensorSpec, spec: ModelSpec, allocation: Allocation) -> QuantType | None:
    """Type of the embedding or the output matrix that was asked for."""
    is_output = tensor.name == "output.weight" or spec.has_tied_embeddings
    asked = allocation.output_type if is_output else allocation.embedding_type
    if spec.has_tied_embeddings and allocation.embedding_type is not None:
        if asked not in (None, allocation.embedding_type):
            raise BudgetError(
                f"embedding and output of {spec.name} are one matrix, which cannot be both "
                f"{allocation.embedding_type.name} and {allocation.output_type and allocation.output_type.name}"
            )
        asked = allocation.embedding_type
    if asked is not None:
        _check_fit(tensor, asked)
    return asked


def _outer_type_by_rule(tensor: TensorSpec, spec: ModelSpec, budget: BitBudget, allocation: Allocation) -> QuantType:
    """As good as llama-quantize's at this budget: the output at least Q6_K, the embedding at least the target."""
    if not any(q.is_quantized for q in allocation.types):
        return max(allocation.types, key=lambda q: q.bits_per_weight)
    is_output = tensor.name == "output.weight" or spec.has_tied_embeddings
    ladder = ("Q6_K", "Q8_0", "F16") if is_output else ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
    fitting = [QUANT_TYPES[n] for n in ladder if QUANT_TYPES[n].fits(tensor.shape[-1])]
    least = 8 * budget.value / spec.n_weights if budget.kind == "size" else budget.value
    return next((q for q in fitting if q.bits_per_weight >= least), F16)

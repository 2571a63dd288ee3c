"""One type for every tensor, so that the average meets the budget and never exceeds it.

The full ladder is an exact problem (a multiple-choice knapsack, solved by HiGHS to a gap of 1e-5): choose one type per
group so that the sum of weight × error is least and the sum of bits stays within the budget. The papers' rule, two
widths in the order of a layer score, is kept beside it as methods of their own. Bits are integers throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.native_output import silenced_native_stdout
from lieq_gguf.quant_types import DEFAULT_LADDER, F16, F32, QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec, TensorSpec

_SOLVER_GAP = 1e-5
_SOLVER_SECONDS = 60.0
_WIDTH_PAIRS = ((1, 2), (2, 4), (4, 8), (8, 16))


@dataclass(frozen=True)
class Allocation:
    """How to divide the bits.

    Attributes:
        method: A key of ``METHODS``.
        scorer: Layer score that ranks or weighs the layers, or None for the method's own.
        granularity: ``layer``: one type in a layer; ``tensor``: one type a matrix; None: what the method is made for.
        types: Types on offer; those that do not fit a row are never given to it.
        embedding_type: Type of the token embedding, or None for the rule.
        output_type: Type of the output matrix, or None for the rule.
    """

    method: str = "best"
    scorer: str | None = None
    granularity: str | None = None
    types: tuple[QuantType, ...] = DEFAULT_LADDER
    embedding_type: QuantType | None = None
    output_type: QuantType | None = None

    @property
    def scorer_used(self) -> str:
        """Name of the layer score."""
        return self.scorer or METHODS[self.method].scorer

    @property
    def by_layer(self) -> bool:
        """Whether the matrices of a layer get one type together."""
        return (self.granularity or METHODS[self.method].granularity) == "layer"


@dataclass(frozen=True)
class Group:
    """Matrices that get one type together.

    Attributes:
        layer: Their layer.
        tensors: The matrices.
        choices: Types that fit all of them.
    """

    layer: int
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


Error = Callable[[Group, LayerScores, QuantType], float]


def offered_types(types: Sequence[QuantType], has_imatrix: bool) -> tuple[QuantType, ...]:
    """The types that can be made: those that need an importance matrix only if there is one.

    Raises:
        BudgetError: if none is left.
    """
    left = tuple(t for t in types if has_imatrix or not t.needs_imatrix)
    if not left:
        names = ", ".join(t.name for t in types)
        raise BudgetError(f"all types asked for ({names}) need an importance matrix; drop --no-imatrix or add a K type")
    return left


def make_groups(spec: ModelSpec, allocation: Allocation) -> tuple[Group, ...]:
    """The groups of the problem, each with the types that fit it.

    Raises:
        BudgetError: if no type fits one of them.
    """
    groups = []
    for layer, matrices in enumerate(spec.layer_matrices):
        parts = [matrices] if allocation.by_layer else [(t,) for t in matrices]
        for tensors in parts:
            choices = tuple(q for q in allocation.types if all(q.fits(t.shape[1]) for t in tensors))
            if not choices:
                widths = ", ".join(str(n) for n in sorted({t.shape[1] for t in tensors}))
                names = ", ".join(q.name for q in allocation.types)
                raise BudgetError(
                    f"none of the types {names} fits rows of {widths} weights in layer {layer}; "
                    "allow types with blocks of 32, for example --types Q4_0,IQ4_NL,Q5_0,Q8_0"
                )
            groups.append(Group(layer, tensors, choices))
    return tuple(groups)


def check_reachable(spec: ModelSpec, budget: BitBudget, allocation: Allocation) -> tuple[float, float]:
    """The least and largest average in stored bits that the types reach, and whether the target can be met at all.

    Headers are enough to know, so this comes before any work.

    Raises:
        BudgetError: if the target is outside, with the range and what would widen it; if the method has no two
            widths for it; or if the embedding or output cannot have the type asked for.
    """
    groups = make_groups(spec, allocation)
    low, high = _range(groups, budget, spec)
    # A target above the largest type is a mistake, not a wish for a smaller file; allow for rounding of the decimal.
    if low * spec.n_layer_weights > budget.limit(spec) or budget.value > high * 1.0001:
        raise BudgetError(
            f"{budget} is out of reach: {spec.name} can have {low:.4f} to {high:.4f} bits per weight; "
            f"{_advice(groups, budget, low, allocation)}"
        )
    METHODS[allocation.method].check(groups, budget, budget.limit(spec))
    for tensor in spec.other_matrices:
        _outer_type(tensor, spec, budget, allocation)
    return _range(groups, BitBudget("bits", budget.value), spec)


def _range(groups: Sequence[Group], budget: BitBudget, spec: ModelSpec) -> tuple[float, float]:
    """Least and largest average of the groups, in the budget's own bits."""
    least = sum(min(g.cost(budget, q) for q in g.choices) for g in groups)
    most = sum(max(g.cost(budget, q) for q in g.choices) for g in groups)
    return least / spec.n_layer_weights, most / spec.n_layer_weights


def is_decided(spec: ModelSpec, allocation: Allocation) -> bool:
    """Whether the types on offer leave no choice, so that no score is needed."""
    return all(len(g.choices) == 1 for g in make_groups(spec, allocation))


def allocate(spec: ModelSpec, budget: BitBudget, scores: LayerScores | None, allocation: Allocation) -> QuantPlan:
    """Give every tensor a type.

    Args:
        spec: The model.
        budget: The target; met from below.
        scores: Layer scores and type errors of this model; None if the types leave no choice.
        allocation: Method and choices.

    Raises:
        BudgetError: if the target is out of reach.
        FormatError: if the scores lack a type or the scorer.
    """
    reachable = check_reachable(spec, budget, allocation)
    groups = make_groups(spec, allocation)
    if scores is None:
        chosen = tuple(g.choices[0] for g in groups)
    else:
        _check_scores(scores, groups, allocation.scorer_used)
        chosen = METHODS[allocation.method].solve(groups, budget, budget.limit(spec), scores, allocation.scorer_used)
    types = {t.name: F32.name for t in spec.tensors}
    types |= {t.name: q.name for g, q in zip(groups, chosen, strict=True) for t in g.tensors}
    types |= {t.name: _outer_type(t, spec, budget, allocation).name for t in spec.other_matrices}
    return QuantPlan(
        model=spec.name,
        method=allocation.method,
        scorer=allocation.scorer_used if scores is not None else "none",
        budget=budget,
        reachable_bpw=reachable,
        types=types,
        layer_scores=tuple(scores.by_scorer[allocation.scorer_used]) if scores is not None else (),
    )


def two_levels(
    groups: Sequence[Group], budget: BitBudget, limit: int, scores: LayerScores, scorer: str
) -> tuple[QuantType, ...]:
    """The paper's rule: the ``m`` highest-scored layers at the high width, the others at half of it.

    ``m`` is as large as fits. Several llama.cpp types have the same width; of all pairs of the two widths that come
    within 1 % of the budget, the one with the least weighted error is taken.

    Source: LieQ, arXiv 2508.03332v2, allocation; order and move as in arXiv 2406.17415.
    """
    order = sorted(range(len(groups)), key=lambda i: (-scores.by_scorer[scorer][groups[i].layer], i))

    def assign(low: QuantType, high: QuantType) -> tuple[QuantType, ...]:
        left = limit - sum(g.cost(budget, low) for g in groups)
        result = [low] * len(groups)
        for i in order:
            left -= groups[i].cost(budget, high) - groups[i].cost(budget, low)
            if left < 0:
                break
            result[i] = high
        return tuple(result)

    def order_of_merit(plan: tuple[QuantType, ...]) -> tuple[bool, float]:
        used = sum(g.cost(budget, q) for g, q in zip(groups, plan, strict=True))
        return used < 0.99 * limit, sum(g.weighted_error(scores, q) for g, q in zip(groups, plan, strict=True))

    return min((assign(*pair) for pair in _level_pairs(groups, budget, limit)), key=order_of_merit)


def _level_pairs(groups: Sequence[Group], budget: BitBudget, limit: int) -> list[tuple[QuantType, QuantType]]:
    """Types of a width and of its double that fit every group, the low one within the budget; or the user's own two."""
    common = [q for q in groups[0].choices if all(q in g.choices for g in groups)]
    pairs = [
        (low, high)
        for low, high in product(common, common)
        if low.bits_per_weight < high.bits_per_weight
        and ((low.nominal_bits, high.nominal_bits) in _WIDTH_PAIRS or len(common) == 2)
        and sum(g.cost(budget, low) for g in groups) <= limit
    ]
    if not pairs:
        raise BudgetError(
            f"{budget} cannot be met with two widths of one type per layer; types that fit all layers: "
            f"{', '.join(q.name for q in common) or 'none'}; use --method best or name two with --types LOW,HIGH"
        )
    return pairs


def full_ladder(
    groups: Sequence[Group],
    budget: BitBudget,
    limit: int,
    scores: LayerScores,
    scorer: str,
    *,
    error: Error = Group.weighted_error,
    has_weights: bool = True,
) -> tuple[QuantType, ...]:
    """The best choice of one type per group for ``Σ weight · error``, by mixed-integer programming.

    The weight of a layer is one plus its score, scaled to [0, 1] over the model: the score tips the balance between
    layers but cannot outvote the measured error. Without ``has_weights`` it is one.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    weights = _layer_weights(scores.by_scorer[scorer]) if has_weights else [1.0] * scores.n_layers
    choices = [(i, q) for i, g in enumerate(groups) for q in _undominated(g, budget, scores, error)]
    costs = np.array([groups[i].cost(budget, q) for i, q in choices], dtype=np.int64)
    damage = np.array([weights[groups[i].layer] * error(groups[i], scores, q) for i, q in choices])
    damage = damage / max(damage.max(), 1e-30)
    unit = int(np.gcd.reduce(costs))
    members = csr_array(
        (np.ones(len(choices)), ([i for i, _ in choices], range(len(choices)))), shape=(len(groups), len(choices))
    )
    with silenced_native_stdout():  # HiGHS prints now and then, even when told to be silent
        solution = milp(
            damage,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(members, 1, 1),
                LinearConstraint((costs // unit)[None, :].astype(float), -np.inf, limit // unit),
            ],
            options={"mip_rel_gap": _SOLVER_GAP, "time_limit": _SOLVER_SECONDS},
        )
    if solution.x is None:
        raise BudgetError(f"no allocation found for {budget}: {solution.message}")
    chosen = [(i, q) for (i, q), x in zip(choices, solution.x, strict=True) if x > 0.5]
    if [i for i, _ in chosen] != list(range(len(groups))) or sum(groups[i].cost(budget, q) for i, q in chosen) > limit:
        raise BudgetError(f"the solver left {budget} unmet: {solution.message}")
    return tuple(q for _, q in chosen)


def _undominated(group: Group, budget: BitBudget, scores: LayerScores, error: Error) -> list[QuantType]:
    """The types of a group that no other beats in both bits and error; of equals, the first in the ladder."""
    order = sorted(group.choices, key=lambda q: (group.cost(budget, q), error(group, scores, q)))
    best: list[QuantType] = []
    for quant_type in order:
        if not best or error(group, scores, quant_type) < error(group, scores, best[-1]):
            best.append(quant_type)
    return best


@dataclass(frozen=True)
class Method:
    """A named way to divide bits.

    Attributes:
        solve: From groups, budget, its limit in bits, scores and scorer to one type a group.
        granularity: Groups it is made for.
        scorer: Layer score it is made for. For ``best`` the one that won on the table in docs/experiments.md.
        check: From groups, budget and limit; raises BudgetError if there is no solution.
    """

    solve: Callable[[Sequence[Group], BitBudget, int, LayerScores, str], tuple[QuantType, ...]]
    granularity: str
    scorer: str
    check: Callable[[Sequence[Group], BitBudget, int], object] = lambda _groups, _budget, _limit: None


METHODS = {
    "best": Method(partial(full_ladder, error=Group.block_error), "tensor", "energy-gain"),
    "block-error": Method(partial(full_ladder, error=Group.block_error, has_weights=False), "tensor", "block-error"),
    "lieq-ladder": Method(full_ladder, "layer", "lieq"),
    "lieq": Method(two_levels, "layer", "lieq", _level_pairs),
    "lim": Method(two_levels, "layer", "lim", _level_pairs),
    "zd": Method(two_levels, "layer", "zd", _level_pairs),
}


def _advice(groups: Sequence[Group], budget: BitBudget, low: float, allocation: Allocation) -> str:
    """What would widen the range towards a target outside of it."""
    widths = sorted({t.shape[1] for g in groups for t in g.tensors if t.shape[1] % 256})
    if budget.value < low and widths:
        rows = " and ".join(str(w) for w in widths)
        advice = f"rows of {rows} weights do not fit the 256-weight blocks of the smaller types"
        if allocation.by_layer:
            return f"{advice}; --granularity tensor uses those where they fit"
        small = [q for q in QUANT_TYPES.values() if 1 < q.block_size < 256 and q not in allocation.types]
        return f"{advice}; --types can allow others, such as {small[0].name}" if small else advice

    def bits(quant_type: QuantType) -> float:
        return quant_type.nominal_bits if budget.kind == "nominal" else quant_type.bits_per_weight

    others = sorted((q for q in QUANT_TYPES.values() if q not in allocation.types), key=bits)
    size = "smaller" if budget.value < low else "larger"
    if size == "smaller":
        nearest = [q for q in reversed(others) if bits(q) <= budget.value]
    else:
        nearest = [q for q in others if bits(q) >= budget.value]
    if not nearest:
        return "choose a target inside this range"
    return f"{size} types can be allowed with --types, for example {nearest[0].name}"


def _check_scores(scores: LayerScores, groups: Sequence[Group], scorer: str) -> None:
    if scorer not in scores.by_scorer:
        raise FormatError(f"the scores have no '{scorer}'; they have {', '.join(scores.by_scorer)}")
    for group in groups:
        for tensor in group.tensors:
            missing = [q.name for q in group.choices if q.name not in scores.type_errors[tensor.name]]
            if missing:
                kept = [*scores.type_errors[tensor.name], *missing]
                raise FormatError(
                    f"the scores have no errors for {missing[0]}; score again with --types {','.join(kept)}, "
                    "or leave those types out here"
                )


def _layer_weights(layer_scores: Sequence[float]) -> list[float]:
    low, high = min(layer_scores), max(layer_scores)
    return [1.0 + ((s - low) / (high - low) if high > low else 0.0) for s in layer_scores]


def _outer_type(tensor: TensorSpec, spec: ModelSpec, budget: BitBudget, allocation: Allocation) -> QuantType:
    """Type of the embedding or the output matrix: as asked for, or as good as llama-quantize's at this budget."""
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
        if not asked.fits(tensor.shape[1]) or asked.needs_imatrix:
            why = (
                "needs an importance matrix, which no embedding has" if asked.needs_imatrix else "does not fit its rows"
            )
            raise BudgetError(f"{tensor.name} of shape {tensor.shape} cannot be {asked.name}: it {why}")
        return asked
    if not any(q.is_quantized for q in allocation.types):
        return max(allocation.types, key=lambda q: q.bits_per_weight)
    ladder = ("Q6_K", "Q8_0", "F16") if is_output else ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
    fitting = [QUANT_TYPES[n] for n in ladder if QUANT_TYPES[n].fits(tensor.shape[1])]
    return next((q for q in fitting if q.bits_per_weight >= budget.value), F16)

"""One type for every tensor, so that the target is met and never exceeded.

The full ladder is an exact problem (a multiple-choice knapsack): choose one type per group so that the sum of weight ×
error is least and the sum of bits stays within the budget, and the time to decode a token within what the profile
allows. The papers' rule, two widths in the order of a layer score, is kept beside it as methods of their own. Bits are
integers throughout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from lieq_gguf.decode_costs import DecodeCosts
from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.knapsack import Option, solve
from lieq_gguf.quant_types import DEFAULT_LADDER, F16, F32, QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec, TensorSpec

PROFILES = ("cpu", "quality", "edge")
_WIDTH_PAIRS = ((1, 2), (2, 4), (4, 8), (8, 16))
_TIME_SLACK = 1.05  # where no K-type file is small enough, the fastest file that is may be slowed down by this much


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


Error = Callable[[Group, LayerScores, QuantType], float]


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
    """

    spec: ModelSpec
    budget: BitBudget
    allocation: Allocation
    header_bytes: int
    fixed: Mapping[str, QuantType]
    groups: tuple[Group, ...]

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

    def range(self) -> tuple[float, float]:
        """Least and largest amount that can be reached."""
        least = sum(min(g.cost(self.budget, q) for q in g.choices) for g in self.groups)
        most = sum(max(g.cost(self.budget, q) for q in g.choices) for g in self.groups)
        return self.amount(least), self.amount(most)

    def types(self, chosen: Sequence[QuantType]) -> dict[str, str]:
        """Type name of every tensor, with one type chosen per group."""
        types = {name: q.name for name, q in self.fixed.items()}
        types |= {t.name: q.name for g, q in zip(self.groups, chosen, strict=True) for t in g.tensors}
        return {t.name: types[t.name] for t in self.spec.tensors}

    def seconds(self, group: Group, quant_type: QuantType) -> float:
        """What a group adds to the time of a token."""
        costs = self.allocation.costs
        return 0.0 if costs is None else sum(costs.matrix_seconds(self.spec, t, quant_type) for t in group.tensors)


def offered_types(types: Sequence[QuantType], has_imatrix: bool, profile: str = "quality") -> tuple[QuantType, ...]:
    """The types that can be made: those that need an importance matrix only if there is one, for ``edge`` no IQ types.

    Raises:
        BudgetError: if none is left.
    """
    wanted = tuple(t for t in types if profile != "edge" or not t.name.startswith("IQ"))
    names = ", ".join(t.name for t in types)
    if not wanted:
        raise BudgetError(f"--profile edge has K and legacy types only, asked for are {names}; add a K type")
    left = tuple(t for t in wanted if has_imatrix or not t.needs_imatrix)
    if not left:
        raise BudgetError(f"all types asked for ({names}) need an importance matrix; drop --no-imatrix or add a K type")
    return left


def make_problem(spec: ModelSpec, budget: BitBudget, allocation: Allocation, header_bytes: int = 0) -> Problem:
    """What is fixed, and the groups of the rest with the types that fit.

    Raises:
        BudgetError: if no type fits one of them, or a type asked for does not fit.
    """
    fixed = {t.name: F32 for t in spec.tensors if not t.is_matrix} | _pinned(spec, allocation.pins)
    groups = []
    for tensor in spec.other_matrices:
        asked = _asked_outer_type(tensor, spec, allocation)
        if tensor.name in fixed:
            continue
        if asked is not None:
            fixed[tensor.name] = asked
        elif budget.covers_file and METHODS[allocation.method].weighs_outer:
            groups.append(Group(None, (tensor,), _choices((tensor,), allocation)))
        else:
            fixed[tensor.name] = _outer_type_by_rule(tensor, spec, budget, allocation)
    for layer, matrices in enumerate(spec.layer_matrices):
        free = tuple(t for t in matrices if t.name not in fixed)
        parts = ([free] if free else []) if allocation.by_layer else [(t,) for t in free]
        groups += [Group(layer, tensors, _choices(tensors, allocation)) for tensors in parts]
    return Problem(spec, budget, allocation, header_bytes, fixed, tuple(groups))


def _choices(tensors: Sequence[TensorSpec], allocation: Allocation) -> tuple[QuantType, ...]:
    """The types that fit all of some matrices; no embedding or output has an importance matrix."""
    is_outer = tensors[0].layer is None
    fitting = tuple(q for q in allocation.types if all(q.fits(t.shape[1]) for t in tensors))
    choices = tuple(q for q in fitting if not (is_outer and q.needs_imatrix))
    if not choices:
        widths = ", ".join(str(n) for n in sorted({t.shape[1] for t in tensors}))
        names = ", ".join(q.name for q in allocation.types)
        where = tensors[0].name if is_outer else f"layer {tensors[0].layer}"
        if fitting:
            raise BudgetError(
                f"all of the types {names} need an importance matrix, which no embedding has; "
                f"name a type for {where} with --embedding-type"
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
    if not quant_type.fits(tensor.shape[1]):
        why = "does not fit its rows"
    elif quant_type.needs_imatrix and tensor.layer is None:
        why = "needs an importance matrix, which no embedding has"
    if why is not None:
        raise BudgetError(f"{tensor.name} of shape {tensor.shape} cannot be {quant_type.name}: it {why}")


def check_reachable(
    spec: ModelSpec, budget: BitBudget, allocation: Allocation, header_bytes: int = 0
) -> tuple[float, float]:
    """The least and largest average in stored bits that the types reach, and whether the target can be met at all.

    Headers are enough to know, so this comes before any work.

    Raises:
        BudgetError: if the target is outside, with the range and what would widen it; if the method has no two
            widths for it; or if a tensor cannot have the type asked for.
    """
    problem = make_problem(spec, budget, allocation, header_bytes)
    low, high = problem.range()
    least = sum(min(g.cost(budget, q) for q in g.choices) for g in problem.groups)
    # A target above the largest type is a mistake, not a wish for a smaller file; allow for rounding of the decimal.
    if least > problem.limit or budget.value > high * 1.0001:
        raise BudgetError(
            f"{budget} is out of reach: {spec.name} can have {_shown_range(budget, low, high)}; {_advice(problem, low)}"
        )
    METHODS[allocation.method].check(problem)
    if problem.groups:
        check_speed(problem)
    return make_problem(spec, BitBudget("bits", 1.0), allocation).range()


def check_speed(problem: Problem) -> None:
    """Refuse a speed that no choice of types has.

    Raises:
        BudgetError: naming the speed that can be had.
    """
    wanted, costs = problem.allocation.min_tokens_per_sec, problem.allocation.costs
    if wanted is None or costs is None:
        return
    if not METHODS[problem.allocation.method].minds_speed:
        raise BudgetError(f"--method {problem.allocation.method} takes no account of speed; leave --min-tokens-per-sec")
    fastest = _seconds(problem, _fastest(problem))
    if fastest > 1 / wanted:
        raise BudgetError(
            f"--min-tokens-per-sec {wanted:g} is out of reach with {problem.budget}: {problem.spec.name} can have "
            f"{1 / fastest:.1f} tokens/s ({costs.machine}); a smaller budget is faster"
        )


def is_decided(spec: ModelSpec, allocation: Allocation, budget: BitBudget) -> bool:
    """Whether the types on offer leave no choice, so that no score is needed."""
    return all(len(g.choices) == 1 for g in make_problem(spec, budget, allocation).groups)


def allocate(
    spec: ModelSpec, budget: BitBudget, scores: LayerScores | None, allocation: Allocation, header_bytes: int = 0
) -> QuantPlan:
    """Give every tensor a type.

    Args:
        spec: The model.
        budget: The target; met from below.
        scores: Layer scores and type errors of this model; None if the types leave no choice.
        allocation: Method and choices.
        header_bytes: What comes before the first tensor of the file.

    Raises:
        BudgetError: if the target is out of reach.
        FormatError: if the scores lack a type or the scorer.
    """
    reachable = check_reachable(spec, budget, allocation, header_bytes)
    problem = make_problem(spec, budget, allocation, header_bytes)
    if scores is None:
        chosen = tuple(g.choices[0] for g in problem.groups)
    else:
        _check_scores(scores, problem.groups, allocation.scorer_used)
        chosen = METHODS[allocation.method].solve(problem, scores)
    types = problem.types(chosen)
    return QuantPlan(
        model=spec.name,
        method=allocation.method,
        scorer=allocation.scorer_used if scores is not None else "none",
        budget=budget,
        reachable_bpw=reachable,
        types=types,
        layer_scores=tuple(scores.by_scorer[allocation.scorer_used]) if scores is not None else (),
        profile=allocation.profile,
        expected_kld=None if scores is None else expected_kld(spec, types, scores),
    )


def expected_kld(spec: ModelSpec, types: Mapping[str, str], scores: LayerScores) -> float | None:
    """Divergence of the logits in nats: what the block errors of all matrices come to; None if they are not known."""
    matrices = [t.name for t in spec.tensors if t.is_matrix]
    known = all(types[n] in scores.type_errors.get(n, {}) and n in scores.sensitivities for n in matrices)
    if scores.kld_per_block_error is None or not known:
        return None
    total = sum(scores.sensitivities[name] * scores.type_errors[name][types[name]] for name in matrices)
    return scores.kld_per_block_error * total


def two_levels(problem: Problem, scores: LayerScores) -> tuple[QuantType, ...]:
    """The paper's rule: the ``m`` highest-scored layers at the high width, the others at half of it.

    ``m`` is as large as fits. Several llama.cpp types have the same width; of all pairs of the two widths that come
    within 1 % of the budget, the one with the least weighted error is taken.

    Source: LieQ, arXiv 2508.03332v2, allocation; order and move as in arXiv 2406.17415.
    """
    groups, budget, limit = problem.groups, problem.budget, problem.limit
    layer_scores = scores.by_scorer[problem.allocation.scorer_used]
    order = sorted(range(len(groups)), key=lambda i: (-layer_scores[groups[i].layer or 0], i))

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

    return min((assign(*pair) for pair in _level_pairs(problem)), key=order_of_merit)


def _level_pairs(problem: Problem) -> list[tuple[QuantType, QuantType]]:
    """Types of a width and of its double that fit every group, the low one within the budget; or the user's own two."""
    groups, budget = problem.groups, problem.budget
    if not groups:
        return []
    common = [q for q in groups[0].choices if all(q in g.choices for g in groups)]
    pairs = [
        (low, high)
        for low, high in product(common, common)
        if low.bits_per_weight < high.bits_per_weight
        and ((low.nominal_bits, high.nominal_bits) in _WIDTH_PAIRS or len(common) == 2)
        and sum(g.cost(budget, low) for g in groups) <= problem.limit
    ]
    if not pairs:
        raise BudgetError(
            f"{budget} cannot be met with two widths of one type per layer; types that fit all layers: "
            f"{', '.join(q.name for q in common) or 'none'}; use --method best or name two with --types LOW,HIGH"
        )
    return pairs


def full_ladder(
    problem: Problem, scores: LayerScores, *, error: Error = Group.weighted_error, has_weights: bool = True
) -> tuple[QuantType, ...]:
    """The best choice of one type per group for ``Σ weight · error``, within size and time.

    The weight of a layer is one plus its score, scaled to [0, 1] over the model: the score tips the balance between
    layers but cannot outvote the measured error. Without ``has_weights`` it is one. Embedding and output weigh as much
    as a layer does in the mean.
    """
    weights = _layer_weights(scores.by_scorer[problem.allocation.scorer_used]) if has_weights else [1.0]
    mean = sum(weights) / len(weights)

    def damage(group: Group, quant_type: QuantType) -> float:
        weight = weights[group.layer] if has_weights and group.layer is not None else mean
        return weight * error(group, scores, quant_type)

    options = _options(problem, damage)
    chosen = solve(options, problem.limit, _seconds_allowed(problem))
    return tuple(g.choices[k] for g, k in zip(problem.groups, chosen, strict=True))


def _options(problem: Problem, damage: Callable[[Group, QuantType], float]) -> list[list[Option]]:
    return [
        [Option(damage(g, q), g.cost(problem.budget, q), problem.seconds(g, q)) for q in g.choices]
        for g in problem.groups
    ]


def _seconds_allowed(problem: Problem) -> float:
    """Seconds of a token that the groups may take together; infinity if speed does not matter."""
    costs, allocation = problem.allocation.costs, problem.allocation
    if costs is None or (allocation.profile != "cpu" and allocation.min_tokens_per_sec is None):
        return float("inf")
    taken = costs.seconds(problem.spec, {name: q.name for name, q in problem.fixed.items()})
    if allocation.min_tokens_per_sec is not None:
        return 1 / allocation.min_tokens_per_sec - taken
    of_groups = problem.budget.limit(problem.spec, problem.header_bytes)
    allowed = _k_file_seconds(problem, costs, of_groups) - taken
    if not problem.groups:
        return allowed
    fastest = sum(problem.seconds(g, q) for g, q in zip(problem.groups, _fastest(problem), strict=True))
    return max(allowed, _TIME_SLACK * fastest)


def _k_file_seconds(problem: Problem, costs: DecodeCosts, limit: int) -> float:
    """Seconds of a token with K types in a file of the size allowed: between files of one K type each.

    As llama-quantize does, the output matrix is in Q6_K where the file is counted; otherwise in the type it has here.
    """
    spec, budget = problem.spec, problem.budget
    points = []
    for digits in range(2, 7):
        types = {t.name: _k_type(t, digits).name for layer in spec.layer_matrices for t in layer}
        for tensor in spec.other_matrices:
            types[tensor.name] = _k_type(tensor, 6).name if budget.covers_file else problem.fixed[tensor.name].name
        size = sum(budget.cost(QUANT_TYPES[types[t.name]], t) for t in spec.tensors if t.name in types)
        points.append((size, costs.seconds(spec, types)))
    sizes, seconds = zip(*sorted(points), strict=True)
    return float(np.interp(limit, sizes, seconds))


def _k_type(tensor: TensorSpec, digit: int) -> QuantType:
    """The K type of a width, or what llama-quantize takes where its blocks do not fit."""
    names = {2: "Q2_K Q4_0", 3: "Q3_K Q4_0", 4: "Q4_K Q5_0", 5: "Q5_K Q5_1", 6: "Q6_K Q8_0"}[digit]
    return next((QUANT_TYPES[n] for n in names.split() if QUANT_TYPES[n].fits(tensor.shape[1])), F16)


def _fastest(problem: Problem) -> tuple[QuantType, ...]:
    """The types within the budget that decode fastest."""
    chosen = solve(_options(problem, problem.seconds), problem.limit)
    return tuple(g.choices[k] for g, k in zip(problem.groups, chosen, strict=True))


def _seconds(problem: Problem, chosen: Sequence[QuantType]) -> float:
    """Seconds of a token."""
    assert problem.allocation.costs is not None
    return problem.allocation.costs.seconds(problem.spec, problem.types(chosen))


@dataclass(frozen=True)
class Method:
    """A named way to divide bits.

    Attributes:
        solve: From problem and scores to one type a group.
        granularity: Groups it is made for.
        scorer: Layer score it is made for. For ``best`` the one that won on the table in docs/experiments.md.
        check: Raises BudgetError if a problem has no solution.
        weighs_outer: Whether it knows what embedding and output are worth; otherwise a rule gives them their types.
        minds_speed: Whether it keeps to a time per token.
    """

    solve: Callable[[Problem, LayerScores], tuple[QuantType, ...]]
    granularity: str
    scorer: str
    check: Callable[[Problem], object] = lambda _problem: None
    weighs_outer: bool = False
    minds_speed: bool = True


_BLOCK_ERROR = partial(full_ladder, error=Group.block_error)

METHODS = {
    "best": Method(_BLOCK_ERROR, "tensor", "energy-gain", weighs_outer=True),
    "block-error": Method(partial(_BLOCK_ERROR, has_weights=False), "tensor", "block-error", weighs_outer=True),
    "lieq-ladder": Method(full_ladder, "layer", "lieq"),
    "lieq": Method(two_levels, "layer", "lieq", _level_pairs, minds_speed=False),
    "lim": Method(two_levels, "layer", "lim", _level_pairs, minds_speed=False),
    "zd": Method(two_levels, "layer", "zd", _level_pairs, minds_speed=False),
}


def _shown_range(budget: BitBudget, low: float, high: float) -> str:
    if budget.kind == "size":
        return f"{budget.shown(low)} to {budget.shown(high)}"
    return f"{low:.4f} to {budget.shown(high)}"


def _advice(problem: Problem, low: float) -> str:
    """What pushes the range away from a target outside of it, and what would widen it."""
    budget, allocation, spec = problem.budget, problem.allocation, problem.spec
    is_small = budget.value < low
    parts = []
    if budget.covers_file and is_small:
        outer = [t for t in spec.other_matrices if t.name in problem.fixed]
        share = sum(t.n_weights for t in spec.other_matrices) / spec.n_weights
        given = f", fixed at {', '.join(dict.fromkeys(problem.fixed[t.name].name for t in outer))}" if outer else ""
        parts.append(f"embedding and output are {share:.0%} of the weights{given}")
    widths = sorted({t.shape[1] for g in problem.groups for t in g.tensors if t.shape[1] % 256})
    if is_small and widths:
        rows = " and ".join(str(w) for w in widths)
        parts.append(f"rows of {rows} weights do not fit the 256-weight blocks of the smaller types")
        small = [q for q in QUANT_TYPES.values() if 1 < q.block_size < 256 and q not in allocation.types]
        if allocation.by_layer:
            parts[-1] += "; --granularity tensor uses those where they fit"
        elif small:
            parts[-1] += f"; --types can allow others, such as {small[0].name}"
        return "; ".join(parts)

    def bits(quant_type: QuantType) -> float:
        return quant_type.nominal_bits if budget.kind == "nominal" else quant_type.bits_per_weight

    others = sorted((q for q in QUANT_TYPES.values() if q not in allocation.types), key=bits)
    offered = [bits(q) for q in allocation.types]
    if is_small:
        nearest = [q for q in reversed(others) if bits(q) < min(offered)]
    else:
        nearest = [q for q in others if bits(q) > max(offered)]
    if budget.bits_per_weight is not None and not budget.covers_file:  # name one that does reach it
        reaching = [q for q in nearest if (bits(q) <= budget.value if is_small else bits(q) >= budget.value)]
        nearest = reaching
    if nearest:
        size = "smaller" if is_small else "larger"
        parts.append(f"{size} types can be allowed with --types, for example {nearest[0].name}")
    return "; ".join(parts or ["choose a target inside this range"])


def _check_scores(scores: LayerScores, groups: Sequence[Group], scorer: str) -> None:
    if scorer not in scores.by_scorer:
        raise FormatError(f"the scores have no '{scorer}'; they have {', '.join(scores.by_scorer)}")
    for group in groups:
        for tensor in group.tensors:
            known = scores.type_errors.get(tensor.name, {})
            missing = [q.name for q in group.choices if q.name not in known]
            if not known:
                raise FormatError(f"the scores have no errors of {tensor.name}, made by an older version; score again")
            if missing:
                kept = [*known, *missing]
                raise FormatError(
                    f"the scores have no errors for {missing[0]}; score again with --types {','.join(kept)}, "
                    "or leave those types out here"
                )


def _layer_weights(layer_scores: Sequence[float]) -> list[float]:
    low, high = min(layer_scores), max(layer_scores)
    return [1.0 + ((s - low) / (high - low) if high > low else 0.0) for s in layer_scores]


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
    fitting = [QUANT_TYPES[n] for n in ladder if QUANT_TYPES[n].fits(tensor.shape[1])]
    least = 8 * budget.value / spec.n_weights if budget.kind == "size" else budget.value
    return next((q for q in fitting if q.bits_per_weight >= least), F16)

"""Builds the problem from a model and the user's options: the offered types, the fixed tensors, the groups.

A row is never offered a type whose blocks do not divide it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lieq_gguf.allocation.decode_costs import DecodeCosts
from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import PROFILES, AllocationOptions, Group, Pin, Problem
from lieq_gguf.errors import BudgetError
from lieq_gguf.quant_types import DEFAULT_LADDER, F16, QUANT_TYPES, QuantType
from lieq_gguf.records.bits import BitBudget
from lieq_gguf.records.spec import ModelSpec, TensorSpec

_IN_SMALL_BLOCKS = tuple(QUANT_TYPES[name] for name in ("Q2_0", "Q4_0", "IQ4_NL", "Q5_0", "Q8_0"))
_OPTION_OF_OUTER = {False: "--embedding-type", True: "--output-type"}


def scorer_of(options: AllocationOptions) -> str:
    """Name of the layer score: the requested one, or the one that belongs to the method."""
    return options.scorer or METHODS[options.method].scorer


def build_problem(
    spec: ModelSpec,
    budget: BitBudget,
    options: AllocationOptions,
    *,
    costs: DecodeCosts | None = None,
    has_imatrix: bool = True,
    error_feedback: bool = False,
    header_bytes: int = 0,
) -> Problem:
    """Separate the fixed tensors from the rest, and group the rest with the types that fit.

    Args:
        spec: The model.
        budget: The target.
        options: Method and choices.
        costs: Decoding time of each type; None to ignore speed.
        has_imatrix: Whether the file will be made with an importance matrix, which some types need.
        error_feedback: Whether it will be written with error feedback.
        header_bytes: Bytes before the first tensor of the file.

    Raises:
        BudgetError: if no type fits a group, or a requested type does not fit.
    """
    method = METHODS[options.method]
    types = types_on_offer(options.types, has_imatrix, options.profile)
    fixed = {t.name: QUANT_TYPES[t.fixed_type] for t in spec.tensors if not t.is_matrix}
    fixed |= _pinned(spec, options.pins, has_imatrix)
    for tensor in spec.outer_matrices:
        outer_type = _outer_type(tensor, spec, budget, options, types, fixed.get(tensor.name))
        if outer_type is not None:
            fixed[tensor.name] = outer_type
    free_outer = tuple(t for t in spec.outer_matrices if t.name not in fixed)
    _require_types_of_outer(spec, free_outer, types)
    groups = [Group(None, (tensor,), _choices((tensor,), types)) for tensor in free_outer]
    granularity = options.granularity or method.granularity
    for layer, matrices in enumerate(spec.layer_matrices):
        free = tuple(t for t in matrices if t.name not in fixed)
        together = ([free] if free else []) if granularity == "layer" else [(t,) for t in free]
        groups += [Group(layer, tensors, _choices(tensors, types)) for tensors in together]
    return Problem(
        spec, budget, options, types, costs, header_bytes, error_feedback, has_imatrix, fixed, tuple(groups),
        scorer_of(options), granularity,
    )  # fmt: skip


def types_on_offer(types: Sequence[QuantType], has_imatrix: bool, profile: str = "quality") -> tuple[QuantType, ...]:
    """The types of the profile, without those that need an importance matrix if there is none.

    Raises:
        BudgetError: if no type is left.
    """
    of_profile = tuple(t for t in types if t.family in PROFILES[profile].families)
    names = ", ".join(t.name for t in types)
    if not of_profile:
        raise BudgetError(f"--profile {profile} has {PROFILES[profile].summary}; you asked for {names}: add K types")
    left = tuple(t for t in of_profile if has_imatrix or not t.needs_imatrix)
    if not left:
        raise BudgetError(
            f"all types you asked for ({names}) need an importance matrix; drop --no-imatrix or add K types"
        )
    return left


def _outer_type(
    tensor: TensorSpec,
    spec: ModelSpec,
    budget: BitBudget,
    options: AllocationOptions,
    types: Sequence[QuantType],
    pinned: QuantType | None,
) -> QuantType | None:
    """The type of embedding or output matrix, by hand or by rule; None if the method chooses it."""
    requested = _requested_outer_type(tensor, spec, options)
    if pinned is not None:
        if requested not in (None, pinned):
            raise BudgetError(
                f"you pinned {tensor.name} to {pinned.name} and also asked for {requested and requested.name}; "
                "leave out one of the two"
            )
        return pinned
    if requested is not None:
        return requested
    if budget.covers_file and METHODS[options.method].weighs_outer:
        return None
    return _outer_type_by_rule(tensor, spec, budget, types)


def _choices(tensors: Sequence[TensorSpec], types: Sequence[QuantType]) -> tuple[QuantType, ...]:
    """The types that fit all of some matrices of a layer, or the embedding or output matrix.

    Raises:
        BudgetError: if none does.
    """
    choices = tuple(q for q in types if all(_can_be(t, q) for t in tensors))
    if not choices:
        widths = sorted({t.shape[-1] for t in tensors})
        where = tensors[0].name if tensors[0].layer is None else f"layer {tensors[0].layer}"
        examples = [q.name for q in _IN_SMALL_BLOCKS if all(q.fits(width) for width in widths)]
        raise BudgetError(
            f"none of the types {', '.join(q.name for q in types)} fits rows of {', '.join(map(str, widths))} weights "
            f"in {where}; "
            + (
                f"allow types whose blocks do, for example --types {','.join(examples)}"
                if examples
                else "only types without blocks do: --types F16, at 16 bits per weight"
            )
        )
    return choices


def _require_types_of_outer(spec: ModelSpec, tensors: Sequence[TensorSpec], types: Sequence[QuantType]) -> None:
    """Require a type without importance for embedding and output, where the method chooses theirs."""
    if tensors and all(q.needs_imatrix for q in types):
        has_both = len({t is spec.output_matrix for t in tensors}) > 1
        option = _OPTION_OF_OUTER[tensors[0].name == "output.weight"]
        names, options = " and ".join(t.name for t in tensors), " and ".join(_OPTION_OF_OUTER.values())
        raise BudgetError(
            f"all types you asked for ({', '.join(q.name for q in types)}) need an importance matrix, which "
            f"{names} may lack; add a K type, or name another type with "
            f"{options if has_both else option}"
        )


def _can_be(tensor: TensorSpec, quant_type: QuantType) -> bool:
    """Whether a matrix can be stored in a type; embedding and output matrix may lack importance."""
    return quant_type.fits(tensor.shape[-1]) and not (quant_type.needs_imatrix and tensor.layer is None)


def _pinned(spec: ModelSpec, pins: Sequence[Pin], has_imatrix: bool) -> dict[str, QuantType]:
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
            if pin_used.quant_type.needs_imatrix and not has_imatrix:
                raise BudgetError(
                    f"--pin '{pin_used.pattern}={pin_used.quant_type.name}' needs an importance matrix; "
                    "drop --no-imatrix"
                )
            fixed[tensor.name] = pin_used.quant_type
    return fixed


def _check_fit(tensor: TensorSpec, quant_type: QuantType) -> None:
    """Require that a type fits a tensor."""
    why = None
    if not quant_type.fits(tensor.shape[-1]):
        why = "does not fit its rows"
    elif quant_type.needs_imatrix and tensor.layer is None:
        why = "needs an importance matrix, which embedding and output may lack"
    if why is not None:
        usable = [q for q in DEFAULT_LADDER if _can_be(tensor, q) and not q.needs_imatrix]
        nearest = min(usable, key=lambda q: abs(q.bits_per_weight - quant_type.bits_per_weight))
        raise BudgetError(
            f"{tensor.name} of shape {tensor.shape} cannot be {quant_type.name}: it {why}; name another type, for "
            f"example {nearest.name}"
        )


def _requested_outer_type(tensor: TensorSpec, spec: ModelSpec, options: AllocationOptions) -> QuantType | None:
    """The type that the user requested for the embedding or the output matrix."""
    requested = options.output_type if tensor is spec.output_matrix else options.embedding_type
    if spec.has_tied_embeddings and options.embedding_type is not None:
        if requested not in (None, options.embedding_type):
            raise BudgetError(
                f"embedding and output of {spec.name} are one matrix, which cannot be both "
                f"{options.embedding_type.name} and {options.output_type and options.output_type.name}; "
                "leave out --embedding-type or --output-type"
            )
        requested = options.embedding_type
    if requested is not None:
        _check_fit(tensor, requested)
    return requested


def _outer_type_by_rule(
    tensor: TensorSpec, spec: ModelSpec, budget: BitBudget, types: Sequence[QuantType]
) -> QuantType:
    """As good as llama-quantize's choice at this budget: output at least Q6_K, embedding at least the target."""
    if not any(q.is_quantized for q in types):
        return max(types, key=lambda q: q.bits_per_weight)
    output_ladder = ("Q6_K", "Q8_0", "F16")
    ladder = output_ladder if tensor is spec.output_matrix else ("Q2_K", "Q3_K", "Q4_K", "Q5_K", *output_ladder)
    fitting = [QUANT_TYPES[n] for n in ladder if QUANT_TYPES[n].fits(tensor.shape[-1])]
    least = 8 * budget.value / spec.n_weights if budget.kind == "size" else budget.value
    return next((q for q in fitting if q.bits_per_weight >= least), F16)

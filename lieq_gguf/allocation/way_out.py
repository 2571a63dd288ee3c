"""What to do where a target is out of reach. Every way out is tried on the headers before it is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lieq_gguf.allocation.build import build_problem
from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import PROFILES, Problem
from lieq_gguf.allocation.time_limit import check_speed
from lieq_gguf.errors import BudgetError
from lieq_gguf.quant_types import DEFAULT_LADDER, QUANT_TYPES, QuantType
from lieq_gguf.records.spec import TensorSpec

_OF_OUTER = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")  # from large to small


def way_out(problem: Problem) -> str:
    """Why a target is outside the range, and what would bring it inside."""
    is_small = problem.budget.value < problem.range()[0]
    facts = [*_outer_share(problem, is_small), *_pinned(problem), *_odd_rows(problem, is_small)]
    ways = [*_without_pins(problem), *(_towards_less(problem) if is_small else ()), *_other_types(problem, is_small)]
    return "; ".join([*facts, *(ways or ["choose a target inside this range"])])


def _works(problem: Problem, has_imatrix: bool | None = None, **options: Any) -> bool:
    """Whether the target can be met with other options."""
    try:
        other = build_problem(
            problem.spec,
            problem.budget,
            replace(problem.options, **options),
            costs=problem.costs,
            has_imatrix=problem.has_imatrix if has_imatrix is None else has_imatrix,
            error_feedback=problem.error_feedback,
            header_bytes=problem.header_bytes,
        )
        if not other.is_within_range:
            return False
        METHODS[other.options.method].check(other)
        check_speed(other)
    except BudgetError:
        return False
    return True


def _outer_share(problem: Problem, is_small: bool) -> list[str]:
    """How much embedding and output take of a file."""
    if not (problem.budget.covers_file and is_small):
        return []
    outer, spec = problem.spec.outer_matrices, problem.spec
    share = sum(t.n_weights for t in outer) / spec.n_weights
    names = ", ".join(dict.fromkeys(problem.fixed[t.name].name for t in outer if t.name in problem.fixed))
    return [f"embedding and output are {share:.0%} of the weights" + (f", in {names}" if names else "")]


def _pinned_matrices(problem: Problem) -> list[TensorSpec]:
    return [t for layer in problem.spec.layer_matrices for t in layer if t.name in problem.fixed]


def _pinned(problem: Problem) -> list[str]:
    n_pinned = len(_pinned_matrices(problem))
    return [f"{n_pinned} matrices of the layers are pinned"] if n_pinned else []


def _odd_widths(problem: Problem) -> list[int]:
    return sorted({t.shape[-1] for g in problem.groups for t in g.tensors if t.shape[-1] % 256})


def _odd_rows(problem: Problem, is_small: bool) -> list[str]:
    widths = " and ".join(str(width) for width in _odd_widths(problem))
    if not (is_small and widths):
        return []
    return [f"rows of {widths} weights do not fit the 256-weight blocks of the smaller types"]


def _without_pins(problem: Problem) -> list[str]:
    return ["leave out --pin"] if problem.options.pins and _works(problem, pins=()) else []


def _towards_less(problem: Problem) -> list[str]:
    """Options other than ``--types`` with which a file can be smaller, and a type for rows that few types fit."""
    ways = _smaller_outer(problem)
    if problem.options.profile == "edge" and _works(problem, profile="quality"):
        ways.append("--profile quality or cpu has smaller types")
    if _odd_widths(problem):
        if problem.granularity == "layer" and _works(problem, granularity="tensor"):
            ways.append("--granularity tensor uses those where they fit")
        else:
            ways += _type_for_odd_rows(problem)
    return ways


def _smaller_outer(problem: Problem) -> list[str]:
    """The largest type of embedding and output with which the file is small enough, if they have one by hand or rule.

    Of a model with tied embeddings they are one matrix, which may have been named by either option.
    """
    spec, options = problem.spec, problem.options
    outer = [t for t in spec.outer_matrices if t.name in problem.fixed]
    if not problem.budget.covers_file or not outer or any(pin.matches(t.name) for pin in options.pins for t in outer):
        return []
    names = ["embedding_type", "output_type"]
    if spec.has_tied_embeddings:
        names = [name for name in names if getattr(options, name) is not None] or names[:1]
    for quant_type in (QUANT_TYPES[name] for name in _OF_OUTER):
        requested: dict[str, Any] = dict.fromkeys(names, quant_type)
        if _works(problem, **requested):
            given = " ".join(f"--{name.replace('_', '-')} {quant_type.name}" for name in names)
            return [f"{given} makes them small enough"]
    return []


def _type_for_odd_rows(problem: Problem) -> list[str]:
    fitting = [q for q in _usable(problem) if all(q.fits(width) for width in _odd_widths(problem))]
    smallest = min(fitting, key=lambda q: q.bits_per_weight)
    if smallest in problem.offered_types or not _works(problem, types=(*DEFAULT_LADDER, smallest)):
        return []
    return [f"--types +{smallest.name} allows a type of {smallest.bits_per_weight:g} bits that fits them"]


def _other_types(problem: Problem, is_small: bool) -> list[str]:
    """The nearest type with which the target can be met, one for which nothing else has to change if there is one."""
    if is_small and _odd_widths(problem):
        return []  # a smaller type would not fit, or is named for them already

    def bits(quant_type: QuantType) -> float:
        return quant_type.nominal_bits if problem.budget.kind == "nominal" else quant_type.bits_per_weight

    others = sorted((q for q in _usable(problem) if q not in problem.offered_types), key=bits, reverse=is_small)
    for needs_imatrix in (False, True):
        for q in others:
            is_barred = q.needs_imatrix and not problem.has_imatrix
            types = (*problem.offered_types, q)
            if is_barred == needs_imatrix and _works(problem, has_imatrix=is_barred or None, types=types):
                return [_named(q, is_small, is_barred, problem.options.types)]
    return []


def _named(quant_type: QuantType, is_small: bool, is_barred: bool, offered: Sequence[QuantType]) -> str:
    if quant_type in offered:
        return f"drop --no-imatrix, which rules out {quant_type.name}"
    named = f"--types allows {'smaller' if is_small else 'larger'} types, for example {quant_type.name}"
    return f"{named}, if you drop --no-imatrix" if is_barred else named


def _usable(problem: Problem) -> list[QuantType]:
    """All types of the profile, without those for weights that were trained to lie on their grid."""
    families = PROFILES[problem.options.profile].families
    return [q for q in QUANT_TYPES.values() if q.family in families and q.family != "trained"]

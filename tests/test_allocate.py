from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import pytest
from support.specs import COSTS, make_spec, spec_of

from lieq_gguf.allocation.allocate import allocate, check_reachable
from lieq_gguf.allocation.build import build_problem, types_on_offer
from lieq_gguf.allocation.decode_costs import DecodeCosts
from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import AllocationOptions, Granularity, Pin
from lieq_gguf.errors import BudgetError, FormatError
from lieq_gguf.native.silence import silenced_native_stdout
from lieq_gguf.quant_types import DEFAULT_LADDER, QUANT_TYPES, QuantType, parse_types
from lieq_gguf.records.bits import BitBudget, BudgetKind
from lieq_gguf.records.plan import QuantPlan
from lieq_gguf.records.scores import LayerScores
from lieq_gguf.records.spec import ModelSpec

K_TYPES = parse_types(["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
BITS = BitBudget("bits", 3.0)
LEAST, MOST = 2.0625, 16.0  # bits per weight of the default ladder's IQ2_XXS and F16


def plan_of(
    spec: ModelSpec,
    budget: BitBudget,
    scores: LayerScores | None,
    options: AllocationOptions,
    header_bytes: int = 0,
    costs: DecodeCosts | None = None,
) -> QuantPlan:
    """The plan for a target, as ``convert`` makes it."""
    return allocate(build_problem(spec, budget, options, costs=costs, header_bytes=header_bytes), scores)


def require_reachable(
    spec: ModelSpec,
    budget: BitBudget,
    options: AllocationOptions,
    header_bytes: int = 0,
    costs: DecodeCosts | None = None,
) -> None:
    """Refuse a target as ``convert`` does before any work."""
    check_reachable(build_problem(spec, budget, options, costs=costs, header_bytes=header_bytes))


def make_scores(spec: ModelSpec, seed: int = 0, monotone: bool = True) -> LayerScores:
    """Errors that fall with bits as real ones do, by about four per bit, or at random."""
    numbers = np.random.default_rng(seed)
    errors = {}
    for tensor in (t for t in spec.tensors if t.is_matrix):
        hardness = numbers.lognormal(0, 0.5)
        errors[tensor.name] = {
            q.name: float(hardness * 4 ** -(q.bits_per_weight - 1) if monotone else numbers.random())
            for q in QUANT_TYPES.values()
        }
    layer_scores = tuple(float(x) for x in numbers.normal(size=spec.n_layers))
    by_scorer = dict.fromkeys(("lieq", "energy-gain", "zd", "block-error"), layer_scores) | {"lim": layer_scores[::-1]}
    sensitivities = {name: float(numbers.lognormal(0, 1)) for name in errors}
    return LayerScores("synthetic", 1, "none", 0, by_scorer, errors, sensitivities, kld_per_block_error=2.0)


def layer_bits(spec: ModelSpec, plan: QuantPlan) -> int:
    """Stored bits of the layers' matrices, from block sizes alone."""
    blocks = [
        (prod(t.shape) // QUANT_TYPES[plan.types[t.name]].block_size, QUANT_TYPES[plan.types[t.name]].block_bytes)
        for layer in spec.layer_matrices
        for t in layer
    ]
    return sum(8 * n * n_bytes for n, n_bytes in blocks)


def layer_limit(spec: ModelSpec, bits: float) -> int:
    return int(Fraction(str(bits)) * sum(prod(t.shape) for layer in spec.layer_matrices for t in layer))


def types_of_layers(spec: ModelSpec, plan: QuantPlan) -> list[set[str]]:
    return [{plan.types[t.name] for t in layer} for layer in spec.layer_matrices]


def one_type_per_layer(spec: ModelSpec, plan: QuantPlan) -> list[str]:
    found = types_of_layers(spec, plan)
    assert all(len(types) == 1 for types in found)
    return [types.pop() for types in found]


def objective(spec: ModelSpec, types: dict[str, str], scores: LayerScores, method: str = "best") -> float:
    """What a method on the full ladder makes least: ``Σ (1 + scaled score) · factor · error``."""
    layer_scores = np.array(scores.by_scorer["lieq"])
    weight = 1 + (layer_scores - layer_scores.min()) / (np.ptp(layer_scores) or 1.0)
    if method == "block-error":
        weight[:] = 1
    factor = {t.name: prod(t.shape) for layer in spec.layer_matrices for t in layer}
    if method != "lieq-ladder":
        factor = dict(scores.sensitivities)  # type: ignore[arg-type]
    return float(
        sum(
            weight[layer] * factor[t.name] * scores.type_errors[t.name][types[t.name]]
            for layer, matrices in enumerate(spec.layer_matrices)
            for t in matrices
        )
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("granularity", ["layer", "tensor"])
@pytest.mark.parametrize("method", ["best", "block-error", "lieq-ladder"])
def test_full_ladder_is_as_good_as_trying_everything(method: str, granularity: Granularity, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    n_groups, per_group = 5, 2 if granularity == "layer" else 1
    rows = numbers.integers(1, 40, (n_groups, per_group))
    shapes = [{f"m{i}": (int(n), 256 * int(numbers.integers(1, 3))) for i, n in enumerate(layer)} for layer in rows]
    spec = spec_of(shapes)
    scores = make_scores(spec, seed, monotone=seed % 2 == 0)
    bits = round(float(numbers.uniform(2.7, 6.4)), 3)
    allocation = AllocationOptions(method=method, types=K_TYPES, granularity=granularity, scorer="lieq")
    plan = plan_of(spec, BitBudget("bits", bits), scores, allocation)

    best = np.inf
    for choice in product(K_TYPES, repeat=n_groups):
        types = {t.name: q.name for layer, q in zip(spec.layer_matrices, choice, strict=True) for t in layer}
        candidate = replace(plan, types=dict(plan.types) | types)
        if layer_bits(spec, candidate) <= layer_limit(spec, bits):
            best = min(best, objective(spec, dict(candidate.types), scores, method))
    assert layer_bits(spec, plan) <= layer_limit(spec, bits)
    assert objective(spec, dict(plan.types), scores, method) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("bits", [2.07, 2.3, 2.625, 2.7, 3.001, 3.5, 4.25, 5.0, 6.6, 8.2])
@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_full_ladder_meets_the_target_from_below_within_one_percent(granularity: Granularity, bits: float) -> None:
    spec = make_spec(24)
    plan = plan_of(spec, BitBudget("bits", bits), make_scores(spec), AllocationOptions(granularity=granularity))
    assert 0.99 * layer_limit(spec, bits) <= layer_bits(spec, plan) <= layer_limit(spec, bits)


@pytest.mark.parametrize(
    ("method", "asked", "is_whole"),
    [
        ("best", None, False),
        ("best", "layer", True),
        ("lieq-ladder", None, True),
        ("lieq-ladder", "tensor", False),
        ("lieq", None, True),
        ("lim", None, True),
        ("zd", None, True),
    ],
)
def test_granularity_is_the_methods_own_unless_asked_for(
    method: str, asked: Granularity | None, is_whole: bool
) -> None:
    spec = make_spec(24)
    allocation = AllocationOptions(method=method, granularity=asked)
    plan = plan_of(spec, BitBudget("bits", 3.1), make_scores(spec), allocation)
    found = types_of_layers(spec, plan)
    assert len(set.union(*found)) > 1
    assert all(len(types) == 1 for types in found) == is_whole


def test_block_error_method_needs_block_errors() -> None:
    spec = make_spec(6)
    scores = replace(make_scores(spec), sensitivities={})
    with pytest.raises(FormatError, match="no block error of blk"):
        plan_of(spec, BitBudget("bits", 3.1), scores, AllocationOptions())
    plan_of(spec, BitBudget("bits", 3.1), scores, AllocationOptions(method="lieq-ladder"))


def test_tensor_granularity_is_never_worse() -> None:
    spec = make_spec(6)
    scores, budget = make_scores(spec), BitBudget("bits", 3.1)
    per_layer, per_tensor = (
        plan_of(spec, budget, scores, AllocationOptions(types=K_TYPES, granularity=granularity))
        for granularity in ("layer", "tensor")
    )
    assert objective(spec, dict(per_tensor.types), scores) <= objective(spec, dict(per_layer.types), scores)


@pytest.mark.parametrize("method", METHODS)
def test_same_input_gives_the_same_plan(method: str) -> None:
    spec = make_spec(12)
    allocation = AllocationOptions(method=method)
    first, second = (plan_of(spec, BitBudget("bits", 3.3), make_scores(spec), allocation) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("types", [K_TYPES, K_TYPES[::-1]], ids=["small first", "large first"])
@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_of_equally_damaging_types_the_smaller_wins(types: tuple[QuantType, ...], granularity: Granularity) -> None:
    spec = make_spec(4)
    scores = make_scores(spec)
    equal = {name: dict.fromkeys(QUANT_TYPES, 0.1) for name in scores.type_errors}
    allocation = AllocationOptions(types=types, granularity=granularity)
    plan = plan_of(spec, BitBudget("bits", 6.5), replace(scores, type_errors=equal), allocation)
    assert set(one_type_per_layer(spec, plan)) == {"Q2_K"}


def test_the_higher_scored_of_two_equal_layers_gets_the_bits() -> None:
    spec = make_spec(2)
    scores = make_scores(spec)
    errors = {name: {"Q2_K": 0.1, "Q4_K": 0.01} for name in scores.type_errors}
    scores = replace(scores, by_scorer={"lieq": (0.2, 0.9), "lim": (0.9, 0.2)}, type_errors=errors)
    types = parse_types(["Q2_K", "Q4_K"])
    by_lieq, by_lim = (
        one_type_per_layer(
            spec, plan_of(spec, BitBudget("bits", 4.0), scores, AllocationOptions("lieq-ladder", scorer, types=types))
        )
        for scorer in ("lieq", "lim")
    )
    assert (by_lieq, by_lim) == (["Q2_K", "Q4_K"], ["Q4_K", "Q2_K"])


def test_a_model_of_eighty_layers_is_solved() -> None:
    spec = make_spec(80, width=8192, n_ff=28672, n_kv=1024)
    types = tuple(q for q in DEFAULT_LADDER if q.name not in ("Q4_1", "Q5_0", "Q5_1", "F16"))
    assert len(types) == 14
    allocation = AllocationOptions(types=types, granularity="tensor")
    plan = plan_of(spec, BitBudget("bits", 2.7), make_scores(spec), allocation)
    assert 0.99 * layer_limit(spec, 2.7) <= layer_bits(spec, plan) <= layer_limit(spec, 2.7)


@pytest.mark.parametrize("bits", [2.3, 2.7, 3.0, 3.4, 4.4, 5.5])
@pytest.mark.parametrize("scorer", ["lieq", "lim"])
def test_two_levels_raises_as_many_of_the_highest_layers_as_fit(scorer: str, bits: float) -> None:
    spec = make_spec(24)
    scores = make_scores(spec)
    plan = plan_of(spec, BitBudget("bits", bits), scores, AllocationOptions(method="lieq", scorer=scorer))
    types = one_type_per_layer(spec, plan)
    low, high = sorted(set(types), key=lambda name: QUANT_TYPES[name].bits_per_weight)
    assert QUANT_TYPES[high].nominal_bits == 2 * QUANT_TYPES[low].nominal_bits
    order = sorted(range(24), key=lambda layer: -scores.by_scorer[scorer][layer])
    n_high = types.count(high)
    assert {layer for layer in range(24) if types[layer] == high} == set(order[:n_high])
    assert layer_bits(spec, plan) <= layer_limit(spec, bits)
    one_more = dict(plan.types) | {t.name: high for t in spec.layer_matrices[order[n_high]]}
    assert layer_bits(spec, replace(plan, types=one_more)) > layer_limit(spec, bits)


@pytest.mark.parametrize(
    ("pair", "bits", "n_high"), [("Q2_K,Q4_K", 3.0, 2), ("Q3_K,Q4_K", 4.0, 5), ("Q2_K,Q6_K", 2.7, 0)]
)
def test_two_levels_takes_a_named_pair(pair: str, bits: float, n_high: int) -> None:
    spec = make_spec(10)
    allocation = AllocationOptions(method="lieq", types=parse_types(pair.split(",")))
    types = one_type_per_layer(spec, plan_of(spec, BitBudget("bits", bits), make_scores(spec), allocation))
    assert (types.count(pair.split(",")[1]), len(types)) == (n_high, 10)


def test_two_levels_does_not_pass_over_a_layer_that_is_too_large() -> None:
    spec = spec_of([{"m": (n_rows, 256)} for n_rows in (2, 90, 8)])
    scores = replace(make_scores(spec), by_scorer={"lieq": (0.9, 0.5, 0.1)})
    allocation = AllocationOptions(method="lieq", types=parse_types(["Q2_K", "Q4_K"]))
    types = one_type_per_layer(spec, plan_of(spec, BitBudget("bits", 3.0), scores, allocation))
    assert types == ["Q4_K", "Q2_K", "Q2_K"]  # the third would fit, but the second comes before it


def test_two_levels_breaks_ties_by_the_first_layer() -> None:
    spec = make_spec(4)
    scores = replace(make_scores(spec), by_scorer={"lieq": (0.5,) * 4})
    allocation = AllocationOptions(method="lieq", types=parse_types(["Q2_K", "Q4_K"]))
    types = one_type_per_layer(spec, plan_of(spec, BitBudget("bits", 3.6), scores, allocation))
    assert types == ["Q4_K", "Q4_K", "Q2_K", "Q2_K"]


def test_two_levels_says_what_fits_when_no_two_widths_do() -> None:
    spec = make_spec(4)
    allocation = AllocationOptions(method="lieq", types=parse_types(["Q3_K", "Q5_K", "Q6_K"]))
    with pytest.raises(BudgetError, match="Q3_K, Q5_K, Q6_K"):
        plan_of(spec, BitBudget("bits", 4.0), make_scores(spec), allocation)


@pytest.mark.parametrize(("n_layers", "bits"), [(36, 2.06), (28, 2.08), (30, 2.07)])
def test_nominal_bits_count_the_digit_of_the_type(n_layers: int, bits: float) -> None:
    spec = make_spec(n_layers)
    scores = make_scores(spec)
    plan = plan_of(spec, BitBudget("nominal", bits), scores, AllocationOptions(method="lieq"))
    digits = [QUANT_TYPES[name].nominal_bits for name in one_type_per_layer(spec, plan)]
    highest = int(np.argmax(scores.by_scorer["lieq"]))
    assert digits == [4 if layer == highest else 2 for layer in range(n_layers)]


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_full_ladder_meets_a_nominal_target(granularity: Granularity) -> None:
    spec = make_spec(24)
    plan = plan_of(spec, BitBudget("nominal", 3.3), make_scores(spec), AllocationOptions(granularity=granularity))
    digits = sum(
        QUANT_TYPES[plan.types[t.name]].nominal_bits * t.n_weights for layer in spec.layer_matrices for t in layer
    )
    assert 0.99 * 3.3 <= digits / spec.n_layer_weights <= 3.3


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "F16"])
def test_target_of_exactly_one_type_is_met_to_the_bit(name: str) -> None:
    spec = make_spec(7)
    allocation = AllocationOptions(types=(QUANT_TYPES[name],))
    bits = QUANT_TYPES[name].bits_per_weight
    plan = plan_of(spec, BitBudget("bits", bits), None, allocation)
    assert layer_bits(spec, plan) == layer_limit(spec, bits)


def test_lowest_target_of_a_ladder_is_uniform() -> None:
    spec = make_spec(7)
    plan = plan_of(spec, BitBudget("bits", 2.625), make_scores(spec), AllocationOptions(types=K_TYPES))
    assert set(one_type_per_layer(spec, plan)) == {"Q2_K"}


def test_highest_target_of_a_ladder_is_uniform() -> None:
    spec = make_spec(7)
    plan = plan_of(spec, BitBudget("bits", 6.5625), make_scores(spec), AllocationOptions(types=K_TYPES))
    assert set(one_type_per_layer(spec, plan)) == {"Q6_K"}


@pytest.mark.parametrize("bits", [2.6249, 6.6], ids=["below", "above"])
def test_unreachable_target_is_refused_with_the_range(bits: float) -> None:
    with pytest.raises(BudgetError, match=r"2\.6250 to 6\.5625"):
        require_reachable(make_spec(3), BitBudget("bits", bits), AllocationOptions(types=K_TYPES))


def test_reachable_range_is_that_of_the_smallest_and_largest_type() -> None:
    assert build_problem(make_spec(3), BitBudget("bits", 3.0), AllocationOptions()).layer_bpw_range == (LEAST, MOST)


def test_refusal_below_names_a_type_that_would_reach_the_target() -> None:
    with pytest.raises(BudgetError, match="--types") as refusal:
        require_reachable(make_spec(3), BitBudget("bits", 2.1), AllocationOptions(types=parse_types(["Q4_K", "Q6_K"])))
    named = [q for q in QUANT_TYPES.values() if q.name in str(refusal.value).split("for example ")[1].split(" ")]
    assert named and all(q.bits_per_weight <= 2.1 for q in named)


def test_refusal_above_names_a_type_that_would_reach_the_target() -> None:
    with pytest.raises(BudgetError, match="--types"):
        require_reachable(make_spec(3), BitBudget("bits", 5.0), AllocationOptions(types=parse_types(["Q2_K", "Q4_K"])))


def test_refusal_below_blames_rows_that_do_not_fit() -> None:
    spec = make_spec(3, width=288)
    with pytest.raises(BudgetError, match=r"rows of 288 weights .* --granularity tensor"):
        require_reachable(spec, BitBudget("bits", 4), AllocationOptions(granularity="layer"))


def test_k_types_are_never_offered_to_rows_that_do_not_fit() -> None:
    spec = make_spec(3, width=288)
    for group in build_problem(spec, BITS, AllocationOptions(granularity="tensor")).groups:
        (tensor,) = group.tensors
        assert any(q.block_size == 256 for q in group.choices) == (tensor.role == "ffn_down")


def test_layer_with_a_row_that_does_not_fit_gets_small_blocks_only() -> None:
    spec = make_spec(3, width=288)
    plan = plan_of(spec, BitBudget("bits", 5.0), make_scores(spec), AllocationOptions(granularity="layer"))
    assert all(QUANT_TYPES[name].block_size <= 32 for name in one_type_per_layer(spec, plan))


def test_no_type_that_fits_is_refused_with_types_that_do() -> None:
    with pytest.raises(BudgetError, match=r"288.* weights in layer 0; .*Q4_0"):
        build_problem(make_spec(3, width=288), BITS, AllocationOptions(types=K_TYPES, granularity="layer"))


def test_types_that_need_importance_are_not_offered_without() -> None:
    assert not any(q.needs_imatrix for q in types_on_offer(DEFAULT_LADDER, has_imatrix=False))
    assert types_on_offer(DEFAULT_LADDER, has_imatrix=True) == DEFAULT_LADDER


def test_nothing_left_to_offer_is_refused() -> None:
    with pytest.raises(BudgetError, match="IQ2_XXS"):
        types_on_offer(parse_types(["IQ2_XXS"]), has_imatrix=False)


def test_one_type_needs_no_scores() -> None:
    spec = make_spec(3)
    assert build_problem(spec, BITS, AllocationOptions(types=(QUANT_TYPES["Q4_K"],))).has_single_choice
    assert not build_problem(spec, BITS, AllocationOptions(types=K_TYPES)).has_single_choice


def outer_types(tied: bool, bits: float = 2.7, width: int = 256, **changes: Any) -> dict[str, str]:
    spec = make_spec(3, tied=tied, width=width)
    types = K_TYPES if width % 256 == 0 else DEFAULT_LADDER
    plan = plan_of(spec, BitBudget("bits", bits), make_scores(spec), AllocationOptions(types=types, **changes))
    return {t.name: plan.types[t.name] for t in spec.outer_matrices}


def test_tied_embedding_is_good_enough_for_an_output() -> None:
    assert outer_types(tied=True) == {"token_embd.weight": "Q6_K"}


@pytest.mark.parametrize(("bits", "embedding"), [(2.625, "Q2_K"), (2.7, "Q3_K"), (3.5, "Q4_K"), (5.0, "Q5_K")])
def test_untied_embedding_has_at_least_the_bits_of_the_layers(bits: float, embedding: str) -> None:
    assert outer_types(tied=False, bits=bits) == {"token_embd.weight": embedding, "output.weight": "Q6_K"}


def test_rows_that_do_not_fit_k_types_get_a_small_block_outside_too() -> None:
    assert outer_types(tied=True, bits=5.0, width=288) == {"token_embd.weight": "Q8_0"}


def test_embedding_and_output_types_can_be_asked_for() -> None:
    found = outer_types(tied=False, embedding_type=QUANT_TYPES["Q4_K"], output_type=QUANT_TYPES["Q8_0"])
    assert found == {"token_embd.weight": "Q4_K", "output.weight": "Q8_0"}


@pytest.mark.parametrize("option", ["embedding_type", "output_type"])
def test_tied_embedding_takes_either_request(option: str) -> None:
    assert outer_types(True, 2.7, 256, **{option: QUANT_TYPES["Q4_K"]}) == {"token_embd.weight": "Q4_K"}


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_type_that_needs_importance_is_refused(tied: bool) -> None:
    with pytest.raises(BudgetError, match=r"token_embd\.weight .* cannot be IQ2_XXS"):
        outer_types(tied=tied, embedding_type=QUANT_TYPES["IQ2_XXS"])


def test_output_type_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"token_embd\.weight .* cannot be Q4_K"):
        outer_types(tied=True, bits=5.0, width=288, output_type=QUANT_TYPES["Q4_K"])


def test_unquantised_types_leave_the_embedding_unquantised() -> None:
    spec = make_spec(3, tied=False)
    plan = plan_of(spec, BitBudget("bits", 16.0), None, AllocationOptions(types=(QUANT_TYPES["F16"],)))
    assert {plan.types[t.name] for t in spec.outer_matrices} == {"F16"}


def test_every_tensor_has_a_type_and_norms_stay_in_f32() -> None:
    spec = make_spec(3, tied=False)
    plan = plan_of(spec, BitBudget("bits", 3.0), make_scores(spec), AllocationOptions(types=K_TYPES))
    plan.check(spec)
    assert {plan.types[t.name] for t in spec.tensors if not t.is_matrix} == {"F32"}


def test_plan_records_what_it_was_made_with() -> None:
    spec = make_spec(3)
    scores, budget = make_scores(spec), BitBudget("bits", 3.0)
    plan = plan_of(spec, budget, scores, AllocationOptions(method="lieq-ladder", scorer="lim", types=K_TYPES))
    assert (plan.method, plan.scorer, plan.budget, plan.layer_scores) == (
        "lieq-ladder", "lim", budget, scores.by_scorer["lim"],
    )  # fmt: skip
    assert plan.reachable_bpw == (2.625, 6.5625)


def test_scores_without_a_type_are_refused_by_its_name() -> None:
    spec = make_spec(3)
    scores = make_scores(spec)
    errors = {name: {"Q2_K": 0.1} for name in scores.type_errors}
    with pytest.raises(FormatError, match="Q3_K"):
        plan_of(spec, BitBudget("bits", 3.0), replace(scores, type_errors=errors), AllocationOptions(types=K_TYPES))


def test_scores_without_the_scorer_are_refused_by_its_name() -> None:
    spec = make_spec(3)
    with pytest.raises(FormatError, match="'mine'"):
        plan_of(spec, BitBudget("bits", 3.0), make_scores(spec), AllocationOptions(scorer="mine", types=K_TYPES))


def test_what_the_solver_prints_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced_native_stdout():
        os.write(1, b"from C")
    sys.stdout.write("result\n")
    seen = capfd.readouterr()
    assert seen.out == "result\n"
    assert seen.err == ""


def test_reachable_is_in_stored_bits_also_for_a_nominal_target() -> None:
    spec = make_spec(3)
    problem = build_problem(spec, BitBudget("nominal", 4), AllocationOptions(types=parse_types(["Q4_K"])))
    assert problem.layer_bpw_range == (4.5, 4.5)


def file_bytes(spec: ModelSpec, plan: QuantPlan, header_bytes: int = 0) -> int:
    """Size of a file from block sizes alone; tensors begin at multiples of 32."""
    total = header_bytes
    for tensor in spec.tensors:
        quant_type = QUANT_TYPES[plan.types[tensor.name]]
        n_bytes = prod(tensor.shape) // quant_type.block_size * quant_type.block_bytes
        total += -(-n_bytes // 32) * 32
    return total


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("tied", [True, False])
def test_file_is_never_larger_than_asked(method: str, tied: bool) -> None:
    spec = make_spec(12, tied=tied)
    scores = make_scores(spec)
    for share in (0.25, 0.4, 0.5):
        size = int(share * 2 * spec.n_weights)
        plan = plan_of(spec, BitBudget("size", size), scores, AllocationOptions(method=method), 5000)
        assert file_bytes(spec, plan, 5000) <= size
        if METHODS[method].weighs_outer:
            assert file_bytes(spec, plan, 5000) >= 0.98 * size


def test_bits_of_the_file_are_its_size_over_all_weights() -> None:
    spec = make_spec(12)
    bits = 4.2
    plan = plan_of(spec, BitBudget("file-bits", bits), make_scores(spec), AllocationOptions(), 5000)
    size = int(Fraction(str(bits)) * spec.n_weights) // 8
    assert plan.types == plan_of(spec, BitBudget("size", size), make_scores(spec), AllocationOptions(), 5000).types


def test_embedding_is_part_of_the_problem_where_the_file_counts() -> None:
    spec = make_spec(6, tied=False)
    scores = make_scores(spec)
    dear = replace(scores, sensitivities=dict(scores.sensitivities) | {"output.weight": 1e3, "token_embd.weight": 1e-6})
    types = plan_of(spec, BitBudget("file-bits", 3.5), dear, AllocationOptions(types=K_TYPES)).types
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q2_K", "Q6_K")
    cheap = replace(
        scores, sensitivities=dict(scores.sensitivities) | {"output.weight": 1e-6, "token_embd.weight": 1e3}
    )
    types = plan_of(spec, BitBudget("file-bits", 3.5), cheap, AllocationOptions(types=K_TYPES)).types
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q6_K", "Q2_K")


def test_scores_that_do_not_know_the_embedding_are_refused_only_where_they_are_needed() -> None:
    spec = make_spec(3)
    scores = make_scores(spec)
    errors = {name: e for name, e in scores.type_errors.items() if name != "token_embd.weight"}
    old = replace(scores, type_errors=errors)
    plan_of(spec, BITS, old, AllocationOptions())
    with pytest.raises(FormatError, match=r"token_embd\.weight.*score again"):
        plan_of(spec, BitBudget("file-bits", 4.0), old, AllocationOptions())


def test_too_small_a_file_is_refused_with_range_and_reason() -> None:
    spec = make_spec(3)
    with pytest.raises(BudgetError, match=r"--size 100000 .* [\d,]+ to [\d,]+ bytes; embedding and output are \d+% of"):
        require_reachable(spec, BitBudget("size", 100_000), AllocationOptions())


def test_refusal_names_an_embedding_that_was_fixed() -> None:
    spec = make_spec(3)
    allocation = AllocationOptions(types=K_TYPES, embedding_type=QUANT_TYPES["Q8_0"])
    with pytest.raises(BudgetError, match="in Q8_0; --embedding-type Q4_K makes them small enough"):
        require_reachable(spec, BitBudget("file-bits", 3.0), allocation)


@pytest.mark.parametrize("method", list(METHODS))
def test_pinned_tensors_keep_their_type_and_count(method: str) -> None:
    spec = make_spec(12)
    pins = (Pin(r"blk\.3\.ffn_down", QUANT_TYPES["Q8_0"]), Pin("ffn_down", QUANT_TYPES["Q5_K"]))
    allocation = AllocationOptions(method=method, types=K_TYPES, pins=pins)
    plan = plan_of(spec, BitBudget("bits", 4.1), make_scores(spec), allocation)
    assert plan.types["blk.3.ffn_down.weight"] == "Q8_0"
    assert {plan.types[f"blk.{i}.ffn_down.weight"] for i in range(12) if i != 3} == {"Q5_K"}
    assert layer_bits(spec, plan) <= layer_limit(spec, 4.1)


def test_pins_reach_the_embedding() -> None:
    spec = make_spec(3)
    plan = plan_of(spec, BITS, make_scores(spec), AllocationOptions(pins=(Pin("token_embd", QUANT_TYPES["Q4_K"]),)))
    assert plan.types["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("pattern", "name", "message"),
    [
        ("no_such", "Q4_K", "matches no matrix"),
        ("attn_norm", "Q4_K", "matches no matrix"),
        ("attn_q", "Q4_K", "does not fit its rows"),
        ("token_embd", "IQ2_S", "needs an importance matrix"),
    ],
)
def test_pins_that_cannot_hold_are_refused(pattern: str, name: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        require_reachable(
            make_spec(3, width=288 if name == "Q4_K" else 256), BitBudget("bits", 5.0),
            AllocationOptions(pins=(Pin(pattern, QUANT_TYPES[name]),)),
        )  # fmt: skip


def test_a_pin_that_breaks_the_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        require_reachable(make_spec(3), BITS, AllocationOptions(pins=(Pin("ffn", QUANT_TYPES["Q8_0"]),)))


@pytest.mark.parametrize(("bits", "kind"), [(2.7, "bits"), (3.4, "bits"), (3.0, "file-bits"), (4.3, "file-bits")])
def test_cpu_profile_is_as_fast_and_as_good_as_the_best_file_of_k_types(bits: float, kind: BudgetKind) -> None:
    spec = make_spec(24)
    scores, budget = make_scores(spec), BitBudget(kind, bits)
    k_types = parse_types(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"])
    cpu = plan_of(spec, budget, scores, AllocationOptions(profile="cpu"), costs=COSTS)
    of_k_types = plan_of(spec, budget, scores, AllocationOptions(types=k_types))
    assert COSTS.seconds(spec.tensors, cpu.types) <= COSTS.seconds(spec.tensors, of_k_types.types) * (1 + 1e-6)
    assert cpu.expected_kld is not None and of_k_types.expected_kld is not None
    assert cpu.expected_kld <= of_k_types.expected_kld * 1.1  # what is made least weighs layers by their scores


def test_below_k_types_a_file_may_be_little_slower_than_the_fastest() -> None:
    spec = make_spec(24)
    cpu, free = (
        plan_of(spec, BitBudget("bits", 2.3), make_scores(spec), AllocationOptions(profile=profile), costs=COSTS)
        for profile in ("cpu", "quality")
    )
    assert COSTS.seconds(spec.tensors, cpu.types) < 0.99 * COSTS.seconds(spec.tensors, free.types)


def test_cpu_profile_costs_quality_and_quality_costs_speed() -> None:
    spec = make_spec(24)
    scores, budget = make_scores(spec), BitBudget("bits", 2.4)
    cpu, quality = (
        plan_of(spec, budget, scores, AllocationOptions(profile=profile), costs=COSTS) for profile in ("cpu", "quality")
    )
    assert cpu.expected_kld is not None and quality.expected_kld is not None
    assert cpu.expected_kld > quality.expected_kld
    assert COSTS.seconds(spec.tensors, cpu.types) < COSTS.seconds(spec.tensors, quality.types)


@pytest.mark.parametrize("bits", [6.4, 7.0, 8.5, 10.0, 16.0])
def test_cpu_profile_uses_large_budgets(bits: float) -> None:
    spec = make_spec(12)
    allocation = AllocationOptions(profile="cpu")
    plan = plan_of(spec, BitBudget("bits", bits), make_scores(spec), allocation, costs=COSTS)
    assert layer_bits(spec, plan) >= 0.99 * layer_limit(spec, bits)


def test_all_pinned_leaves_nothing_to_choose() -> None:
    spec = make_spec(3)
    pins = (Pin(".", QUANT_TYPES["Q4_K"]),)
    plan = plan_of(spec, BitBudget("bits", 4.5), None, AllocationOptions(pins=pins, profile="cpu"), costs=COSTS)
    assert {plan.types[t.name] for t in spec.tensors if t.is_matrix} == {"Q4_K"}
    with pytest.raises(BudgetError, match="tokens/s"):
        allocation = AllocationOptions(pins=pins, min_tokens_per_sec=1e12)
        require_reachable(spec, BitBudget("bits", 4.5), allocation, costs=COSTS)
    with pytest.raises(BudgetError, match=r"21 matrices of the layers are pinned; leave out --pin$"):
        require_reachable(spec, BitBudget("bits", 4.0), AllocationOptions(pins=pins))


def test_pins_of_all_that_takes_time_leave_the_embedding_free() -> None:
    spec = make_spec(3, tied=False)
    allocation = AllocationOptions(pins=(Pin("blk|output", QUANT_TYPES["Q4_K"]),), profile="cpu")
    plan = plan_of(spec, BitBudget("file-bits", 5.3), make_scores(spec), allocation, costs=COSTS)
    assert plan.types["token_embd.weight"] != "Q2_K"


def test_pin_and_embedding_type_must_agree() -> None:
    pins = (Pin("token_embd", QUANT_TYPES["Q2_K"]),)
    with pytest.raises(BudgetError, match=r"you pinned .* to Q2_K and also asked for Q8_0"):
        require_reachable(make_spec(3), BITS, AllocationOptions(pins=pins, embedding_type=QUANT_TYPES["Q8_0"]))


def test_nominal_target_counts_pins() -> None:
    spec = make_spec(12)
    pins = (Pin("ffn_down", QUANT_TYPES["Q8_0"]),)
    plan = plan_of(spec, BitBudget("nominal", 4.0), make_scores(spec), AllocationOptions(types=K_TYPES, pins=pins))
    matrices = [t for layer in spec.layer_matrices for t in layer]
    digits = sum(QUANT_TYPES[plan.types[t.name]].nominal_bits * t.n_weights for t in matrices)
    assert 0.97 * 4 <= digits / spec.n_layer_weights <= 4


def test_printed_range_can_be_had() -> None:
    spec = make_spec(3)
    with pytest.raises(BudgetError) as refusal:
        require_reachable(spec, BitBudget("size", 100_000), AllocationOptions(), 5000)
    low, high = re.findall(r"([\d,]{6,})", str(refusal.value))[-2:]
    for text in (low, high):
        require_reachable(spec, BitBudget("size", int(text.replace(",", ""))), AllocationOptions(), 5000)


def test_edge_profile_has_k_and_legacy_types_alone() -> None:
    types = types_on_offer(tuple(QUANT_TYPES.values()), has_imatrix=True, profile="edge")
    assert {q.name for q in types} == {
        "F32", "F16", "BF16", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    }  # fmt: skip
    with pytest.raises(BudgetError, match="--profile edge"):
        types_on_offer(parse_types(["IQ4_XS"]), has_imatrix=True, profile="edge")


def test_speed_set_by_hand_is_kept() -> None:
    spec = make_spec(24)
    scores, budget = make_scores(spec), BitBudget("bits", 3.3)
    free = plan_of(spec, budget, scores, AllocationOptions(), costs=COSTS)
    wanted = 1.1 / COSTS.seconds(spec.tensors, free.types)
    plan = plan_of(spec, budget, scores, AllocationOptions(min_tokens_per_sec=wanted), costs=COSTS)
    assert 1 / COSTS.seconds(spec.tensors, plan.types) >= wanted * (1 - 1e-6)


def test_speed_out_of_reach_is_refused_with_the_speed_there_is() -> None:
    with pytest.raises(BudgetError, match=r"can have \d+\.\d tokens/s \(a test\)"):
        require_reachable(make_spec(3), BITS, AllocationOptions(min_tokens_per_sec=1e9), costs=COSTS)
    with pytest.raises(BudgetError, match="--method lieq does not consider"):
        require_reachable(make_spec(3), BITS, AllocationOptions("lieq", min_tokens_per_sec=1), costs=COSTS)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_more_budget_never_means_more_damage(granularity: Granularity, seed: int) -> None:
    spec = make_spec(10)
    scores = make_scores(spec, seed)
    allocation = AllocationOptions("block-error", granularity=granularity)
    found = [
        plan_of(spec, BitBudget("bits", bits), scores, allocation).expected_kld
        for bits in np.arange(2.1, 8, 0.3).round(3)
    ]
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(found))  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(4))
def test_what_scores_foretell_is_the_sum_over_all_matrices(seed: int) -> None:
    spec = make_spec(4, tied=False)
    scores = make_scores(spec, seed)
    plan = plan_of(spec, BITS, scores, AllocationOptions(types=K_TYPES))
    total = sum(scores.sensitivities[t.name] * scores.type_errors[t.name][plan.types[t.name]]
                for t in spec.tensors if t.is_matrix)  # fmt: skip
    assert plan.expected_kld == pytest.approx(2.0 * total)

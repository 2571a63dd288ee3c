from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lieq_gguf.allocation.methods import METHODS
from lieq_gguf.allocation.problem import PROFILES
from lieq_gguf.cli import options
from lieq_gguf.errors import ScoringError
from lieq_gguf.records.measurement import LayerMeasurement, Spectrum
from lieq_gguf.scorers import ENTRY_POINTS, score_layers, scorers
from lieq_gguf.scorers.energy_gain import top_energy
from lieq_gguf.scorers.lieq import compactness, compactness_gain
from lieq_gguf.scorers.spectrum import energy_spectrum
from lieq_gguf.scorers.zd import z_share

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
Matrix = npt.NDArray[np.float64]


def effective_rank(projection: Matrix) -> float:
    return compactness(energy_spectrum(torch.from_numpy(projection)))


def effective_rank_by_svd(projection: Matrix) -> float:
    energies = np.linalg.svd(projection, compute_uv=False) ** 2
    p = energies / energies.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def gaussian(n_rows: int, n_columns: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((n_rows, n_columns))


def orthogonal(n_rows: int, n_columns: int, seed: int = 0) -> Matrix:
    return np.linalg.qr(gaussian(n_rows, n_columns, seed))[0]


def flat(n: int) -> Spectrum:
    return np.full(n, 1 / n)


def measurement(**changes: Any) -> LayerMeasurement:
    values: dict[str, Any] = {
        "layer": 0,
        "cosine": 0.5,
        "z_share": 0.15,
        "spectra": dict.fromkeys(ROLES, flat(2)),
        "twin_spectra": dict.fromkeys(ROLES, flat(4)),
        "block_errors": dict.fromkeys(ROLES, 0.1),
        "perplexity_drop": 1.0,
    }
    return LayerMeasurement(**(values | changes))


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)], ids=["tall", "wide"])
def test_rank_one_has_compactness_one(shape: tuple[int, int]) -> None:
    projection = np.outer(gaussian(shape[0], 1)[:, 0], gaussian(shape[1], 1, seed=1)[:, 0])
    assert effective_rank(projection) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("transpose", [False, True], ids=["tall", "wide"])
def test_equal_energies_have_compactness_of_their_number(transpose: bool) -> None:
    projection = 7.0 * orthogonal(40, 12)
    assert effective_rank(projection.T.copy() if transpose else projection) == pytest.approx(12, rel=1e-9)


@pytest.mark.parametrize("factor", [1e-6, -3.0, 1e6])
def test_compactness_does_not_change_with_scale(factor: float) -> None:
    projection = gaussian(30, 20)
    assert effective_rank(factor * projection) == pytest.approx(effective_rank(projection), rel=1e-9)


def test_compactness_does_not_change_with_rotation() -> None:
    projection = gaussian(30, 20)
    rotated = orthogonal(30, 30, seed=1) @ projection @ orthogonal(20, 20, seed=2)
    assert effective_rank(rotated) == pytest.approx(effective_rank(projection), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (32, 32)], ids=["tall", "wide", "square"])
def test_compactness_agrees_with_numpys_singular_values(shape: tuple[int, int], seed: int) -> None:
    projection = gaussian(*shape, seed) @ np.diag(np.geomspace(1, 100, shape[1]))
    assert effective_rank(projection) == pytest.approx(effective_rank_by_svd(projection), rel=1e-8)


@pytest.mark.parametrize("shape", [(64, 24), (24, 64)], ids=["tall", "wide"])
def test_spectrum_agrees_with_numpys_singular_values(shape: tuple[int, int]) -> None:
    projection = gaussian(*shape)
    energies = np.linalg.svd(projection, compute_uv=False) ** 2
    np.testing.assert_allclose(energy_spectrum(torch.from_numpy(projection)), energies / energies.sum(), rtol=1e-9)


def test_spectrum_keeps_weak_directions_beside_a_massive_one() -> None:
    projection = gaussian(50, 10) @ np.diag([1e4, *[1.0] * 9])
    energies = np.linalg.svd(projection, compute_uv=False) ** 2
    in_float32 = energy_spectrum(torch.from_numpy(projection).float())
    np.testing.assert_allclose(in_float32, energies / energies.sum(), rtol=1e-3)


@pytest.mark.parametrize(
    "projection",
    [
        torch.zeros(0, 4),
        torch.zeros(4, 0),
        torch.tensor([[1.0, float("nan")]]),
        torch.tensor([[1.0, float("inf")]]),
        torch.ones(4),
    ],
    ids=["no tokens", "no columns", "nan", "infinite", "a vector"],
)
def test_spectrum_refuses(projection: torch.Tensor) -> None:
    with pytest.raises(ScoringError):
        energy_spectrum(projection)


def test_gain_of_two_directions_of_four_is_a_half() -> None:
    assert compactness_gain(np.array([0.5, 0.5, 0.0, 0.0]), flat(4)) == pytest.approx(0.5)


def test_gain_is_negative_where_training_has_spread_the_energy() -> None:
    assert compactness_gain(flat(4), flat(2)) == pytest.approx(-1.0)


@pytest.mark.parametrize(("rank", "k"), [(1, 1), (20, 1), (21, 2), (40, 2), (140, 7), (320, 16), (512, 26)])
def test_top_energy_sums_the_strongest_twentieth(rank: int, k: int) -> None:
    spectrum = np.sort(np.random.default_rng(rank).random(rank))[::-1]
    spectrum = spectrum / spectrum.sum()
    assert top_energy(spectrum) == pytest.approx(spectrum[:k].sum(), rel=1e-12)


def test_energy_gain_is_the_mean_difference_over_projections() -> None:
    trained = {"attn_q": np.array([0.9, 0.1]), "ffn_up": np.array([0.7, 0.3])}
    twin = {"attn_q": np.array([0.6, 0.4]), "ffn_up": np.array([0.5, 0.5])}
    (score,) = scorers()["energy-gain"].load()([measurement(spectra=trained, twin_spectra=twin)])
    assert score == pytest.approx((0.3 + 0.2) / 2)


def test_lieq_is_the_mean_gain_over_all_projections() -> None:
    spectra = dict.fromkeys(ROLES, flat(2)) | {"ffn_down": flat(4)}
    (score,) = scorers()["lieq"].load()([measurement(spectra=spectra)])
    assert score == pytest.approx((6 * 0.5 + 0.0) / 7)


def test_lieq_qkv_is_the_mean_gain_over_query_key_and_value() -> None:
    spectra = {"attn_q": flat(1), "attn_k": flat(2), "attn_v": flat(4)} | dict.fromkeys(ROLES[3:], flat(1))
    (score,) = scorers()["lieq-qkv"].load()([measurement(spectra=spectra)])
    assert score == pytest.approx((0.75 + 0.5 + 0.0) / 3)


def test_lim_is_minus_the_cosine() -> None:
    before, after = gaussian(6, 16), gaussian(6, 16, seed=1)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = float(((before * after).sum(axis=1) / norms).mean())
    (score,) = scorers()["lim"].load()([measurement(cosine=cosine)])
    assert score == pytest.approx(-cosine)


def test_z_share_of_known_weights() -> None:
    # mean 2.5, standard deviation 4.33: only the 10 is above 6.83
    assert z_share([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 10.0]])]) == 0.25


def test_z_share_divides_by_the_number_of_weights() -> None:
    # 2 is above 1 + 0.816, not above 1 + 1, which division by one less would give
    assert z_share([torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]])]) == pytest.approx(1 / 3)


def test_z_share_pools_matrices_of_different_scale() -> None:
    matrices = [gaussian(20, 30) * 3 + 1, gaussian(50, 10, seed=1)]
    pooled = np.concatenate([m.ravel() for m in matrices])
    expected = float(((pooled - pooled.mean()) / pooled.std() > 1).mean())
    assert z_share([torch.from_numpy(m) for m in matrices]) == expected


def test_equal_weights_are_least_important() -> None:
    assert z_share([torch.ones(3, 3), torch.ones(2, 3)]) == 1


def test_projections_that_are_all_zero_are_left_out() -> None:
    """As in a layer that does nothing yet."""
    nothing = energy_spectrum(torch.zeros(3, 4))
    assert not nothing.any()
    twin = {"attn_q": flat(4), "attn_k": flat(4)}
    some, mixed, none = (
        measurement(spectra={"attn_q": query, "attn_k": key}, twin_spectra=twin)
        for query, key in ((flat(2), flat(2)), (flat(2), nothing), (nothing, nothing))
    )
    for name in ("lieq", "lieq-qkv", "energy-gain"):
        of_some, of_mixed, of_none = scorers()[name].load()([some, mixed, none])
        assert of_some == of_mixed > of_none == 0


MORE_IMPORTANT: dict[str, Callable[[], LayerMeasurement]] = {
    "lieq": lambda: measurement(spectra=dict.fromkeys(ROLES, flat(1))),
    "lieq-qkv": lambda: measurement(spectra=dict.fromkeys(ROLES, flat(1))),
    "energy-gain": lambda: measurement(spectra=dict.fromkeys(ROLES, flat(1))),
    "lim": lambda: measurement(cosine=0.1),
    "zd": lambda: measurement(z_share=0.05),
    "block-error": lambda: measurement(block_errors=dict.fromkeys(ROLES, 0.2)),
    "perplexity-drop": lambda: measurement(perplexity_drop=5.0),
}


@pytest.mark.parametrize("scorer", scorers())
def test_a_more_important_layer_scores_higher(scorer: str) -> None:
    ordinary, important = scorers()[scorer].load()([measurement(), MORE_IMPORTANT[scorer]()])
    assert important > ordinary


def test_block_error_is_the_sum_over_the_matrices() -> None:
    (score,) = scorers()["block-error"].load()([measurement(block_errors={"attn_q": 0.25, "ffn_up": 0.5})])
    assert score == 0.75


def test_perplexity_drop_that_was_not_measured_is_left_out() -> None:
    without = measurement(perplexity_drop=None)
    assert "perplexity-drop" not in score_layers([without])
    assert score_layers([measurement()])["perplexity-drop"] == (1.0,)
    with pytest.raises(ScoringError, match="did not measure"):
        scorers()["perplexity-drop"].load()([without])


@pytest.fixture
def another_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Pretend that another package names a scorer of this module."""

    def announce(name: str) -> None:
        entry = EntryPoint("mine", f"{__name__}:{name}", ENTRY_POINTS)
        monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == ENTRY_POINTS else [])
        scorers.cache_clear()

    yield announce
    monkeypatch.undo()
    scorers.cache_clear()


def by_position(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    return tuple(float(m.layer) for m in measurements)


def without_numbers(measurements: Sequence[LayerMeasurement]) -> tuple[float, ...]:
    return tuple(float("nan") for _ in measurements)


def test_scorer_of_another_package_is_found(another_package: Callable[[str], None]) -> None:
    another_package("by_position")
    assert score_layers([measurement(), measurement(layer=1)])["mine"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("not_there", "scorer test_scorers:not_there cannot be loaded"), ("without_numbers", "'mine'.*finite numbers")],
)
def test_bad_scorer_of_another_package_is_named(
    another_package: Callable[[str], None], name: str, message: str
) -> None:
    another_package(name)
    with pytest.raises(ScoringError, match=message):
        score_layers([measurement()])


def test_command_line_names_methods_and_profiles() -> None:
    assert get_args(options.MethodName) == tuple(METHODS)
    assert get_args(options.ProfileName) == tuple(PROFILES)

"""The multiple-choice knapsack: one option per group with the least total damage, within limits on size and time.

HiGHS solves it exactly, up to a gap: first the relaxation, in which options may be mixed, which almost solves it and
rules out most options; then the rest in integers. Sizes are integers, and their limit holds to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import BudgetError
from lieq_gguf.native.silence import silenced_native_stdout

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FloatArray: TypeAlias = npt.NDArray[np.float64]

GAP = 1e-3
"""Share of the damage by which a solution may miss the best one; damages themselves are off by some per cent."""

_SECONDS = 60.0
_TOLERANCE = 1e-7  # HiGHS's tolerance, for damages of about one


@dataclass(frozen=True)
class Option:
    """A choice for a group.

    Attributes:
        damage: Its sum is minimised.
        size: Bits.
        time: In the unit of the limit.
    """

    damage: float
    size: int
    time: float = 0.0


def solve(groups: Sequence[Sequence[Option]], size_limit: int, time_limit: float = np.inf) -> tuple[int, ...]:
    """The best option of each group, by index.

    Args:
        groups: Options of each group; at least one.
        size_limit: Largest sum of sizes.
        time_limit: Largest sum of times.

    Returns:
        An index into each group. The same for the same input.

    Raises:
        BudgetError: if no choice is within both limits, or none is found in a minute.
    """
    if not groups:
        return ()
    timed = bool(np.isfinite(time_limit))
    candidates = [(i, k) for i, options in enumerate(groups) for k in _undominated(options, timed)]
    scale = max(groups[i][k].damage for i, k in candidates)
    while True:
        program = _program(groups, candidates, size_limit, time_limit, max(scale, 1e-300))
        chosen = _solve(groups, program, size_limit)
        damage = sum(g[k].damage for g, k in zip(groups, chosen, strict=True))
        # HiGHS also stops at 10⁻⁶ of the scale. If that exceeds the gap, solve again with this damage as the scale;
        # an option with more damage than the whole solution cannot be part of a better one.
        if damage >= 1e-6 / GAP * scale or damage == 0:
            return chosen
        scale = damage
        candidates = [(i, k) for i, k in candidates if groups[i][k].damage <= damage]


@dataclass(frozen=True)
class _Program:
    """The problem as arrays for HiGHS.

    Attributes:
        candidates: Group of each option, and its index in the group.
        groups: ``[n_groups, n_options]``, 1 where an option belongs to a group.
        damage: Damage of each option, scaled to about one.
        sizes: Size of each option.
        uses: ``[n_limits, n_options]``, how much of each limit an option takes; sizes first, in whole units.
        limits: ``[n_limits]``.
    """

    candidates: tuple[tuple[int, int], ...]
    groups: csr_array
    damage: FloatArray
    sizes: npt.NDArray[np.int64]
    uses: FloatArray
    limits: FloatArray

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """Group of each option."""
        return np.array([i for i, _ in self.candidates])

    def among(self, keep: npt.NDArray[np.bool_]) -> _Program:
        """The same problem with fewer options."""
        columns = np.flatnonzero(keep)
        return _Program(
            tuple(self.candidates[j] for j in columns), self.groups[:, columns], self.damage[keep], self.sizes[keep],
            self.uses[:, keep], self.limits,
        )  # fmt: skip


def _solve(groups: Sequence[Sequence[Option]], program: _Program, size_limit: int) -> tuple[int, ...]:
    """The best options of a program, as an index into each group."""
    bound, reduced_costs, shares = _relaxed(program)
    rounded = _rounded(program, shares)
    if rounded is not None:
        excess = float(program.damage[rounded].sum()) - bound
        if excess <= GAP * (bound + excess):
            return _checked(groups, program, rounded, size_limit)
        # an option with a higher reduced cost cannot be part of a better solution
        program = program.among(reduced_costs <= excess + _TOLERANCE)
    return _checked(groups, program, _integers(program), size_limit)


def _program(
    groups: Sequence[Sequence[Option]],
    candidates: Sequence[tuple[int, int]],
    size_limit: int,
    time_limit: float,
    scale: float,
) -> _Program:
    """The options ``candidates`` (group, index in it) as arrays, with damages as multiples of ``scale``."""
    from scipy.sparse import csr_array

    sizes = np.array([groups[i][k].size for i, k in candidates], dtype=np.int64)
    times = np.array([groups[i][k].time for i, k in candidates])
    damage = np.array([groups[i][k].damage for i, k in candidates]) / scale
    members = csr_array(
        (np.ones(len(candidates)), ([i for i, _ in candidates], range(len(candidates)))),
        shape=(len(groups), len(candidates)),
    )
    unit = max(1, int(np.gcd.reduce(sizes)))
    uses, limits = [(sizes // unit).astype(float)], [float(size_limit // unit)]
    if np.isfinite(time_limit) and times.any():
        slowest = times.max()
        uses.append(times / slowest)
        limits.append(time_limit / slowest)
    return _Program(tuple(candidates), members, damage, sizes, np.array(uses), np.array(limits))


def _relaxed(program: _Program) -> tuple[float, FloatArray, FloatArray]:
    """The relaxation, in which options may be mixed: least damage, reduced cost and share of each option.

    No choice has less damage; a choice with a given option has at least this damage plus the option's reduced cost.
    """
    from scipy.optimize import linprog

    with silenced_native_stdout():  # HiGHS sometimes prints even if told to be silent
        solution = linprog(
            program.damage,
            A_ub=program.uses,
            b_ub=program.limits,
            A_eq=program.groups,
            b_eq=np.ones(program.groups.shape[0]),
        )
    if solution.x is None:
        raise BudgetError(f"no choice of types is within the limits: {solution.message}")
    prices = program.groups.T @ solution.eqlin.marginals + program.uses.T @ solution.ineqlin.marginals
    return float(solution.fun), program.damage - prices, solution.x


def _rounded(program: _Program, shares: FloatArray) -> npt.NDArray[np.int64] | None:
    """An option of each group, by index, close to ``shares``; None if too many groups are mixed or nothing fits.

    All options of the few mixed groups are tried. The rest of the limits is then spent where it removes most damage.
    """
    owner = program.owner
    chosen = np.zeros(program.groups.shape[0], dtype=np.int64)
    chosen[owner[np.argsort(shares, kind="stable")]] = np.argsort(shares, kind="stable")  # the largest is the last
    mixed = np.flatnonzero(shares[chosen] < 1 - _TOLERANCE)
    if len(mixed) > len(program.limits):
        return None
    best, least = None, np.inf
    for decided in product(*(np.flatnonzero(owner == group) for group in mixed)):
        chosen[mixed] = decided
        damage = program.damage[chosen].sum()
        if damage < least and (program.uses[:, chosen].sum(axis=1) <= program.limits).all():
            best, least = chosen.copy(), damage
    while best is not None:
        now = best[owner]
        left = program.limits - program.uses[:, best].sum(axis=1)
        fits = (program.uses - program.uses[:, now] <= left[:, None]).all(axis=0)
        gains = np.where(fits, program.damage[now] - program.damage, 0.0)
        better = int(np.argmax(gains))
        if gains[better] <= 0:
            break
        best[owner[better]] = better
    return best


def _integers(program: _Program) -> npt.NDArray[np.int64]:
    """The best option of each group, by index."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    with silenced_native_stdout():
        solution = milp(
            program.damage,
            integrality=np.ones(len(program.candidates)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(program.groups, 1, 1),
                LinearConstraint(program.uses, -np.inf, program.limits),
            ],
            options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
        )
    if solution.status == 1:
        raise BudgetError(f"found no plan in {_SECONDS:.0f} s; offer fewer types, or use --granularity layer")
    if solution.x is None:
        raise BudgetError(f"no choice of types is within the limits: {solution.message}")
    return np.flatnonzero(solution.x > 0.5)


def _checked(
    groups: Sequence[Sequence[Option]], program: _Program, chosen: npt.NDArray[np.int64], size_limit: int
) -> tuple[int, ...]:
    """The choice as an index into each group, checked against the limits."""
    pairs = [program.candidates[j] for j in chosen]
    if [i for i, _ in pairs] != list(range(len(groups))) or int(program.sizes[chosen].sum()) > size_limit:
        raise BudgetError("the solver broke the limits; please report this")
    return tuple(k for _, k in pairs)


def _undominated(options: Sequence[Option], timed: bool) -> list[int]:
    """Indices of the options that no other option matches or beats in everything; of equals, the first."""

    def key(option: Option) -> tuple[float, ...]:
        return (option.size, option.damage, option.time) if timed else (option.size, option.damage)

    result: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (key(options[k]), k)):
        if not any(all(a <= b for a, b in zip(key(options[j]), key(options[k]), strict=True)) for j in result):
            result.append(k)
    return result

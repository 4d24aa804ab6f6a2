"""Bound, heuristics and enumeration of the core: needs numpy only.

What the reduction leaves open is enumerated block by block. A partial plan is a row of a table;
all partial plans are extended by all schemes of the next block at once, and those that cannot
become better than the incumbent, or cannot become feasible, are dropped. Blocks of one floor follow
one another, so that each floor is done with before the next one begins: its use is forgotten then,
and plans that differ in it alone are the same. If the table grows past ``MOST_NUMBERS`` the
enumeration is given up, and the core is branched upon.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxq.search.branch import Finished, solve
from mxq.search.problem import ROUNDING, AllocationProblem, Choice, Matrix, Solution
from mxq.search.reduce import Core
from mxq.search.rows import System

MOST_NUMBERS = 2_000_000
"""Of reduced costs and uses in a table: tens of milliseconds for each block."""


def solve_lagrangian(
    problem: AllocationProblem, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Solution:
    """The best plan found, with the bound; ``proven`` if its gap is at most ``gap``.

    Raises:
        InfeasibleError: If no plan meets all limits.
        RuntimeError: If no plan was found and none was ruled out.
    """
    return solve(problem, enumerate_core, gap=gap, time_limit_s=time_limit_s)


@dataclass(slots=True, eq=False)
class _Table:
    """Partial plans: reduced cost [P], use of each open row [rows, P], and how each came about.

    ``rows`` are the rows with members before and after this place; what those that are done with
    leave unused is paid for in ``reduced``.
    """

    rows: Choice
    reduced: Matrix
    used: Matrix
    history: list[tuple[NDArray[np.int32], NDArray[np.int8]]]


@dataclass(frozen=True, slots=True, eq=False)
class _Remaining:
    """What the blocks after each position use at least and at most, [positions + 1, rows]."""

    least: Matrix
    most: Matrix


def enumerate_core(core: Core, cut: float, gap: float, deadline: float) -> Finished | None:
    """The best choice of the open blocks below the cut, whatever the gap; None if given up."""
    system = core.system
    if system.loss_SB.shape[1] * (1 + len(system.rows)) > MOST_NUMBERS:
        return None
    cost_RSB = _dense_costs(system)
    priced_SB = system.priced(core.dual.prices)
    reduced_SB = priced_SB - priced_SB.min(axis=0)
    order = _order(system, reduced_SB)
    remaining = _remaining(cost_RSB, np.isfinite(reduced_SB), order)
    first, last = _ends(system, order)
    room = cut - core.bound
    table = _Table(np.zeros(0, dtype=np.intp), np.zeros(1), np.zeros((0, 1)), [])
    for position, block in enumerate(order):
        _open(table, np.flatnonzero(first == position))
        schemes = np.flatnonzero(np.isfinite(reduced_SB[:, block]))
        numbers = len(table.reduced) * len(schemes) * (1 + len(table.rows))
        if numbers > MOST_NUMBERS or time.monotonic() > deadline:
            return None
        _extend(table, schemes, reduced_SB[:, block], cost_RSB[:, :, block])
        rest = remaining.least[position + 1], remaining.most[position + 1]
        _prune(table, core, room, rest)
        _close(table, core, last > position)
        if position + 1 < len(order):
            _keep(table, _undominated(table, core, remaining.most[position + 1]))
    return Finished(np.inf, _best(table, core, order))


def _order(system: System, reduced_SB: Matrix) -> Choice:
    """Blocks of one floor after another, each time those that most of the floor hangs on first.

    Once they are chosen, most plans are sure to meet it. Blocks without a floor come with those
    first whose second choice is dear: they branch least.
    """
    blocks = reduced_SB.shape[1]
    floor_B, stake_B = np.zeros(blocks, dtype=np.intp), np.zeros(blocks)
    if len(reduced_SB) > 1:
        stake_B = np.sort(reduced_SB, axis=0)[1]
    for index, row in enumerate(system.rows):
        if row.members is not None and row.members.size:
            floor_B[row.members] = index
            stake_B[row.members] = np.ptp(row.cost_SM, axis=0)
    order: Choice = np.lexsort((-stake_B, floor_B))
    return order


def _ends(system: System, order: Choice) -> tuple[Choice, Choice]:
    """Places in the order of the first and the last member of each row; 0 if it has none."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    places = [row.of_members(place) if row.cost_SM.size else np.zeros(1) for row in system.rows]
    first, last = [at.min() for at in places], [at.max() for at in places]
    return np.array(first, dtype=np.intp), np.array(last, dtype=np.intp)


def _dense_costs(system: System) -> Matrix:
    cost_RSB = np.zeros((len(system.rows), *system.loss_SB.shape))
    for index, row in enumerate(system.rows):
        cost_RSB[index][:, slice(None) if row.members is None else row.members] = row.cost_SM
    return cost_RSB


def _remaining(cost_RSB: Matrix, available_SB: NDArray[np.bool_], order: Choice) -> _Remaining:
    least_BR = np.where(available_SB, cost_RSB, np.inf).min(axis=1).T[order]
    most_BR = np.where(available_SB, cost_RSB, -np.inf).max(axis=1).T[order]
    nothing = np.zeros((1, len(cost_RSB)))
    least, most = (
        np.concatenate([np.cumsum(rows[::-1], axis=0)[::-1], nothing])
        for rows in (least_BR, most_BR)
    )
    return _Remaining(least, most)


def _open(table: _Table, rows: Choice) -> None:
    table.rows = np.concatenate([table.rows, rows])
    nothing = np.zeros((len(rows), len(table.reduced)))
    table.used = np.concatenate([table.used, nothing])


def _extend(table: _Table, schemes: Choice, reduced_S: Matrix, cost_RS: Matrix) -> None:
    plans = len(table.reduced)
    table.history.append(
        (
            np.repeat(np.arange(plans, dtype=np.int32), len(schemes)),
            np.tile(schemes.astype(np.int8), plans),
        )
    )
    table.reduced = (table.reduced[:, None] + reduced_S[schemes]).ravel()
    cost = cost_RS[table.rows[:, None], schemes]
    table.used = (table.used[:, :, None] + cost[:, None, :]).reshape(len(cost), -1)


def _prune(table: _Table, core: Core, room: float, rest: tuple[Matrix, Matrix]) -> None:
    """Drop plans that cannot meet the open rows any more, or lose too much."""
    limits, prices = core.system.limits[table.rows, None], core.dual.prices[table.rows]
    least, most = rest[0][table.rows, None], rest[1][table.rows, None]
    feasible = (table.used + least <= limits + _tolerance(table, limits)).all(axis=0)
    # Budget that can no longer be used is paid for: loss = bound + reduced + p . slack.
    slack = np.maximum(limits - table.used - most, 0.0)
    margin = 1e-12 * (abs(core.bound) + float(core.dual.prices @ np.abs(core.system.limits)))
    better = table.reduced + prices @ slack <= room + margin
    _keep(table, np.flatnonzero(feasible & better))


def _close(table: _Table, core: Core, is_open: NDArray[np.bool_]) -> None:
    """Forget the use of rows without members to come, once they are met; the rest is paid for."""
    done = ~is_open[table.rows]
    rows = table.rows[done]
    if not rows.size:
        return
    limits = core.system.limits[rows, None]
    _keep(
        table, np.flatnonzero((table.used[done] <= limits + ROUNDING * np.abs(limits)).all(axis=0))
    )
    unused = limits - table.used[done]
    table.reduced = table.reduced + core.dual.prices[rows] @ unused
    table.rows, table.used = table.rows[~done], table.used[~done]


def _undominated(table: _Table, core: Core, most: Matrix) -> Choice:
    """Plans that no other one beats in loss and use, as far as two sorts find them.

    One plan beats another that uses no less of the first row and loses no less, if it uses as much
    of each other row, or is sure to meet them whatever follows.
    """
    loss = table.reduced - core.dual.prices[table.rows] @ table.used
    if not len(table.rows):
        return np.array([loss.argmin()])
    first, others = table.used[0], table.used[1:]
    order = np.lexsort((loss, first, *others))
    is_new_group = np.concatenate([[0], (np.diff(others[:, order]) != 0).any(axis=0)])
    order = _beating_all_before(order, loss, is_new_group)
    if not len(others):
        return order
    limits = core.system.limits[table.rows[1:], None]
    is_sure = (others + most[table.rows[1:], None] <= limits).all(axis=0)
    order = order[np.lexsort((loss[order], first[order]))]
    sure_loss = np.where(is_sure, loss, np.inf)[order]
    lowest_before = np.concatenate([[np.inf], np.minimum.accumulate(sure_loss)[:-1]])
    return order[loss[order] < lowest_before]


def _beating_all_before(order: Choice, loss: Matrix, is_new_group: Choice) -> Choice:
    """Of plans in this order those that lose less than every one before them in their group."""
    place = np.empty(len(order), dtype=np.intp)
    place[np.argsort(loss[order], kind="stable")] = np.arange(len(order))
    place -= len(order) * np.cumsum(is_new_group)  # below all that the group before it has
    lowest_before = np.minimum.accumulate(place)[:-1]
    is_lower = np.concatenate([[True], place[1:] < lowest_before])
    beating: Choice = order[is_lower[: len(order)]]  # of no plan none
    return beating


def _tolerance(table: _Table, limits: Matrix) -> Matrix:
    """What rounding of sums may be over a limit."""
    tolerance: Matrix = 100 * ROUNDING * (np.abs(limits) + np.abs(table.used).max(initial=0.0))
    return tolerance


def _keep(table: _Table, plans: Choice) -> None:
    table.reduced, table.used = table.reduced[plans], table.used[:, plans]
    parent, scheme = table.history[-1]
    table.history[-1] = (parent[plans], scheme[plans])


def _best(table: _Table, core: Core, order: Choice) -> tuple[Choice, ...]:
    """The feasible choice of least loss, if any plan is left."""
    for plan in np.argsort(table.reduced, kind="stable")[:100]:
        choice = np.zeros(len(order), dtype=np.intp)
        for block, (parent, scheme) in zip(order[::-1], table.history[::-1], strict=True):
            choice[block] = scheme[plan]
            plan = parent[plan]
        if core.system.is_feasible(choice):
            return (choice,)
    return ()

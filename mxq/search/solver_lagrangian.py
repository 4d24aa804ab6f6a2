"""Bound, heuristics and enumeration of the core: needs numpy only.

What the reduction leaves open is enumerated block by block. A partial plan is a row of a table;
all partial plans are extended by all schemes of the next block at once, and those that cannot
become better than the incumbent, or cannot become feasible, are dropped. If the table grows past
``MOST_STATES`` the enumeration is given up, and the core is branched upon.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxq.search.branch import Finished, solve
from mxq.search.problem import ROUNDING, AllocationProblem, Choice, Matrix, Solution
from mxq.search.reduce import Core
from mxq.search.rows import System

MOST_STATES = 300_000


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
    """Partial plans: reduced cost [P], use of each row [rows, P], and how each came about."""

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
    if system.loss_SB.shape[1] * (1 + len(system.rows)) > MOST_STATES:
        return None
    cost_RSB = _dense_costs(system)
    priced_SB = system.priced(core.dual.prices)
    reduced_SB = priced_SB - priced_SB.min(axis=0)
    # Blocks whose second choice is dear come first: they branch least.
    order = np.argsort(-np.sort(reduced_SB, axis=0)[1]) if len(reduced_SB) > 1 else _all(system)
    remaining = _remaining(cost_RSB, np.isfinite(reduced_SB), order)
    room = cut - core.bound
    table = _Table(np.zeros(1), np.zeros((len(system.rows), 1)), [])
    for position, block in enumerate(order):
        _extend(table, reduced_SB[:, block], cost_RSB[:, :, block])
        _prune(table, core, room, (remaining.least[position + 1], remaining.most[position + 1]))
        if len(table.reduced) > MOST_STATES or time.monotonic() > deadline:
            return None
    return Finished(np.inf, _best(table, core, order))


def _all(system: System) -> Choice:
    return np.arange(system.loss_SB.shape[1])


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


def _extend(table: _Table, reduced_S: Matrix, cost_RS: Matrix) -> None:
    schemes = np.flatnonzero(np.isfinite(reduced_S))
    plans = len(table.reduced)
    table.history.append(
        (
            np.repeat(np.arange(plans, dtype=np.int32), len(schemes)),
            np.tile(schemes.astype(np.int8), plans),
        )
    )
    table.reduced = (table.reduced[:, None] + reduced_S[schemes]).ravel()
    extended = table.used[:, :, None] + cost_RS[:, None, schemes]
    table.used = extended.reshape(len(cost_RS), -1)


def _prune(table: _Table, core: Core, room: float, rest: tuple[Matrix, Matrix]) -> None:
    limits, prices = core.system.limits[:, None], core.dual.prices
    least, most = rest[0][:, None], rest[1][:, None]
    tolerance = 100 * ROUNDING * (np.abs(limits) + np.abs(table.used).max(initial=0.0))
    feasible = (table.used + least <= limits + tolerance).all(axis=0)
    # Budget that can no longer be used is paid for: loss = bound + reduced + p . slack.
    slack = np.maximum(limits - table.used - most, 0.0)
    margin = 1e-12 * (abs(core.bound) + float(prices @ np.abs(core.system.limits)))
    better = table.reduced + prices @ slack <= room + margin
    _keep(table, np.flatnonzero(feasible & better))
    _keep(table, _undominated(table, prices))


def _undominated(table: _Table, prices: Matrix) -> Choice:
    """Plans that no other one beats in loss and use; for several rows only equal use is seen."""
    loss = table.reduced - prices @ table.used
    order = np.lexsort((loss, *table.used[::-1]))
    if len(order) < 2:
        return order
    if len(table.used) == 1:
        lowest_before = np.minimum.accumulate(loss[order])[:-1]
        return np.concatenate([order[:1], order[1:][loss[order[1:]] < lowest_before]])
    used = table.used[:, order]
    differs = (used[:, 1:] != used[:, :-1]).any(axis=0)
    return np.concatenate([order[:1], order[1:][differs]])


def _keep(table: _Table, plans: Choice) -> None:
    table.reduced, table.used = table.reduced[plans], table.used[:, plans]
    parent, scheme = table.history[-1]
    table.history[-1] = (parent[plans], scheme[plans])


def _best(table: _Table, core: Core, order: Choice) -> tuple[Choice, ...]:
    """The feasible choice of least loss, if any plan is left."""
    slack = core.system.limits[:, None] - table.used
    total = table.reduced + core.dual.prices @ slack
    for plan in np.argsort(total, kind="stable")[:100]:
        choice = np.zeros(len(order), dtype=np.intp)
        for block, (parent, scheme) in zip(order[::-1], table.history[::-1], strict=True):
            choice[block] = scheme[plan]
            plan = parent[plan]
        if core.system.is_feasible(choice):
            return (choice,)
    return ()

"""The allocation problem: one scheme for each block, least total loss, within linear limits.

Everything here is numpy and knows nothing of models. Shapes: B blocks, S schemes, M members of a
floor. A problem is valid once constructed, and each limit can be met on its own; whether all can
be met together is found by a solver, which raises InfeasibleError if not.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxq.counted import counted

Matrix = NDArray[np.float64]
Choice = NDArray[np.intp]

Found = TypeVar("Found")

ROUNDING = 1e-14
"""Relative excess of a limit that counts as rounding: less than one bit in 10^13."""


class InfeasibleError(ValueError):
    """No plan meets all limits; the message says what the cheapest plan needs."""


def feasible(attempts: Sequence[Callable[[], Found]]) -> list[Found]:
    """What the attempts give, but for those that are infeasible.

    Raises:
        InfeasibleError: If all fail: that of the last one.
    """
    found, failed = [], InfeasibleError("nothing to choose from")
    for attempt in attempts:
        try:
            found.append(attempt())
        except InfeasibleError as error:
            failed = error
    if not found:
        raise failed
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """The chosen costs of all blocks, summed, are at most ``limit``.

    ``cost`` is [B, S]; entries of schemes that are not available to a block are not looked at.
    """

    name: str
    cost: Matrix
    limit: float

    def __post_init__(self) -> None:
        """Raise ValueError unless the costs are finite, not negative, and the limit a number."""
        object.__setattr__(self, "cost", _frozen_cost(self.cost, f"budget {self.name!r}"))
        if np.isnan(self.limit):
            raise ValueError(f"budget {self.name!r} has limit nan; give a number")


@dataclass(frozen=True, slots=True, eq=False)
class Floor:
    """The chosen costs of the member blocks, summed, are at least ``minimum``.

    ``members`` are M block numbers, ``cost`` is [M, S], one row for each member.
    """

    name: str
    members: Choice
    cost: Matrix
    minimum: float

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one row of valid costs for each member."""
        members = np.asarray(self.members, dtype=np.intp)
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "cost", _frozen_cost(self.cost, f"floor {self.name!r}"))
        if members.ndim != 1 or len(np.unique(members)) != len(self.cost):
            raise ValueError(
                f"floor {self.name!r} has members of shape {members.shape} and "
                f"{counted(len(self.cost), 'row')} of cost; give each member once and one row for "
                "each"
            )
        if np.isnan(self.minimum):
            raise ValueError(f"floor {self.name!r} has minimum nan; give a number")


@dataclass(frozen=True, slots=True, eq=False)
class AllocationProblem:
    """Choose one scheme for each block.

    ``loss`` is [B, S], infinite where a scheme is not available to a block.
    """

    loss: Matrix
    budgets: tuple[Budget, ...]
    floors: tuple[Floor, ...] = ()

    def __post_init__(self) -> None:
        """Check the shapes, and each limit on its own.

        Raises:
            ValueError: If shapes disagree, a loss is NaN, or a block has no available scheme.
            InfeasibleError: If one limit alone is out of reach.
        """
        object.__setattr__(self, "loss", _frozen(self.loss))
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "floors", tuple(self.floors))
        _check_loss(self.loss)
        for budget in self.budgets:
            _check_budget(self, budget)
        for floor in self.floors:
            _check_floor(self, floor)

    def total_loss(self, choice: Choice) -> float:
        """Sum of the chosen losses."""
        return float(self.loss[np.arange(len(self.loss)), choice].sum())

    def total_cost(self, budget: Budget, choice: Choice) -> float:
        """Sum of the chosen costs of a budget."""
        return float(budget.cost[np.arange(len(self.loss)), choice].sum())

    def is_feasible(self, choice: Choice) -> bool:
        """Whether every block has an available scheme and every limit holds."""
        blocks = np.arange(len(self.loss))
        if not np.isfinite(self.loss[blocks, choice]).all():
            return False
        within = all(
            self.total_cost(budget, choice) <= _grown(budget.limit) for budget in self.budgets
        )
        return within and all(
            -floor.cost[np.arange(len(floor.members)), choice[floor.members]].sum()
            <= _grown(-floor.minimum)
            for floor in self.floors
        )


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A feasible choice, and how far from the best it can be at most.

    ``choice`` is the scheme number of each block. No plan has less loss than ``bound``.
    ``proven`` says that the gap is at most the one asked for.
    """

    choice: Choice
    loss: float
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """The most by which the loss exceeds the best possible, relative to the loss."""
        return relative_gap(self.loss, self.bound)


class Solver(Protocol):
    """What solves an allocation problem, or raises; it never returns a guess as a proof."""

    def __call__(
        self, problem: AllocationProblem, *, gap: float = ..., time_limit_s: float = ...
    ) -> Solution:
        """Return the best plan found.

        Raises:
            InfeasibleError: If no plan meets all limits.
            RuntimeError: If no plan was found and none was ruled out.
        """


def relative_gap(loss: float, bound: float) -> float:
    """``(loss - bound) / |loss|``, 0 where the two are equal."""
    if loss <= bound:
        return 0.0
    return (loss - bound) / abs(loss) if loss != 0 else float("inf")


def tie(
    problem: AllocationProblem, groups: Sequence[Hashable]
) -> tuple[AllocationProblem, Callable[[Choice], Choice]]:
    """The smaller problem in which blocks of the same group share a scheme.

    ``groups`` is one label for each block. Loss and cost of a group are the sums over its blocks;
    a scheme is available if it is available to all of them. The second result turns a choice of
    the smaller problem into one of this problem.

    Raises:
        InfeasibleError: If the blocks of a group have no scheme in common.
    """
    if len(groups) != len(problem.loss):
        raise ValueError(
            f"{counted(len(groups), 'group label')} for {counted(len(problem.loss), 'block')}"
        )
    numbers: dict[Hashable, int] = {}
    of_block = np.array([numbers.setdefault(label, len(numbers)) for label in groups])
    loss = _summed(problem.loss, of_block, len(numbers))
    for label, number in numbers.items():
        if not np.isfinite(loss[number]).any():
            members = int((of_block == number).sum())
            have = "has" if members == 1 else "have"
            raise InfeasibleError(
                f"{counted(members, 'block')} of group {label!r} {have} no scheme in common; use a "
                "finer granularity or offer a scheme that fits them all"
            )
    budgets = tuple(
        Budget(budget.name, _summed(budget.cost, of_block, len(numbers)), budget.limit)
        for budget in problem.budgets
    )
    floors = tuple(_tied_floor(floor, of_block) for floor in problem.floors)
    return AllocationProblem(loss, budgets, floors), lambda choice: choice[of_block]


def _tied_floor(floor: Floor, of_block: Choice) -> Floor:
    members, position = np.unique(of_block[floor.members], return_inverse=True)
    return Floor(floor.name, members, _summed(floor.cost, position, len(members)), floor.minimum)


def _summed(rows: Matrix, of_row: NDArray[np.intp], groups: int) -> Matrix:
    total = np.zeros((groups, rows.shape[1]))
    np.add.at(total, of_row, rows)
    return total


def _grown(limit: float) -> float:
    return limit + abs(limit) * ROUNDING


def _frozen(values: ArrayLike) -> Matrix:
    matrix = np.array(values, dtype=np.float64)
    matrix.setflags(write=False)
    return matrix


def _frozen_cost(values: ArrayLike, owner: str) -> Matrix:
    cost = _frozen(values)
    if cost.ndim != 2:
        raise ValueError(f"{owner} has costs of shape {cost.shape}; a row for each block is needed")
    if not np.isfinite(cost).all() or (cost < 0).any():
        row, column = np.argwhere(~np.isfinite(cost) | (cost < 0))[0]
        raise ValueError(
            f"{owner} has cost {cost[row, column]:g} in row {row}, scheme {column}; "
            "costs are finite and not negative"
        )
    return cost


def _check_loss(loss: Matrix) -> None:
    if loss.ndim != 2 or loss.size == 0:
        raise ValueError(f"loss has shape {loss.shape}; a row for each block is needed")
    wrong = np.isnan(loss) | np.isneginf(loss)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"loss of block {row}, scheme {column} is {loss[row, column]}")
    without = np.flatnonzero(~np.isfinite(loss).any(axis=1))
    if without.size:
        raise ValueError(
            f"no scheme is available for {counted(without.size, 'block')}, first block {without[0]}"
        )


def least_cost(loss: Matrix, cost: Matrix) -> float:
    """What the cheapest of the schemes that are available to each block cost, summed."""
    return float(np.where(np.isfinite(loss), cost, np.inf).min(axis=1).sum())


def _check_budget(problem: AllocationProblem, budget: Budget) -> None:
    if budget.cost.shape != problem.loss.shape:
        raise ValueError(
            f"budget {budget.name!r} has costs of shape {budget.cost.shape}, "
            f"the loss has {problem.loss.shape}"
        )
    cheapest = least_cost(problem.loss, budget.cost)
    if cheapest > _grown(budget.limit):
        raise InfeasibleError(
            f"budget {budget.name!r} is {budget.limit:.6g}, but the cheapest plan needs "
            f"{cheapest:.6g}; raise the budget or offer a cheaper scheme"
        )


def _check_floor(problem: AllocationProblem, floor: Floor) -> None:
    blocks, schemes = problem.loss.shape
    if floor.cost.shape[1] != schemes or not set(floor.members.tolist()) <= set(range(blocks)):
        raise ValueError(
            f"floor {floor.name!r} has members or schemes that the problem lacks: "
            f"{counted(blocks, 'block')} x {counted(schemes, 'scheme')}"
        )
    available = np.isfinite(problem.loss[floor.members])
    dearest = float(np.where(available, floor.cost, -np.inf).max(axis=1, initial=-np.inf).sum())
    if -dearest > _grown(-floor.minimum):
        raise InfeasibleError(
            f"floor {floor.name!r} is {floor.minimum:.6g}, but the dearest plan reaches "
            f"{dearest:.6g}; lower the floor or offer a dearer scheme"
        )

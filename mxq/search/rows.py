"""The problem as the algorithms see it: losses and rows ``sum of chosen cost <= limit``.

A floor is a row with negative costs on its members. Arrays lie [S, B], schemes first, because
numpy then takes the minimum over the schemes of all blocks as S long vector operations.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mxq.search.problem import ROUNDING, AllocationProblem, Choice, Matrix

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """``sum over members of cost[choice, member] <= limit``; ``members`` None means all blocks.

    ``scale`` is what the user's numbers were multiplied with.
    """

    name: str
    members: Choice | None
    cost_SM: Matrix
    limit: float
    scale: float = 1.0

    def of_members(self, values_B: NDArray[_Number]) -> NDArray[_Number]:
        """The last axis narrowed to the members."""
        return values_B if self.members is None else values_B[..., self.members]


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """Losses [S, B], infinite where not available, and the rows that a choice has to meet."""

    loss_SB: Matrix
    rows: tuple[Row, ...]

    @property
    def limits(self) -> Matrix:
        """Limit of each row."""
        return np.array([row.limit for row in self.rows], dtype=np.float64)

    def loss(self, choice: Choice) -> float:
        """Sum of the chosen losses."""
        return float(self.loss_SB[choice, np.arange(self.loss_SB.shape[1])].sum())

    def activity(self, choice: Choice) -> Matrix:
        """Sum of the chosen costs of each row."""
        return np.array([_activity(row, choice) for row in self.rows], dtype=np.float64)

    def excess(self, choice: Choice) -> Matrix:
        """How far each row is above its limit, 0 where it is met."""
        over = self.activity(choice) - self.limits
        return np.where(over > ROUNDING * np.abs(self.limits), over, 0.0)

    def is_feasible(self, choice: Choice) -> bool:
        """Whether every row is met."""
        return not self.excess(choice).any()

    def paid(self, prices: Matrix) -> Matrix:
        """Price times cost, summed over the rows, [S, B]."""
        paid_SB = np.zeros_like(self.loss_SB)
        for price, row in zip(prices, self.rows, strict=True):
            if price != 0:
                paid_SB[:, slice(None) if row.members is None else row.members] += (
                    price * row.cost_SM
                )
        return paid_SB

    def priced(self, prices: Matrix) -> Matrix:
        """Loss plus what is paid, [S, B]."""
        return self.loss_SB + self.paid(prices)

    def keeping(self, keep_SB: NDArray[np.bool_]) -> "System":
        """The same system with only the marked columns available."""
        return replace(self, loss_SB=np.where(keep_SB, self.loss_SB, np.inf))


def system_of(problem: AllocationProblem) -> System:
    """The problem's losses and rows, each row scaled so that its limit is near 1.

    Scales are powers of two, so integer costs are still summed without rounding. Rows that
    every choice meets (an infinite budget, a floor of 0) are left out.
    """
    rows = [
        _row(budget.name, None, budget.cost, budget.limit)
        for budget in problem.budgets
        if np.isfinite(budget.limit)
    ]
    rows += [
        _row(floor.name, floor.members, -floor.cost, -floor.minimum)
        for floor in problem.floors
        if floor.minimum > 0
    ]
    return System(np.ascontiguousarray(problem.loss.T), tuple(rows))


def part_of(system: System, is_open: NDArray[np.bool_], choice: Choice) -> tuple[System, float]:
    """The open blocks with what the others leave over, and the loss of the others.

    ``choice`` is the scheme of each block; only those of the blocks that are not open matter.
    """
    number = np.cumsum(is_open) - 1
    rows = []
    for row in system.rows:
        opened = row.of_members(is_open)
        chosen = row.of_members(choice)
        decided = np.flatnonzero(~opened)
        spent = float(row.cost_SM[chosen[decided], decided].sum())
        members = None if row.members is None else number[row.members[opened]]
        rows.append(
            replace(row, members=members, cost_SM=row.cost_SM[:, opened], limit=row.limit - spent)
        )
    decided = np.flatnonzero(~is_open)
    loss = float(system.loss_SB[choice[decided], decided].sum())
    return System(system.loss_SB[:, is_open], tuple(rows)), loss


def _row(name: str, members: Choice | None, cost: Matrix, limit: float) -> Row:
    largest = abs(limit) if limit != 0 else float(np.abs(cost).max(initial=0.0))
    scale = 2.0 ** -round(float(np.log2(largest))) if largest > 0 else 1.0
    return Row(name, members, np.ascontiguousarray(cost.T) * scale, limit * scale, scale)


def _activity(row: Row, choice: Choice) -> float:
    chosen = choice if row.members is None else choice[row.members]
    return float(row.cost_SM[chosen, np.arange(len(chosen))].sum())

"""Make a problem small before anything exact looks at it.

1. Dominated columns go: a scheme that loses more and costs no less in any row than another one of
   the same block can be exchanged for that other one in any plan, so some best plan is without it.
2. Prices give a bound and a feasible plan, the incumbent.
3. A plan with column (b, s) loses at least ``bound + r[b, s]``, where the reduced cost r is how
   much dearer the column is, at the prices, than the block's cheapest. Columns with
   ``bound + r > cut`` go, where the cut is the incumbent's loss less the gap asked for: no plan
   that has one is better than the incumbent by more than the gap.

Columns inside the convex hull of (cost, loss) are never chosen at any prices, but a best *integer*
plan may need one to use up the last bit of a budget. So the hull alone removes nothing here; rule
3 removes such a column as soon as its distance from the hull exceeds what is still undecided. The
proof of rule 3: for prices p >= 0 and a feasible x, loss(x) >= loss(x) + p . (cost(x) - limit)
= bound + sum_b r[b, x_b], and every r is at least 0.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mxq.search.dual import Dual, lower_bound
from mxq.search.feasible import feasible_choice
from mxq.search.primal import improve, repair
from mxq.search.problem import AllocationProblem, Choice
from mxq.search.rows import System, part_of, system_of


@dataclass(frozen=True, slots=True, eq=False)
class Incumbent:
    """The best plan so far; ``choice`` None and an infinite loss if there is none."""

    choice: Choice | None = None
    loss: float = np.inf

    def or_better(self, choice: Choice, problem: AllocationProblem) -> "Incumbent":
        """The other choice if it is feasible and loses less."""
        if not problem.is_feasible(choice):
            return self
        loss = problem.total_loss(choice)
        return Incumbent(choice, loss) if loss < self.loss else self

    def cut(self, gap: float) -> float:
        """Plans that lose more than this are of no interest."""
        # A hundredth of the gap is left to rounding.
        return self.loss - 0.99 * gap * abs(self.loss) if np.isfinite(self.loss) else np.inf


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """What is left of a problem: the open blocks.

    ``system`` holds the open blocks only, with the limits that the decided ones leave over.
    ``base`` is the choice of the decided blocks and ``base_loss`` their loss. ``dual`` belongs to
    ``system``.
    """

    system: System
    dual: Dual
    open_blocks: Choice
    base: Choice
    base_loss: float

    @property
    def bound(self) -> float:
        """No plan of this core loses less."""
        return self.base_loss + self.dual.bound

    @property
    def columns(self) -> int:
        """Number of columns of the open blocks."""
        return int(np.isfinite(self.system.loss_SB).sum())

    def whole(self, choice: Choice) -> Choice:
        """A choice of the open blocks as one of all blocks."""
        result = self.base.copy()
        result[self.open_blocks] = choice
        return result


def root(problem: AllocationProblem) -> tuple[Core, Incumbent]:
    """The core of all undominated columns, and a first plan.

    Raises:
        InfeasibleError: If the limits are found to contradict each other.
    """
    system = without_dominated(system_of(problem))
    dual = lower_bound(system)
    blocks = system.loss_SB.shape[1]
    core = Core(system, dual, np.arange(blocks), np.zeros(blocks, dtype=np.intp), 0.0)
    incumbent = with_plan_near(core, Incumbent(), problem)
    if incumbent.choice is None:
        choice = feasible_choice(system)
        if choice is not None:
            incumbent = incumbent.or_better(improve(system, choice, dual.prices), problem)
    return core, incumbent


def with_plan_near(core: Core, incumbent: Incumbent, problem: AllocationProblem) -> Incumbent:
    """The incumbent or a better plan found from the prices of a core."""
    if not np.isfinite(core.dual.bound):
        return incumbent
    prices = core.dual.prices
    choice = repair(core.system, core.system.priced(prices).argmin(axis=0), prices)
    if choice is None:
        return incumbent
    return incumbent.or_better(core.whole(improve(core.system, choice, prices)), problem)


def without_dominated(system: System) -> System:
    """Without columns that another column of the block beats in loss and in every row.

    Of columns equal in everything the first is kept.
    """
    schemes = len(system.loss_SB)
    keep_SB = np.isfinite(system.loss_SB)
    for s in range(schemes):
        for t in range(schemes):
            if t != s:
                keep_SB[s] &= ~_beats(system, t, s)
    return system.keeping(keep_SB)


def _beats(system: System, t: int, s: int) -> NDArray[np.bool_]:
    """Where t is no worse than s in everything, and better or, if equal, earlier."""
    loss_SB = system.loss_SB
    no_worse = np.isfinite(loss_SB[t]) & (loss_SB[t] <= loss_SB[s])
    better = loss_SB[t] < loss_SB[s]
    for row in system.rows:
        where = slice(None) if row.members is None else row.members
        no_worse[where] &= row.cost_SM[t] <= row.cost_SM[s]
        better[where] |= row.cost_SM[t] < row.cost_SM[s]
    beaten: NDArray[np.bool_] = no_worse & (better | (t < s))
    return beaten


def shrunk(core: Core, cut: float) -> Core:
    """The core after rule 3, without the blocks that have one column left."""
    priced_SB = core.system.priced(core.dual.prices)
    reduced_SB = priced_SB - priced_SB.min(axis=0)
    # Rounding of the sums must not remove a column that a better plan needs.
    margin = 1e-12 * (abs(core.bound) + float(core.dual.prices @ np.abs(core.system.limits)))
    keep_SB = np.isfinite(core.system.loss_SB) & (reduced_SB <= cut - core.bound + margin)
    only = np.where(keep_SB, reduced_SB, np.inf).argmin(axis=0)
    is_open = keep_SB.sum(axis=0) > 1
    small, spent = part_of(core.system.keeping(keep_SB), is_open, only)
    base = core.base.copy()
    base[core.open_blocks] = only
    return replace(
        core,
        system=small,
        # The decided blocks are at their cheapest, so the bound splits exactly.
        dual=Dual(core.dual.prices, core.dual.bound - spent),
        open_blocks=core.open_blocks[is_open],
        base=base,
        base_loss=core.base_loss + spent,
    )

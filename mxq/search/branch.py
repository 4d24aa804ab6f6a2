"""Best-first branch and bound over cores, with an exact method to finish small ones.

At the size of a large model one pass is enough: prices decide nearly every block, and the finisher
proves the rest. Branching is for what prices cannot settle, such as a single expert that takes a
visible part of a budget: the block is given its likeliest scheme in one branch and denied it in
the other, and both get prices of their own.
"""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from mxq.search.dual import lower_bound
from mxq.search.problem import (
    AllocationProblem,
    Choice,
    InfeasibleError,
    Solution,
    relative_gap,
)
from mxq.search.reduce import Core, Incumbent, root, shrunk, with_plan_near

SMALLEST_GAP = 1e-8
"""Sums of floats cannot prove a smaller relative gap."""


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What an exact method knows of a core after looking at all of it.

    No plan of the core loses less than ``bound``, infinite if none is below the cut. ``choices``
    are choices of the open blocks, perhaps better than the incumbent.
    """

    bound: float
    choices: tuple[Choice, ...] = ()


Finisher = Callable[[Core, float, float, float], Finished | None]
"""``(core, cut, gap, deadline)``: solves a core to the gap, or None if that is too much."""


def solve(
    problem: AllocationProblem, finish: Finisher, *, gap: float, time_limit_s: float
) -> Solution:
    """The best plan found and the bound of all that was not ruled out.

    Raises:
        InfeasibleError: If no plan meets all limits.
        RuntimeError: If no plan was found and none was ruled out.
    """
    deadline = time.monotonic() + time_limit_s
    gap = max(gap, SMALLEST_GAP)
    core, incumbent = root(problem)
    order = count()  # equal bounds are taken in the order of discovery
    heap = [(core.bound, next(order), core)]
    ruled_out = np.inf  # the least bound of all that is finished or dropped
    while heap and time.monotonic() < deadline:
        if relative_gap(incumbent.loss, min(ruled_out, heap[0][0])) <= gap:
            break
        core, incumbent = _settled(heapq.heappop(heap)[2], incumbent, problem, gap)
        cut = incumbent.cut(gap)
        answer = _finished(core, cut, gap, finish, deadline)
        if answer is not None:
            ruled_out = min(ruled_out, cut, answer.bound)
            for choice in answer.choices:
                incumbent = incumbent.or_better(core.whole(choice), problem)
            continue
        if time.monotonic() >= deadline:
            heapq.heappush(heap, (core.bound, next(order), core))
            break
        for child in _branches(core):
            incumbent = with_plan_near(child, incumbent, problem)
            heapq.heappush(heap, (child.bound, next(order), child))
        ruled_out = min(ruled_out, cut)
    bound = min([incumbent.loss, ruled_out, *(entry[0] for entry in heap)])
    if incumbent.choice is None:
        raise _no_plan(problem, ruled_out=bound == np.inf)
    proven = relative_gap(incumbent.loss, bound) <= gap
    return Solution(incumbent.choice, incumbent.loss, bound, proven)


def _settled(
    core: Core, incumbent: Incumbent, problem: AllocationProblem, gap: float
) -> tuple[Core, Incumbent]:
    """The core after removing columns and pricing anew for as long as that makes it smaller."""
    while True:
        before = core.columns
        core = shrunk(core, incumbent.cut(gap))
        if core.columns > 0.8 * before or not core.open_blocks.size:
            return core, incumbent
        core = _repriced(core)
        incumbent = with_plan_near(core, incumbent, problem)
        if not core.bound < incumbent.cut(gap):
            return core, incumbent


def _repriced(core: Core) -> Core:
    dual = lower_bound(core.system, core.dual.prices)
    return replace(core, dual=dual) if dual.bound > core.dual.bound else core


def _finished(
    core: Core, cut: float, gap: float, finish: Finisher, deadline: float
) -> Finished | None:
    if not core.bound < cut:
        return Finished(np.inf)
    if not core.open_blocks.size:
        return Finished(np.inf, (np.zeros(0, dtype=np.intp),))
    return finish(core, cut, gap, deadline)


def _branches(core: Core) -> list[Core]:
    """The core with one block given its cheapest scheme, and with that scheme denied to it."""
    priced_SB = core.system.priced(core.dual.prices)
    blocks = np.arange(priced_SB.shape[1])
    first, second = priced_SB.argsort(axis=0)[:2]
    paid_SB = core.system.paid(core.dual.prices)
    # How much of the budgets, in prices, hangs on the block, less if it is hardly undecided.
    stake = np.abs(paid_SB[first, blocks] - paid_SB[second, blocks])
    apart = priced_SB[second, blocks] - priced_SB[first, blocks]
    block = int((stake**2 / (stake + 1000 * apart + 1e-300)).argmax())
    given = np.isfinite(core.system.loss_SB)
    denied = given.copy()
    given[:, block] = False
    given[first[block], block] = True
    denied[first[block], block] = False
    children = [replace(core, system=core.system.keeping(keep)) for keep in (given, denied)]
    return [child for child in map(_repriced, children) if np.isfinite(child.bound)]


def _no_plan(problem: AllocationProblem, *, ruled_out: bool) -> Exception:
    limits = [f"{budget.name!r} (at most {budget.limit:.6g})" for budget in problem.budgets]
    limits += [f"{floor.name!r} (at least {floor.minimum:.6g})" for floor in problem.floors]
    names = ", ".join(limits[:3]) + (f" and {len(limits) - 3} more" if len(limits) > 3 else "")
    if ruled_out:
        return InfeasibleError(
            f"{names}: each limit can be met, but not all together; relax one of them"
        )
    return RuntimeError(
        f"no plan found within {names}, and none ruled out; the limits are all but contradictory: "
        "relax one of them, or give the solver more time"
    )

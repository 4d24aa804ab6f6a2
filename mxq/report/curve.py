"""Predicted loss against bytes: uniform plans, and the plan solved again at other budgets.

The solver without proofs is fast, but not at any size: budgets next to the plan's own are solved
first, and those that no longer fit in the time are left out and named.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mxq.artifacts import Allocation, SensitivityTable
from mxq.counted import counted
from mxq.for_engine import Ties, best_inside, inside
from mxq.pinning import keep_wide
from mxq.report.facts import Facts
from mxq.search.allocate import allocate, uniform_plans
from mxq.search.prepared import price
from mxq.search.problem import InfeasibleError

STEPS = (0.94, 1.06, 0.88, 1.13, 0.8, 1.22, 0.72, 1.34, 0.64, 1.5, 0.55, 1.75)
"""Budgets of the neighbours, as shares of the plan's own, in the order in which they are solved."""


@dataclass(frozen=True, slots=True)
class Point:
    """A plan as bytes of its blocks and predicted loss."""

    label: str
    bits: float
    block_bytes: float
    loss: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The plan among others. ``rule`` says how the neighbours were solved and what is left out."""

    plan: Point
    uniform: tuple[Point, ...]
    neighbours: tuple[Point, ...]
    unit: str
    rule: str


def loss_curve(facts: Facts, *, seconds: float = 20.0) -> Curve | None:
    """The curve around a plan, solved in about that time; None without a sensitivity table."""
    if facts.table is None:
        return None
    whole = facts.table
    asked = None if facts.origin is None else facts.origin.allocate
    granularity = "block" if asked is None else asked.granularity
    is_tied = asked is not None and asked.tie_gate_up
    inner = None if asked is None else inside(whole, asked)

    def solve(bits: float) -> Allocation:
        def within(table: SensitivityTable, ties: Ties) -> Allocation:
            return allocate(
                keep_wide(table, facts.plan.pinned),
                bits=bits,
                granularity=granularity,
                tie_gate_up=is_tied,
                ties=ties,
                solver="lagrangian",
            )

        return within(whole, ()) if inner is None else best_inside(inner, within)

    solved = list(_neighbours(solve, facts.plan.bits_per_weight, seconds))
    others = counted(len(solved), "other budget")
    spoken = f"Solved again for the least loss at {others}, by {granularity}"
    spoken += ", gate and up tied" if is_tied else ""
    spoken += ", pinned experts wide" if facts.plan.pinned else ""
    spoken += "" if inner is None else f", inside the rules of {inner.rules.title}"
    if asked is not None and (asked.floor_bits is not None or asked.max_latency_us is not None):
        spoken += "; the plan's own limits of bits by layer and of time are left out there"
    return Curve(
        plan=_point("this plan", facts.plan),
        uniform=tuple(_uniform_points([whole] if inner is None else inner.tables)),
        neighbours=tuple(sorted(solved, key=lambda point: point.block_bytes)),
        unit=facts.table.unit,
        rule=spoken + ".",
    )


def _neighbours(solve: Callable[..., Allocation], bits: float, seconds: float) -> Iterator[Point]:
    began = time.monotonic()
    for step in STEPS:
        if time.monotonic() - began > seconds:
            return
        try:
            plan = solve(bits=bits * step)
        except (InfeasibleError, RuntimeError):
            continue  # below the cheapest plan: there is no such neighbour
        yield _point("solved again", plan)


def _uniform_points(tables: Sequence[SensitivityTable]) -> Iterator[Point]:
    plans = {plan.description: plan for t in tables for plan in uniform_plans(price(t, None, None))}
    for name, plan in plans.items():
        yield _point(name.removeprefix("uniform "), plan)


def _point(label: str, plan: Allocation) -> Point:
    return Point(label, plan.bits_per_weight, plan.storage_bits / 8, plan.predicted_loss)

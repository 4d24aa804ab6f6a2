"""The core, proven by an integer program: the only file that imports PuLP.

The model is written in reduced costs. With prices p and slack s >= 0 of the rows, the loss of any
plan is ``bound + sum(reduced cost) + p . s`` exactly; every term is of the size of what is still
undecided, while raw losses differ by many orders of magnitude, which solvers do not bear well.
What the solver returns is not believed but counted again with the original numbers.
"""

import time

import numpy as np
import pulp

from mxq.search.branch import Finished, solve
from mxq.search.dual import value
from mxq.search.problem import AllocationProblem, Choice, Matrix, Solution
from mxq.search.reduce import Core
from mxq.search.rows import System
from mxq.search.solver_lagrangian import enumerate_core

MOST_COLUMNS = 20_000
"""Larger cores are branched upon first."""

_UNIT = 1000.0
"""Model coefficients reach up to this, so the solvers' tolerances of 1e-6 mean 1e-9."""


def solve_pulp(
    problem: AllocationProblem, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Solution:
    """The best plan, proven to the gap unless the time was too short.

    Raises:
        InfeasibleError: If no plan meets all limits.
        RuntimeError: If no plan was found and none was ruled out.
    """
    return solve(problem, _finish, gap=gap, time_limit_s=time_limit_s)


def _finish(core: Core, cut: float, gap: float, deadline: float) -> Finished | None:
    """Cores that a table of partial plans settles at once never reach the integer program."""
    answer = enumerate_core(core, cut, gap, deadline)
    return prove_core(core, cut, gap, deadline) if answer is None else answer


def prove_core(core: Core, cut: float, gap: float, deadline: float) -> Finished | None:
    """The core solved to the gap; None if it is large or the solver was stopped."""
    if core.columns > MOST_COLUMNS:
        return None
    answer = _ask(core, cut, gap, deadline, tighten=0.0)
    if answer is None or not answer.choices or core.system.is_feasible(answer.choices[0]):
        return answer
    # The solver's plan exceeds a limit by its tolerance: ask again, a little inside. The bound
    # of the first answer holds for a larger set of plans, so it stays valid.
    inside = _ask(core, cut, gap, deadline, tighten=1e-4)
    return None if inside is None else Finished(answer.bound, inside.choices)


def _ask(core: Core, cut: float, gap: float, deadline: float, *, tighten: float) -> Finished | None:
    """Solve the model; ``tighten`` takes that much of a model unit from every limit."""
    # Without a plan the prices may be beyond all bounds, and nothing is fixed by them either.
    prices = core.dual.prices if np.isfinite(cut) else np.zeros_like(core.dual.prices)
    priced_SB = core.system.priced(prices)
    reduced_SB = priced_SB - priced_SB.min(axis=0)
    largest = float(reduced_SB[np.isfinite(reduced_SB)].max())
    unit = max(min(cut - core.bound, largest), 1e-300) / _UNIT
    # Half of the gap, because the loss may still go down from the cut.
    gap_abs = max(0.5 * gap * abs(cut) / unit, 1e-7) if np.isfinite(cut) else 1e-7
    model, pick = _model(core.system, reduced_SB / unit, prices / unit, tighten)
    outcome = _solved(model, _backend(gap_abs, max(deadline - time.monotonic(), 0.1)))
    if outcome == pulp.LpSolutionInfeasible:
        return Finished(np.inf)
    if outcome != pulp.LpSolutionOptimal:
        return None
    above = float(pulp.value(model.objective)) - gap_abs
    bound = core.base_loss + value(core.system, prices) + above * unit
    return Finished(bound, (_chosen(pick, reduced_SB.shape),))


def _backend(gap_abs: float, time_limit_s: float) -> pulp.LpSolver:
    """HiGHS in this process where highspy is installed, else the CBC program that PuLP carries."""
    options = {"msg": False, "gapRel": 0.0, "gapAbs": gap_abs, "timeLimit": time_limit_s}
    if pulp.HiGHS(msg=False).available():
        return pulp.HiGHS(**options)
    return pulp.PULP_CBC_CMD(**options)


def _solved(model: pulp.LpProblem, backend: pulp.LpSolver) -> int:
    """The ``sol_status`` after solving.

    A failed solve leaves numbers in varValue too, and one that met its time limit is called
    "Optimal" if it found any plan: only sol_status tells what may be read.
    """
    try:
        model.solve(backend)
    except IndexError:
        # PuLP 3.3 reads row values from HiGHS that are not there if it has no solution.
        failed_infeasible = model.solverModel.getModelStatus().name == "kInfeasible"
        return int(
            pulp.LpSolutionInfeasible if failed_infeasible else pulp.LpSolutionNoSolutionFound
        )
    return int(model.sol_status)


_Pick = list[tuple[int, int, pulp.LpVariable]]


def _model(
    system: System, reduced_SB: Matrix, prices: Matrix, tighten: float
) -> tuple[pulp.LpProblem, _Pick]:
    model = pulp.LpProblem("core", pulp.LpMinimize)
    columns = np.argwhere(np.isfinite(reduced_SB.T))
    pick = [(b, s, model.add_variable(f"x{b}_{s}", cat="Binary")) for b, s in columns.tolist()]
    objective = [(x, reduced_SB[s, b]) for b, s, x in pick]
    by_block: dict[int, list[tuple[pulp.LpVariable, float]]] = {}
    for b, _, x in pick:
        by_block.setdefault(b, []).append((x, 1.0))
    for index, price in enumerate(prices):
        row, limit, scale = _scaled_row(system, index, pick)
        slack = model.add_variable(f"slack{index}", lowBound=0)
        objective.append((slack, price / scale))
        model += pulp.LpAffineExpression([*row, (slack, 1.0)]) == limit - tighten
    for members in by_block.values():
        model += pulp.LpAffineExpression(members) == 1
    model.setObjective(pulp.LpAffineExpression(objective))
    return model, pick


def _scaled_row(
    system: System, index: int, pick: _Pick
) -> tuple[list[tuple[pulp.LpVariable, float]], float, float]:
    """Coefficients above each block's least, the limit above all of them, and the scale."""
    row = system.rows[index]
    cost_SB = np.zeros_like(system.loss_SB)
    cost_SB[:, slice(None) if row.members is None else row.members] = row.cost_SM
    least_B = np.where(np.isfinite(system.loss_SB), cost_SB, np.inf).min(axis=0)
    above = [(x, float(cost_SB[s, b] - least_B[b])) for b, s, x in pick]
    largest = max((cost for _, cost in above), default=0.0)
    scale = _UNIT / largest if largest > 0 else 1.0
    coefficients = [(x, cost * scale) for x, cost in above if cost > 0]
    return coefficients, (row.limit - float(least_B.sum())) * scale, scale


def _chosen(pick: _Pick, shape: tuple[int, ...]) -> Choice:
    shares_SB = np.zeros(shape)
    for b, s, x in pick:
        shares_SB[s, b] = x.value()
    choice: Choice = shares_SB.argmax(axis=0)
    return choice

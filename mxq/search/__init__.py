"""Which block gets which scheme: problem, bounds, solvers, costs. Numbers only, no tensors.

``SOLVERS`` maps a name to a solver, a callable ``(AllocationProblem, *, gap, time_limit_s)``. The
PuLP solver is imported when it is first called, so this package works without PuLP.
"""

from collections.abc import Mapping

from mxq.search.problem import (
    AllocationProblem,
    Budget,
    Floor,
    InfeasibleError,
    Solution,
    Solver,
    tie,
)
from mxq.search.solver_lagrangian import solve_lagrangian

__all__ = [
    "SOLVERS",
    "AllocationProblem",
    "Budget",
    "Floor",
    "InfeasibleError",
    "Solution",
    "Solver",
    "solve_lagrangian",
    "solve_pulp",
    "tie",
]


def solve_pulp(
    problem: AllocationProblem, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Solution:
    """See ``mxq.search.solver_pulp.solve_pulp``."""
    from mxq.search import solver_pulp  # noqa: PLC0415 (PuLP is only needed here)

    return solver_pulp.solve_pulp(problem, gap=gap, time_limit_s=time_limit_s)


SOLVERS: Mapping[str, Solver] = {"pulp": solve_pulp, "lagrangian": solve_lagrangian}

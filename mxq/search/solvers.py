"""The solvers by name; the one that needs PuLP is imported when it is first called."""

from collections.abc import Mapping

from mxq.search.problem import AllocationProblem, Solution, Solver
from mxq.search.solver_lagrangian import solve_lagrangian


def solve_pulp(
    problem: AllocationProblem, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Solution:
    """See ``mxq.search.solver_pulp.solve_pulp``."""
    from mxq.search import solver_pulp

    return solver_pulp.solve_pulp(problem, gap=gap, time_limit_s=time_limit_s)


SOLVERS: Mapping[str, Solver] = {"pulp": solve_pulp, "lagrangian": solve_lagrangian}


def solver_named(solver: str | Solver) -> Solver:
    """A solver by its name; a callable is returned as it is.

    Raises:
        ValueError: If there is no solver of that name.
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]

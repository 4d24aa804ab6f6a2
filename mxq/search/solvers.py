"""The solvers by name; the one that needs PuLP is imported when it is first called."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from mxq.counted import counted
from mxq.search.problem import AllocationProblem, Solution, Solver, relative_gap
from mxq.search.solver_lagrangian import solve_lagrangian


def solve_pulp(
    problem: AllocationProblem, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Solution:
    """See ``mxq.search.solver_pulp.solve_pulp``."""
    from mxq.search import solver_pulp

    return solver_pulp.solve_pulp(problem, gap=gap, time_limit_s=time_limit_s)


SOLVERS: Mapping[str, Solver] = {"pulp": solve_pulp, "lagrangian": solve_lagrangian}


def solver_named(solver: str | Solver) -> Solver:
    """A solver by its name; a callable with its plans checked.

    Raises:
        ValueError: If there is no solver of that name.
    """
    if not isinstance(solver, str):
        return partial(_solve_checked, solver)
    if solver not in SOLVERS:
        raise ValueError(f"no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]


def _solve_checked(
    solver: Solver, problem: AllocationProblem, *, gap: float = 1e-4, time_limit_s: float = 60.0
) -> Solution:
    """The solution of a caller's own solver, with its loss counted here.

    Raises:
        ValueError: If it is no plan, breaks a limit, or claims a bound above its own loss.
    """
    found = solver(problem, gap=gap, time_limit_s=time_limit_s)
    choice = np.asarray(found.choice)
    blocks, schemes = problem.loss.shape
    is_choice = choice.shape == (blocks,) and np.issubdtype(choice.dtype, np.integer)
    if not is_choice or choice.min() < 0 or choice.max() >= schemes:
        raise ValueError(
            f"the solver's choice is {choice.dtype} of shape {choice.shape}; expected a scheme "
            f"number from 0 to {schemes - 1} for each of {counted(blocks, 'block')}"
        )
    if not problem.is_feasible(choice):
        raise ValueError("the solver's plan takes a scheme that is not available or breaks a limit")
    loss = problem.total_loss(choice)
    if not found.bound <= loss + abs(loss) * 1e-9:
        raise ValueError(
            f"the solver claims the bound {found.bound:.6g}, which is not below its loss {loss:.6g}"
        )
    is_proven = found.proven and relative_gap(loss, found.bound) <= gap
    return Solution(choice, loss, found.bound, is_proven)

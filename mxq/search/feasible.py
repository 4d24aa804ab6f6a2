"""Find any plan within all limits, or prove that there is none and say what would be needed.

The cost of one budget takes the place of the loss: the least of it under the other rows decides.
"""

import numpy as np

from mxq.search.dual import lower_bound
from mxq.search.primal import improve, repair
from mxq.search.problem import Choice, InfeasibleError, Matrix
from mxq.search.rows import Row, System


def feasible_choice(system: System) -> Choice | None:
    """A choice that meets all rows; None if none was found and none was ruled out.

    Raises:
        InfeasibleError: If the rows contradict each other.
    """
    if not any(row.limit >= 0 for row in system.rows):
        # Only floors: the dearest plan meets them all, unless floors overlap.
        dearest = _dearest(system)
        if system.is_feasible(dearest) or not system.rows:
            return dearest
    row, others = system.rows[0], system.rows[1:]
    choice = feasible_choice(System(system.loss_SB, others))
    if choice is None:
        return None
    cheapest = System(_as_loss(row, system.loss_SB), others)
    dual = lower_bound(cheapest)
    alone = cheapest.priced(dual.prices).argmin(axis=0)
    plans = [choice, repair(cheapest, alone, dual.prices)]
    improved = [improve(cheapest, plan, dual.prices) for plan in plans if plan is not None]
    best = min(improved, key=cheapest.loss)
    if system.is_feasible(best):
        return best
    if dual.bound > row.limit + 1e-12 * abs(row.limit):
        raise InfeasibleError(_message(row, others, cheapest.loss(best)))
    return None


def _dearest(system: System) -> Choice:
    cost_SB = np.where(np.isfinite(system.loss_SB), 0.0, np.inf)
    for row in system.rows:
        cost_SB[:, slice(None) if row.members is None else row.members] += row.cost_SM
    choice: Choice = cost_SB.argmin(axis=0)
    return choice


def _as_loss(row: Row, loss_SB: Matrix) -> Matrix:
    cost_SB = np.zeros_like(loss_SB)
    cost_SB[:, slice(None) if row.members is None else row.members] = row.cost_SM
    return np.where(np.isfinite(loss_SB), cost_SB, np.inf)


def _message(row: Row, others: tuple[Row, ...], reached: float) -> str:
    limits = ", ".join(f"{other.name!r} ({_spoken(other, other.limit)})" for other in others[:3])
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    kind, best = ("budget", "cheapest") if row.limit >= 0 else ("floor", "dearest")
    return (
        f"{kind} {row.name!r} is {_number(row, row.limit)}, but under {limits}{more} the {best} "
        f"plan needs {_number(row, reached)}: each limit can be met, but not all together; "
        "relax one of them"
    )


def _spoken(row: Row, limit: float) -> str:
    return f"at {'most' if limit >= 0 else 'least'} {_number(row, limit)}"


def _number(row: Row, value: float) -> str:
    return f"{abs(value) / row.scale:.6g}"

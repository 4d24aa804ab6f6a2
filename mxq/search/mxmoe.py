"""The objective of MxMoE (arXiv 2505.05799, eq. 7): least ``L^r T^(1-r)`` of loss and time.

The product is not linear, but it needs no nonlinear program: it is concave in (L, T), and over the
plans a concave function is least at a corner of their convex hull. A corner is the plan of least
``a L + b T`` for some a, b >= 0, which is an ordinary allocation problem. So the search walks
along the corners: between two known ones the next problem weighs L and T such that both cost the
same, and the part of the front whose ideal point is no better than the best product is left out.
"""

from dataclasses import dataclass

import numpy as np

from mxq.search.problem import AllocationProblem, Choice, Matrix, Solver


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A plan of least product; ``least_loss`` bounds the loss of every plan from below."""

    choice: Choice
    value: float
    least_loss: float
    proven: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Corner:
    """A plan that is least in ``weights . (L, T)``; no plan is below ``bound`` in that."""

    choice: Choice
    at: Matrix
    weights: Matrix
    bound: float
    proven: bool


def least_product(
    problem: AllocationProblem, time: Matrix, *, r: float, solver: Solver, gap: float
) -> Product:
    """The plan of least ``L^r T^(1-r)`` within the problem's limits, to a relative gap.

    ``time`` is [B, S]. The plans in between are solved to a tenth of the gap.

    Raises:
        ValueError: If r is not in 0..1.
        InfeasibleError: If no plan meets all limits.
    """
    if not 0 <= r <= 1:
        raise ValueError(f"r is {r}; the weight of the loss lies between 0 and 1")

    def corner(weights: Matrix) -> _Corner:
        return _solved(problem, time, weights, solver, gap / 10)

    fastest_loss = corner(np.array([1.0, 0.0]))
    if r == 1:
        return _product(fastest_loss, fastest_loss, r, proven=fastest_loss.proven)
    least_time = corner(np.array([0.0, 1.0]))
    best = min((fastest_loss, least_time), key=lambda c: _power(c.at, r))
    pairs, proven = [(fastest_loss, least_time)], fastest_loss.proven and least_time.proven
    while pairs:
        left, right = pairs.pop()
        if _power(_ideal(left, right), r) >= _power(best.at, r) * (1 - 0.9 * gap):
            continue
        weights = (left.at - right.at)[::-1] * np.array([1.0, -1.0])
        if not (weights > 0).all():
            continue
        between = corner(weights)
        proven = proven and between.proven
        if weights @ between.at < (weights @ left.at) * (1 - 1e-9):
            best = min((best, between), key=lambda c: _power(c.at, r))
            pairs += [(left, between), (between, right)]
    return _product(best, fastest_loss, r, proven=proven)


def _product(best: _Corner, least_loss: _Corner, r: float, *, proven: bool) -> Product:
    return Product(best.choice, _power(best.at, r), least_loss.bound, proven)


def _power(at: Matrix, r: float) -> float:
    return float(at[0] ** r * at[1] ** (1 - r))


def _ideal(left: _Corner, right: _Corner) -> Matrix:
    """Where the two lines that no plan is below meet: no plan in between is better than that."""
    weights = np.stack([left.weights, right.weights])
    low = np.array([left.at[0], right.at[1]])
    if abs(np.linalg.det(weights / np.abs(weights).max(axis=1, keepdims=True))) < 1e-12:
        return low
    meeting = np.linalg.solve(weights, np.array([left.bound, right.bound]))
    inside = (meeting >= low * (1 - 1e-6)).all() and np.isfinite(meeting).all()
    return np.maximum(meeting, 0.0) if inside else low


def _solved(
    problem: AllocationProblem, time: Matrix, weights: Matrix, solver: Solver, gap: float
) -> _Corner:
    available = np.isfinite(problem.loss)
    loss = np.where(available, problem.loss, 0.0)
    blend = np.where(available, weights[0] * loss + weights[1] * time, np.inf)
    solution = solver(AllocationProblem(blend, problem.budgets, problem.floors), gap=gap)
    blocks = np.arange(len(loss))
    at = np.array([loss[blocks, solution.choice].sum(), time[blocks, solution.choice].sum()])
    return _Corner(solution.choice, at, weights, solution.bound, solution.proven)

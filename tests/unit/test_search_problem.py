"""The allocation problem: what it refuses, what it says, and tied blocks."""

import re

import numpy as np
import pytest

from mxq.search import AllocationProblem, Budget, Floor, InfeasibleError, Solution, tie
from mxq.search.problem import relative_gap

LOSS = [[4.0, 1.0], [3.0, 2.0]]
COST = [[1.0, 2.0], [1.0, 3.0]]


def problem(**changes):
    fields = {"loss": LOSS, "budgets": (Budget("bytes", COST, 4.0),), **changes}
    return AllocationProblem(**fields)


def test_totals_by_hand():
    p = problem()
    choice = np.array([1, 0])
    assert p.total_loss(choice) == 1 + 3
    assert p.total_cost(p.budgets[0], choice) == 2 + 1
    assert p.is_feasible(choice)
    assert not p.is_feasible(np.array([1, 1]))  # 2 + 3 > 4


def test_a_scheme_that_is_not_available_is_not_feasible():
    assert not problem(loss=[[np.inf, 1.0], [3.0, 2.0]]).is_feasible(np.array([0, 0]))


def test_one_bit_over_a_large_budget_is_over():
    cost = [[3e12, 3e12 + 1]]
    p = AllocationProblem([[1.0, 0.0]], (Budget("bits", cost, 3e12),))
    assert p.is_feasible(np.array([0]))
    assert not p.is_feasible(np.array([1]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([[1.0, np.nan], [1.0, 2.0]], "loss of block 0, scheme 1 is nan"),
        ([[1.0, -np.inf], [1.0, 2.0]], "loss of block 0, scheme 1 is -inf"),
        ([[1.0, 2.0], [np.inf, np.inf]], "no scheme is available for 1 block, first block 1"),
        ([1.0, 2.0], "loss has shape (2,)"),
        ([[1.0, 2.0, 3.0]] * 2, "budget 'bytes' has costs of shape (2, 2), the loss has (2, 3)"),
    ],
)
def test_wrong_losses_are_named(loss, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        problem(loss=loss)


@pytest.mark.parametrize(
    ("cost", "limit", "message"),
    [
        ([[1.0, -2.0]], 1.0, "has cost -2 in row 0, scheme 1; costs are finite and not negative"),
        ([[1.0, np.inf]], 1.0, "has cost inf in row 0, scheme 1"),
        ([1.0, 2.0], 1.0, "has costs of shape (2,)"),
        ([[1.0, 2.0]], np.nan, "has limit nan"),
    ],
)
def test_wrong_budgets_are_named(cost, limit, message):
    with pytest.raises(ValueError, match="budget 'bytes' " + re.escape(message)):
        Budget("bytes", cost, limit)


def test_wrong_floors_are_named():
    with pytest.raises(ValueError, match="give each member once"):
        Floor("layer 0", [0, 0], COST, 1.0)
    with pytest.raises(ValueError, match="members or schemes that the problem lacks"):
        problem(floors=(Floor("layer 0", [0, 2], COST, 1.0),))


def test_infeasible_budget_says_what_the_cheapest_plan_needs():
    # The cheapest available plan is 2 + 1; the cost 1 of block 0 is not available.
    with pytest.raises(InfeasibleError) as error:
        problem(loss=[[np.inf, 1.0], [3.0, 2.0]], budgets=(Budget("bytes", COST, 2.5),))
    assert "budget 'bytes' is 2.5, but the cheapest plan needs 3;" in str(error.value)


def test_unreachable_floor_says_what_the_dearest_plan_reaches():
    with pytest.raises(InfeasibleError, match="floor 'layer 0' is 6, but the dearest plan reaches"):
        problem(floors=(Floor("layer 0", [0, 1], COST, 6.0),))


def test_arrays_cannot_be_written_and_the_callers_stay_writable():
    mine = np.array(LOSS)
    p = problem(loss=mine)
    mine[0, 0] = 7.0
    assert p.loss[0, 0] == 4.0
    with pytest.raises(ValueError, match="read-only"):
        p.loss[0, 0] = 1.0


def test_gap_by_hand():
    assert Solution(np.array([0]), 10.0, 9.0, proven=False).gap == pytest.approx(0.1)
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(0.0, -1.0) == np.inf
    assert relative_gap(3.0, 4.0) == 0.0


def test_tied_blocks_add_up():
    small, expand = tie(problem(floors=(Floor("f", [1], [COST[1]], 1.0),)), ["a", "a"])
    assert small.loss.tolist() == [[7.0, 3.0]]
    assert small.budgets[0].cost.tolist() == [[2.0, 5.0]]
    assert small.floors[0].members.tolist() == [0]
    assert small.floors[0].cost.tolist() == [[1.0, 3.0]]
    assert expand(np.array([1])).tolist() == [1, 1]


def test_tied_blocks_expand_in_the_order_of_the_blocks():
    loss, cost = np.zeros((4, 2)), np.ones((4, 2))
    _, expand = tie(AllocationProblem(loss, (Budget("b", cost, 9),)), ["x", "y", "x", "z"])
    assert expand(np.array([1, 0, 1])).tolist() == [1, 0, 1, 1]


def test_a_scheme_is_available_to_a_group_if_it_is_to_all():
    budgets = (Budget("bytes", COST, 9.0),)
    small, _ = tie(problem(loss=[[np.inf, 1.0], [3.0, 2.0]], budgets=budgets), ["a", "a"])
    assert small.loss.tolist() == [[np.inf, 3.0]]


def test_a_group_without_a_common_scheme_is_named():
    with pytest.raises(ValueError, match="2 blocks of group 'layer 7' have no scheme in common"):
        tie(problem(loss=[[np.inf, 1.0], [3.0, np.inf]]), ["layer 7", "layer 7"])


def test_wrong_number_of_labels_is_refused():
    with pytest.raises(ValueError, match="1 group label for 2 blocks"):
        tie(problem(), ["a"])

"""Both solvers against brute force and scipy.optimize.milp, and what they do when they fail."""

import itertools
import time

import numpy as np
import pulp
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from mxq.search import (
    SOLVERS,
    AllocationProblem,
    Budget,
    Floor,
    InfeasibleError,
    branch,
    reduce,
    solver_lagrangian,
    solver_pulp,
)
from mxq.search.dual import Dual, lower_bound, value
from mxq.search.primal import repair
from mxq.search.reduce import Core, root, shrunk, without_dominated
from mxq.search.rows import system_of
from mxq.search.solver_lagrangian import enumerate_core

both = pytest.mark.parametrize("solver", SOLVERS)
all_three = pytest.mark.parametrize("solver", [*SOLVERS, "integer program"])


def solve(name, problem, *, gap=1e-4, time_limit_s=60.0):
    """A solver by name; "integer program" leaves out the enumeration that comes before it."""
    if name == "integer program":
        return branch.solve(problem, solver_pulp.prove_core, gap=gap, time_limit_s=time_limit_s)
    return SOLVERS[name](problem, gap=gap, time_limit_s=time_limit_s)


def brute_force_loss(problem):
    """Least loss of all feasible plans, infinite if there is none."""
    blocks, schemes = problem.loss.shape
    plans = (np.array(plan) for plan in itertools.product(range(schemes), repeat=blocks))
    return min((problem.total_loss(p) for p in plans if problem.is_feasible(p)), default=np.inf)


def milp_loss(problem):
    """Least loss by scipy, through HiGHS without any of our reductions."""
    blocks, schemes = problem.loss.shape
    available = np.isfinite(problem.loss)
    rows = [LinearConstraint(np.kron(np.eye(blocks), np.ones(schemes)), 1, 1)]
    for budget in problem.budgets:
        unit = np.abs(budget.cost).max()
        rows.append(LinearConstraint(budget.cost.ravel() / unit, -np.inf, budget.limit / unit))
    for floor in problem.floors:
        cost = np.zeros_like(problem.loss)
        cost[floor.members] = floor.cost
        rows.append(LinearConstraint(cost.ravel(), floor.minimum, np.inf))
    result = milp(
        np.where(available, problem.loss, 0).ravel(),
        constraints=rows,
        integrality=np.ones(problem.loss.size),
        bounds=Bounds(0, available.ravel().astype(float)),
        options={"mip_rel_gap": 1e-9},
    )
    assert result.success
    return result.fun


def random_problem(seed, *, most_blocks=5, most_schemes=4):
    """Ties, heavy tails, infinite entries, no to two budgets, no to two floors that may overlap."""
    rng = np.random.default_rng(seed)
    blocks, schemes = rng.integers(1, most_blocks + 1), rng.integers(1, most_schemes + 1)
    shape = (blocks, schemes)
    loss = rng.integers(0, 4, shape) * 1.0 if rng.random() < 0.4 else rng.lognormal(0, 3, shape)
    missing = rng.random(shape) < 0.2
    missing[np.arange(blocks), rng.integers(0, schemes, blocks)] = False
    budgets = []
    for number in range(rng.integers(0, 3)):
        cost = rng.integers(0, 6, shape) * 1.0 if rng.random() < 0.5 else rng.random(shape)
        low = np.where(missing, np.inf, cost).min(axis=1).sum()
        high = np.where(missing, -np.inf, cost).max(axis=1).sum()
        budgets.append(
            Budget(f"b{number}", cost, low + rng.choice([0, 0.3, 0.6, 1.2]) * (high - low))
        )
    floors = []
    for number in range(rng.integers(0, 3) if rng.random() < 0.5 else 0):
        members = rng.choice(blocks, size=rng.integers(1, blocks + 1), replace=False)
        cost = rng.integers(0, 6, (len(members), schemes)) * 1.0
        high = np.where(missing[members], -np.inf, cost).max(axis=1).sum()
        floors.append(Floor(f"f{number}", members, cost, rng.random() * high))
    return AllocationProblem(np.where(missing, np.inf, loss), tuple(budgets), tuple(floors))


def large_problem(blocks, *, tightness=0.7, seed=1):
    """Heavy-tailed losses and costs with two budgets that both bind."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 3, 4, 8, 4, 8])
    tokens = rng.pareto(1.5, blocks)[:, None] + 0.01
    loss = (
        tokens * rng.lognormal(0, 1, (blocks, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (blocks, 6))
    )
    latency = np.maximum(bits, 3 * tokens * np.array([1, 1, 1, 1, 0.5, 0.5]))
    costs = {"bytes": np.broadcast_to(bits, loss.shape), "latency": latency}
    budgets = []
    for name, cost in costs.items():
        low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum()
        budgets.append(Budget(name, cost, high - tightness * (high - low)))
    return AllocationProblem(loss, tuple(budgets))


@all_three
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_equals_brute_force(solver, first):
    for seed in range(first, first + 20):
        problem = random_problem(seed)
        expected = brute_force_loss(problem)
        if np.isinf(expected):
            with pytest.raises(InfeasibleError, match="not all together"):
                solve(solver, problem, gap=0.0)
            continue
        solution = solve(solver, problem, gap=0.0)
        assert solution.proven, seed
        assert problem.is_feasible(solution.choice)
        assert solution.loss == pytest.approx(expected, rel=1e-8), seed
        assert solution.loss == problem.total_loss(solution.choice)
        assert solution.bound <= expected * (1 + 1e-12)


@all_three
@pytest.mark.parametrize("seed", range(6))
def test_equals_scipy_milp(solver, seed):
    problem = large_problem(60, tightness=0.5 + 0.08 * seed, seed=seed)
    solution = solve(solver, problem, gap=0.0)
    assert solution.proven
    # scipy proves a relative gap of 1e-9 and allows 1e-6 of the largest cost in a row.
    assert solution.loss == pytest.approx(milp_loss(problem), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_floors_equal_scipy_milp(seed):
    base = large_problem(60, seed=seed)
    bits = base.budgets[0].cost
    floors = tuple(
        Floor(f"layer {n}", np.arange(20 * n, 20 * n + 20), bits[:20], 20 * 3.5) for n in range(3)
    )
    problem = AllocationProblem(base.loss, base.budgets, floors)
    solutions = [solve(name, problem, gap=0.0) for name in (*SOLVERS, "integer program")]
    for solution in solutions:
        chosen = bits[np.arange(60), solution.choice]
        assert (chosen.reshape(3, 20).sum(axis=1) >= 70).all()
        assert solution.loss == pytest.approx(milp_loss(problem), rel=1e-6)


def floored_problem(seed):
    """Three layers of two blocks and two blocks in none, floors of another cost than the budget."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 9, (8, 3)).astype(float)
    loss = rng.lognormal(0, 2, (8, 3)) / bits
    floors = []
    for layer in range(3):
        members = np.array([2 * layer, 2 * layer + 1])
        cost = bits[members] if seed % 2 else rng.integers(0, 5, (2, 3)).astype(float)
        floors.append(Floor(f"layer {layer}", members, cost, rng.random() * cost.max(1).sum()))
    limit = bits.min(1).sum() + rng.random() * np.ptp(bits, axis=1).sum()
    return AllocationProblem(loss, (Budget("bits", bits, limit),), tuple(floors))


ALL_OF_EIGHT = np.array(list(itertools.product(range(3), repeat=8)))


def least_of_all(problem):
    """Brute force over all plans of eight blocks at once."""
    feasible = np.ones(len(ALL_OF_EIGHT), dtype=bool)
    for floor in problem.floors:
        chosen = floor.cost[np.arange(2), ALL_OF_EIGHT[:, floor.members]]
        feasible &= chosen.sum(axis=1) >= floor.minimum
    (budget,) = problem.budgets
    feasible &= budget.cost[np.arange(8), ALL_OF_EIGHT].sum(axis=1) <= budget.limit
    losses = problem.loss[np.arange(8), ALL_OF_EIGHT].sum(axis=1)
    return losses[feasible].min(initial=np.inf)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_enumeration_of_floors_one_after_another_equals_brute_force(first):
    for seed in range(first, first + 50):
        problem = floored_problem(seed)
        system = system_of(problem)
        blocks = np.arange(8)
        # Prices of 0 and no cut: nothing but the limits may rule a plan out.
        for prices in (np.zeros(4), np.abs(np.random.default_rng(seed).normal(size=4))):
            dual = Dual(prices, value(system, prices))
            core = Core(system, dual, blocks, np.zeros(8, dtype=np.intp), 0.0)
            found = enumerate_core(core, np.inf, 0.0, np.inf)
            losses = [problem.total_loss(choice) for choice in found.choices]
            assert min(losses, default=np.inf) == pytest.approx(least_of_all(problem)), seed
            assert all(problem.is_feasible(choice) for choice in found.choices)


def test_a_plan_that_all_but_meets_a_floor_does_not_displace_one_that_does():
    # 2 - 1e-12 misses a floor of 2 by more than rounding, and by less than partial sums may.
    cost = np.array([[2 - 1e-12, 2.0], [1.0, 1.0]])
    problem = AllocationProblem(
        [[0.0, 1.0], [0.0, 3.0]],
        (Budget("b", cost, 9.0),),
        (Floor("f", [0], cost[:1], 2.0), Floor("g", [1], cost[1:], 1.0)),
    )
    system, prices = system_of(problem), np.zeros(3)
    dual = Dual(prices, value(system, prices))
    core = Core(system, dual, np.arange(2), np.zeros(2, dtype=np.intp), 0.0)
    (choice,) = enumerate_core(core, np.inf, 0.0, np.inf).choices
    assert choice.tolist() == [1, 0]


def test_a_table_that_would_grow_too_large_is_given_up_before_it_does(monkeypatch):
    sizes = []
    extend = solver_lagrangian._extend

    def watched(table, schemes, *more):
        extend(table, schemes, *more)
        sizes.append(table.used.size + table.reduced.size)

    monkeypatch.setattr(solver_lagrangian, "_extend", watched)
    monkeypatch.setattr(solver_lagrangian, "MOST_NUMBERS", 5000)
    system = system_of(large_problem(60, tightness=0.5))
    prices = np.zeros(len(system.rows))
    core = Core(system, Dual(prices, value(system, prices)), np.arange(60), np.zeros(60, int), 0.0)
    assert enumerate_core(core, np.inf, 0.0, np.inf) is None
    assert 1000 < max(sizes) <= 5000


@both
@pytest.mark.parametrize("tightness", [0.1, 0.5, 0.8, 0.95])
def test_a_large_problem_is_proven_in_seconds(solver, tightness):
    start = time.perf_counter()
    solution = solve(solver, large_problem(4000, tightness=tightness), gap=1e-4)
    assert solution.proven
    assert solution.gap <= 1e-4
    assert time.perf_counter() - start < 20  # seen: below 2 s on two cores


@all_three
def test_equal_losses_are_solved_at_once(solver):
    problem = large_problem(2000)
    equal = AllocationProblem(np.ones_like(problem.loss), problem.budgets)
    solution = solve(solver, equal)
    assert (solution.loss, solution.bound, solution.proven) == (2000.0, 2000.0, True)


@both
def test_a_larger_budget_is_never_worse(solver):
    losses = [
        solve(solver, large_problem(40, tightness=t), gap=0.0).loss
        for t in (0.95, 0.9, 0.8, 0.6, 0.3, 0.0)
    ]
    assert losses == sorted(losses, reverse=True)


def test_exact_is_at_most_greedy():
    problem = large_problem(200, tightness=0.9)
    system = without_dominated(system_of(problem))
    dual = lower_bound(system)
    greedy = repair(system, system.priced(dual.prices).argmin(axis=0), dual.prices)
    assert problem.is_feasible(greedy)
    exact = SOLVERS["pulp"](problem, gap=1e-6)
    assert dual.bound <= exact.loss <= problem.total_loss(greedy)


@all_three
def test_the_bound_of_a_coarse_answer_is_still_a_bound(solver, monkeypatch):
    # Without improvement the first plans are poor, so that coarse answers are not the best ones.
    monkeypatch.setattr(reduce, "improve", lambda system, choice, prices: choice)
    suboptimal = 0
    for seed in range(200):
        problem = random_problem(seed)
        best = brute_force_loss(problem)
        if np.isfinite(best):
            solution = solve(solver, problem, gap=0.3)
            assert solution.proven
            assert solution.gap <= 0.3
            assert solution.bound <= best * (1 + 1e-12), seed
            suboptimal += solution.loss > best * (1 + 1e-9)
    assert suboptimal > 0  # otherwise this would not test anything


def test_fixing_columns_keeps_every_plan_at_the_cut():
    dropped = 0
    for seed in range(200):
        problem = random_problem(seed)
        best = brute_force_loss(problem)
        if not np.isfinite(best):
            continue
        whole = root(problem)[0]
        core = shrunk(whole, best)
        kept_SB = np.full(problem.loss.T.shape, False)
        kept_SB[core.base, np.arange(len(core.base))] = True
        kept_SB[:, core.open_blocks] = np.isfinite(core.system.loss_SB)
        dropped += whole.columns - int(kept_SB.sum())
        fixed = np.where(kept_SB.T, problem.loss, np.inf)
        left = AllocationProblem(fixed, problem.budgets, problem.floors)
        assert brute_force_loss(left) == pytest.approx(best, rel=1e-9), seed
    assert dropped > 0


def test_any_prices_give_a_lower_bound():
    for seed in range(100):
        problem = random_problem(seed)
        best = brute_force_loss(problem)
        bound = lower_bound(system_of(problem)).bound
        assert bound <= best * (1 + 1e-12) + 1e-12


def test_one_budget_has_the_bound_of_the_convex_hull_by_hand():
    # Hull of the block: (1, 9), (3, 1). A budget of 2 lies half way: the bound is 5. The column
    # (2, 6) is inside the hull, yet it is the best integer plan.
    problem = AllocationProblem([[9.0, 6.0, 1.0]], (Budget("b", [[1.0, 2.0, 3.0]], 2.0),))
    assert lower_bound(system_of(problem)).bound == pytest.approx(5.0)
    assert SOLVERS["lagrangian"](problem, gap=0.0).choice.tolist() == [1]


def test_dominated_columns_go_and_equal_ones_keep_the_first():
    loss = [[5.0, 5.0, 4.0, 6.0]]
    cost = [[2.0, 2.0, 3.0, 2.5]]
    system = without_dominated(system_of(AllocationProblem(loss, (Budget("b", cost, 9.0),))))
    assert np.isfinite(system.loss_SB[:, 0]).tolist() == [True, False, True, False]


def test_a_dearer_column_is_kept_where_a_floor_may_need_it():
    floor = Floor("f", [0], [[1.0, 2.0]], 2.0)
    problem = AllocationProblem([[1.0, 5.0]], (Budget("b", [[1.0, 2.0]], 9.0),), (floor,))
    assert SOLVERS["lagrangian"](problem).choice.tolist() == [1]


@all_three
def test_budgets_that_contradict_each_other_say_what_would_be_needed(solver):
    # Under latency <= 1 both blocks need scheme 1, which costs 3 + 3 bytes.
    bytes_ = Budget("bytes", [[1.0, 3.0]] * 2, 4.0)
    latency = Budget("latency", [[2.0, 0.5]] * 2, 1.0)
    with pytest.raises(InfeasibleError) as error:
        solve(solver, AllocationProblem(np.ones((2, 2)), (bytes_, latency)))
    assert "budget 'bytes' is 4, but under 'latency' (at most 1) the cheapest plan needs 6" in str(
        error.value
    )


def stubbed(monkeypatch, status):
    """Let the integer program end with a status, with numbers left in its variables."""

    def solved(model, backend):
        model.solve(backend)
        return status

    monkeypatch.setattr(solver_pulp, "_solved", solved)


def core_problem():
    """A problem that the reduction alone does not settle."""
    problem = large_problem(60, tightness=0.9)
    core, incumbent = root(problem)
    assert core.bound < incumbent.loss * (1 - 1e-4)
    return problem


@pytest.mark.parametrize("status", [pulp.LpSolutionNoSolutionFound, pulp.LpSolutionIntegerFeasible])
def test_numbers_of_a_failed_solve_are_never_read(monkeypatch, status):
    def unread(*_):
        raise AssertionError("values of a failed solve were read")

    problem = core_problem()
    stubbed(monkeypatch, status)
    monkeypatch.setattr(solver_pulp, "_chosen", unread)
    solution = solve("integer program", problem, gap=0.0, time_limit_s=2.0)
    assert problem.is_feasible(solution.choice)
    assert solution.bound <= SOLVERS["lagrangian"](problem, gap=0.0).loss


@all_three
def test_without_time_the_plan_is_feasible_and_not_called_proven(solver):
    problem = core_problem()
    solution = solve(solver, problem, gap=0.0, time_limit_s=0.0)
    assert problem.is_feasible(solution.choice)
    assert not solution.proven
    assert solution.bound < solution.loss


def test_time_that_runs_out_in_the_finisher_leaves_the_core_undecided(monkeypatch):
    now = 0.0
    monkeypatch.setattr(branch.time, "monotonic", lambda: now)

    def finish(core, cut, gap, deadline):
        nonlocal now
        assert now == 0.0  # nothing is begun after the deadline
        now = deadline

    problem = core_problem()
    solution = branch.solve(problem, finish, gap=1e-7, time_limit_s=1.0)
    assert now == 1.0
    assert problem.is_feasible(solution.choice)
    assert not solution.proven
    assert solution.bound < milp_loss(problem) * (1 - 1e-7)


@all_three
def test_without_time_and_plan_there_is_no_solution(solver):
    # Sums of 0, 1, 2 or 3 of these meet neither limit exactly, so no heuristic finds a plan.
    seed = next(s for s in range(2000) if is_hard(s))
    with pytest.raises(RuntimeError, match=r"no plan found within 'low' .*none ruled out"):
        solve(solver, hard_problem(seed), time_limit_s=0.0)
    assert solve(solver, hard_problem(seed)).proven


def hard_problem(seed):
    """Subset sums: one plan in thousands is feasible."""
    weights = np.random.default_rng(seed).integers(1000, 2000, 12) * 1.0
    cost = np.stack([np.zeros(12), weights], axis=1)
    mirror = cost[:, ::-1].copy()
    target = weights[::2].sum()
    budgets = (Budget("low", cost, target), Budget("high", mirror, weights.sum() - target))
    return AllocationProblem(np.ones((12, 2)), budgets)


def is_hard(seed):
    try:
        return root(hard_problem(seed))[1].choice is None
    except InfeasibleError:
        return False


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
def test_both_backends_give_the_same_plan(monkeypatch, backend):
    if backend == "CBC":
        monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    problem = core_problem()
    exact = SOLVERS["lagrangian"](problem, gap=0.0)
    assert solve("integer program", problem, gap=0.0).loss == pytest.approx(exact.loss, rel=1e-8)


def test_a_plan_beyond_a_limit_by_the_solvers_tolerance_is_asked_for_again(monkeypatch):
    problem = core_problem()
    exact = solve("integer program", problem, gap=0.0)
    asked = []
    ask = solver_pulp._ask

    def tempted(core, cut, gap, deadline, *, tighten):
        answer = ask(core, cut, gap, deadline, tighten=tighten)
        asked.append(tighten)
        if tighten == 0 and answer.choices:
            dearest = np.where(np.isfinite(core.system.loss_SB), core.system.rows[0].cost_SM, 0)
            return type(answer)(answer.bound, (dearest.argmax(axis=0),))
        return answer

    monkeypatch.setattr(solver_pulp, "_ask", tempted)
    solution = solve("integer program", problem, gap=0.0)
    assert any(asked)
    assert problem.is_feasible(solution.choice)
    assert solution.loss == pytest.approx(exact.loss)

"""Allocations of small tables: budgets, granularities, floors, and MxMoE's objective."""

import itertools
import re

import numpy as np
import pytest

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.scheme import Scheme, parse_schemes
from mxq.search import (
    SOLVERS,
    CostModel,
    InfeasibleError,
    allocate,
    best_uniform,
    load_device,
    pareto,
    storage_cost,
    uniform,
)
from mxq.search.allocate import check_solved_on
from mxq.search.problem import Solution

SCHEMES = parse_schemes("w2a16_g128_asym,w4a16_g128_asym,w8a8_grow_sym,bf16")
H200 = CostModel(load_device("h200"))


def table(*, layers=2, experts=2, seed=0, schemes=SCHEMES, missing=()):
    """Layers of an attention output and experts; ``missing`` are (block, scheme)."""
    rng = np.random.default_rng(seed)
    blocks = []
    for layer in range(layers):
        name = f"layers.{layer}.attn.o_proj"
        blocks.append(BlockInfo(name, layer, None, "o_proj", 128, 128, 90, name))
        for expert, projection in itertools.product(range(experts), ("gate", "up", "down")):
            name = f"layers.{layer}.experts.{expert}.{projection}"
            site = f"layers.{layer}.experts"
            tokens = 10 + 70 * expert
            blocks.append(BlockInfo(name, layer, expert, projection, 128, 256, tokens, site))
    loss = rng.lognormal(0, 2, (len(blocks), 1)) * np.array([1.0, 0.1, 0.03, 0])[: len(schemes)]
    loss *= rng.lognormal(0, 0.3, loss.shape)
    for b, s in missing:
        loss[b, s] = np.inf
    return SensitivityTable(
        blocks=tuple(blocks),
        schemes=schemes,
        loss=tuple(map(tuple, loss.tolist())),
        quantizer=tuple(("rtn",) * len(schemes) for _ in blocks),
        metric="fisher",
        unit="nats per token",
        calibration_tokens=100,
        rotated_layers=(1,),
        provenance=Provenance("m", "c"),
    )


def all_plans(t, blocks):
    return itertools.product(range(len(t.schemes)), repeat=len(blocks))


def test_equals_brute_force():
    t = table(layers=1)
    storage = storage_cost(t.blocks, t.schemes)
    weights = sum(b.out_features * b.in_features for b in t.blocks)
    rows = np.arange(len(t.blocks))
    best = min(
        sum(t.loss[b][s] for b, s in enumerate(plan))
        for plan in all_plans(t, t.blocks)
        if storage[rows, list(plan)].sum() <= 5 * weights
    )
    for solver in SOLVERS:
        plan = allocate(t, bits=5, solver=solver, gap=0)
        assert plan.predicted_loss == pytest.approx(best)
        assert plan.proven


def test_bits_asked_and_reached_are_both_said():
    t = table()
    plan = allocate(t, bits=4.3)
    assert plan.asked_bits == 4.3
    assert plan.bits_per_weight <= 4.3
    by_hand = sum(
        plan.schemes[b.name].storage_bits(b.out_features, b.in_features) for b in t.blocks
    )
    assert plan.storage_bits == by_hand
    assert plan.weights == 2 * (128 * 128 + 6 * 128 * 256)
    assert (plan.unit, plan.rotated_layers) == ("nats per token", (1,))
    assert plan.bound <= plan.predicted_loss
    assert plan.latency_source is None


def test_a_limit_in_bits_over_all_blocks_is_the_same_limit():
    t = table()
    in_total = allocate(t, storage_bits=round(4.3 * allocate(t, bits=4.3).weights))
    assert in_total.schemes == allocate(t, bits=4.3).schemes


@pytest.mark.parametrize("spelling", ["w2a16_g128_asym", "w4a16_g128_asym"])
def test_uniform_is_reproduced_where_the_budget_allows_just_that(spelling):
    scheme = Scheme.parse(spelling)
    t = table(schemes=(scheme, Scheme.parse("bf16")))
    only = uniform(t, scheme)
    assert allocate(t, storage_bits=only.storage_bits).schemes == only.schemes
    assert set(only.schemes.values()) == {scheme}


def test_more_bits_than_the_dearest_plan_needs_are_accepted():
    plan = allocate(table(), bits=100)
    assert set(plan.schemes.values()) == {Scheme.parse("bf16")}
    assert (plan.predicted_loss, plan.proven, plan.bits_per_weight) == (0, True, 16)


def test_too_few_bits_say_what_the_cheapest_plan_needs_in_bits_per_weight():
    # w2 with 128 per group: 2 + (16 + 2) / 128 = 2.140625 bits.
    with pytest.raises(InfeasibleError) as error:
        allocate(table(), bits=2)
    assert "2 bits per weight were asked for, but the cheapest plan needs 2.14062" in str(
        error.value
    )


def test_a_larger_budget_is_never_worse():
    front = pareto(table(), [2.5, 3, 4, 5, 8, 16])
    assert [loss for _, loss in front] == sorted((loss for _, loss in front), reverse=True)
    assert [bits for bits, _ in front] == sorted(bits for bits, _ in front)


def chosen(plan, t, key):
    """The schemes of each group of blocks."""
    groups = {}
    for b in t.blocks:
        groups.setdefault(key(b), set()).add(plan.schemes[b.name])
    return groups


@pytest.mark.parametrize(
    ("granularity", "key"),
    [
        ("expert", lambda b: (b.site, b.expert)),
        ("projection", lambda b: (b.site, b.projection)),
        ("layer", lambda b: b.site),
    ],
)
def test_blocks_of_a_granularity_share_a_scheme(granularity, key):
    t = table(layers=3, experts=4, seed=3)
    free = allocate(t, bits=4.5, gap=0)
    plan = allocate(t, bits=4.5, granularity=granularity, gap=0)
    assert all(len(schemes) == 1 for schemes in chosen(plan, t, key).values())
    assert any(len(schemes) > 1 for schemes in chosen(free, t, key).values())
    assert len(set(plan.schemes.values())) > 1
    assert plan.predicted_loss >= free.predicted_loss


@pytest.mark.parametrize("granularity", ["block", "projection"])
def test_gate_and_up_are_tied_and_down_is_free(granularity):
    t = table(layers=3, experts=4, seed=1)
    plan = allocate(t, bits=5.5, granularity=granularity, tie_gate_up=True, gap=0)
    pairs = chosen(plan, t, lambda b: (b.site, b.expert, b.projection.replace("gate", "up")))
    assert all(len(schemes) == 1 for schemes in pairs.values())
    assert any(len(s) > 1 for s in chosen(plan, t, lambda b: (b.site, b.expert)).values())


def test_a_scheme_must_fit_all_blocks_that_share_it():
    t = table(missing=[(1, 0), (1, 1), (1, 3), (2, 2)])
    with pytest.raises(ValueError, match=r"group 'layers\.0\.experts' have no scheme in common"):
        allocate(t, bits=9, granularity="layer")


def test_each_layer_has_its_floor():
    t = table(layers=4, seed=5)
    plan = allocate(t, bits=4.5, floor_bits=3.5)
    free = allocate(t, bits=4.5)

    def least_bits(plan):
        per_layer = {}
        for b in t.blocks:
            bits = plan.schemes[b.name].storage_bits(b.out_features, b.in_features)
            per_layer.setdefault(b.layer, []).append((bits, b.out_features * b.in_features))
        return min(sum(x for x, _ in p) / sum(w for _, w in p) for p in per_layer.values())

    assert least_bits(plan) >= 3.5 > least_bits(free)
    assert plan.bits_per_weight <= 4.5
    assert plan.predicted_loss > free.predicted_loss
    assert plan.proven
    assert "at least 3.5 bits in each layer" in plan.description


def test_a_floor_above_the_budget_says_so():
    with pytest.raises(InfeasibleError, match=r"budget 'storage bits' is .* but under 'storage bi"):
        allocate(table(), bits=4, floor_bits=5)


def test_a_latency_limit_holds_and_its_source_is_said():
    t = table()
    free = allocate(t, bits=9, cost_model=H200, tokens=4096)
    limit = 0.98 * free.predicted_latency_us
    plan = allocate(t, bits=9, cost_model=H200, tokens=4096, max_latency_us=limit)
    assert plan.predicted_latency_us <= limit
    assert plan.predicted_loss >= free.predicted_loss
    assert plan.latency_source == "roofline of NVIDIA H200 SXM, 4096 tokens in a step"
    with pytest.raises(InfeasibleError, match=r"budget 'latency us' is 0\.001, but the cheapest"):
        allocate(t, bits=9, cost_model=H200, tokens=4096, max_latency_us=1e-3)


@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_mxmoe_equals_brute_force_over_all_plans(r, seed):
    t = table(layers=2, experts=1, seed=seed)
    bits = 5.0
    latency = H200.latency_us(t.blocks, t.schemes, tokens=20000, calibration_tokens=100)
    storage = storage_cost(t.blocks, t.schemes)
    plan = allocate(t, bits=bits, objective="mxmoe", r=r, cost_model=H200, tokens=20000, gap=1e-6)
    columns = [t.schemes.index(plan.schemes[b.name]) for b in t.blocks]
    for layer in range(2):
        rows = [i for i, b in enumerate(t.blocks) if b.layer == layer]
        weights = sum(t.blocks[i].out_features * t.blocks[i].in_features for i in rows)

        def product(chosen, rows=rows):
            loss = sum(t.loss[i][s] for i, s in zip(rows, chosen, strict=True))
            time = sum(latency[i, s] for i, s in zip(rows, chosen, strict=True))
            return loss**r * time ** (1 - r)

        best = min(
            product(p)
            for p in all_plans(t, rows)
            if sum(storage[i, s] for i, s in zip(rows, p, strict=True)) <= bits * weights
        )
        assert product([columns[i] for i in rows]) == pytest.approx(best, rel=1e-6)
    assert plan.proven
    assert plan.bound <= plan.predicted_loss


def test_mxmoe_with_r_1_needs_no_cost_model_and_keeps_each_layer_within_the_budget():
    t = table(layers=3, seed=2)
    plan = allocate(t, bits=4.5, objective="mxmoe", r=1)
    for layer in range(3):
        mine = [b for b in t.blocks if b.layer == layer]
        used = sum(plan.schemes[b.name].storage_bits(b.out_features, b.in_features) for b in mine)
        assert used <= 4.5 * sum(b.out_features * b.in_features for b in mine)
    # One budget for all layers can only be better.
    assert plan.predicted_loss >= allocate(t, bits=4.5, gap=0).predicted_loss


def test_uniform_names_the_blocks_where_the_scheme_does_not_fit():
    t = table(missing=[(0, 0), (3, 0)])
    expected = f"scheme {SCHEMES[0]} does not fit {t.blocks[0].name}, {t.blocks[3].name}"
    with pytest.raises(ValueError, match=re.escape(expected) + "$"):
        uniform(t, SCHEMES[0])
    with pytest.raises(ValueError, match="the table has no scheme w3a16_g128_asym; it has w2a16"):
        uniform(t, Scheme.parse("w3a16_g128_asym"))


def test_the_best_uniform_plan_is_the_one_of_least_loss_that_fits():
    t = table()
    limit = uniform(t, Scheme.parse("w4a16_g128_asym")).storage_bits
    assert best_uniform(t, storage_bits=limit).schemes == uniform(t, SCHEMES[1]).schemes
    assert best_uniform(t, storage_bits=limit - 1).schemes == uniform(t, SCHEMES[0]).schemes
    assert best_uniform(t, storage_bits=1) is None


def test_the_best_uniform_plan_keeps_the_latency_limit():
    t, priced = table(), {"cost_model": H200, "tokens": 4}
    small, large = (uniform(t, scheme, **priced) for scheme in SCHEMES[:2])
    assert small.predicted_latency_us < large.predicted_latency_us
    limits = {"storage_bits": large.storage_bits, **priced}
    free = best_uniform(t, **limits, max_latency_us=large.predicted_latency_us)
    assert free.schemes == large.schemes
    tight = best_uniform(t, **limits, max_latency_us=small.predicted_latency_us)
    assert tight.schemes == small.schemes
    assert best_uniform(t, **limits, max_latency_us=1e-9) is None


def test_a_plan_is_known_by_the_losses_of_its_table():
    t = table()
    plan = allocate(t, bits=5)
    check_solved_on(plan, t)
    with pytest.raises(ValueError, match="was solved on another measurement"):
        check_solved_on(plan, table(seed=1))


def test_an_allocation_is_never_worse_than_the_best_uniform_plan():
    for seed in range(5):
        t = table(seed=seed)
        for bits in (2.2, 4.2, 8.2):
            plan = allocate(t, bits=bits)
            best = best_uniform(t, storage_bits=bits * plan.weights)
            assert plan.predicted_loss <= best.predicted_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either bits"),
        ({"bits": 3, "storage_bits": 9}, "give either bits"),
        ({"bits": 5, "granularity": "model"}, "choose one of block, expert, projection, layer"),
        ({"bits": 5, "solver": "gurobi"}, "no solver 'gurobi'; choose one of pulp, lagrangian"),
        ({"bits": 5, "objective": "time"}, "choose one of loss, mxmoe"),
        ({"bits": 5, "cost_model": H200}, "needs both cost_model and tokens"),
        ({"bits": 5, "max_latency_us": 1.0}, "max_latency_us needs cost_model and tokens"),
        ({"bits": 5, "objective": "mxmoe"}, "with r < 1 needs cost_model and tokens"),
        ({"bits": 5, "objective": "mxmoe", "r": 1, "floor_bits": 3}, "takes neither floor_bits"),
        ({"bits": 5, "objective": "mxmoe", "r": 1.5}, "r is 1.5"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        allocate(table(), **options)


def test_a_solver_of_ones_own_is_a_callable():
    asked = []

    def mine(problem, *, gap=1e-4, time_limit_s=60.0):
        asked.append(gap)
        return SOLVERS["lagrangian"](problem, gap=gap, time_limit_s=time_limit_s)

    assert allocate(table(), bits=5, solver=mine, gap=1e-3).proven
    assert asked == [1e-3]


def cheapest(problem, *, bound):
    choice = np.argmin(problem.budgets[0].cost, axis=1)
    return Solution(choice, 0.0, bound, proven=True)


def over_budget(problem):
    choice = np.argmax(problem.budgets[0].cost, axis=1)
    return Solution(choice, 0.0, 0.0, proven=True)


def bound_too_high(problem):
    least = np.argmin(problem.budgets[0].cost, axis=1)
    return cheapest(problem, bound=problem.total_loss(least) * 1.01)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (over_budget, "breaks a limit"),
        (bound_too_high, "not below its loss"),
        (lambda p: cheapest(p, bound=np.nan), "the bound nan, which is not below"),
        (lambda p: Solution(np.zeros(3, dtype=int), 0.0, 0.0, proven=True), r"int64 of shape \(3,"),
        (lambda p: Solution(np.full(len(p.loss), -1), 0.0, 0.0, proven=True), "from 0 to"),
        (lambda p: Solution(np.zeros(len(p.loss)), 0.0, 0.0, proven=True), "is float64"),
    ],
)
def test_a_wrong_answer_of_ones_own_solver_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        allocate(table(), bits=5, solver=lambda problem, **options: answer(problem))


def test_ones_own_solver_proves_nothing_with_a_bound_far_away():
    plan = allocate(table(), bits=5, solver=lambda p, **options: cheapest(p, bound=-np.inf))
    assert not plan.proven


def test_the_loss_of_ones_own_solver_is_counted_again():
    def boasts(problem, **options):
        found = SOLVERS["lagrangian"](problem, **options)
        return Solution(found.choice, 0.0, found.bound, found.proven)

    honest = allocate(table(), bits=5, solver="lagrangian")
    assert allocate(table(), bits=5, solver=boasts).predicted_loss == honest.predicted_loss

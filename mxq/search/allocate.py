"""From a sensitivity table to an allocation: the questions that a user asks of the solver."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mxq.artifacts import Allocation, SensitivityTable
from mxq.scheme import Scheme
from mxq.search.cost import LatencyModel
from mxq.search.mxmoe import least_product
from mxq.search.prepared import (
    Grouped,
    Prepared,
    Priced,
    check_storage,
    group,
    layers_of,
    prepare,
    price,
)
from mxq.search.problem import (
    AllocationProblem,
    Budget,
    Choice,
    Floor,
    Matrix,
    Solver,
    feasible,
)
from mxq.search.solvers import solver_named


def allocate(  # noqa: PLR0913 (each is a question of its own, and all have a default)
    table: SensitivityTable,
    *,
    bits: float | None = None,
    storage_bits: int | None = None,
    granularity: str = "block",
    tie_gate_up: bool = False,
    floor_bits: float | None = None,
    cost_model: LatencyModel | None = None,
    tokens: float | None = None,
    max_latency_us: float | None = None,
    solver: str | Solver = "pulp",
    objective: str = "loss",
    r: float = 0.75,
    gap: float = 1e-4,
    ties: Sequence[Sequence[Hashable]] = (),
) -> Allocation:
    """The plan of least predicted loss within ``bits`` per weight or ``storage_bits`` in all.

    Both count metadata. ``granularity`` says which blocks share a scheme (see ``GRANULARITIES``),
    ``tie_gate_up`` that gate and up of one parent do, ``ties`` that blocks with the same entry of
    one of them do, and ``floor_bits`` is the least average in each layer. ``cost_model`` and
    ``tokens``, those of one step, give latencies, and ``max_latency_us`` limits the sum over the
    blocks. ``solver`` is a name or a callable.

    ``objective`` "mxmoe" is ``loss^r x latency^(1-r)``, each layer on its own with the same bits
    per weight; ``bound`` is then that of the loss alone and ``proven`` is about the product.

    Raises:
        InfeasibleError: If no plan meets the limits, with what the cheapest plan needs.
        ValueError: If the options do not go together.
        RuntimeError: If the solver neither found a plan nor ruled one out.
    """
    if objective not in _OBJECTIVES:
        raise ValueError(f"no objective {objective!r}; choose one of {', '.join(_OBJECTIVES)}")
    priced = price(table, cost_model, tokens)
    prepared = prepare(priced, granularity=granularity, tie_gate_up=tie_gate_up, ties=ties)
    limit = _limit(priced, bits, storage_bits)
    limits = (limit, floor_bits, max_latency_us)
    return answer(Question(prepared, *limits, solver_named(solver), gap, objective, r))


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A prepared table with its limits: storage bits over all blocks, and those that may be None.

    See ``allocate`` for each of them.
    """

    prepared: Prepared
    limit: float
    floor_bits: float | None
    max_latency_us: float | None
    solver: Solver
    gap: float = 1e-4
    objective: str = "loss"
    r: float = 0.75


def answer(question: Question) -> Allocation:
    """What ``allocate`` returns, for a table that was prepared before.

    Raises:
        InfeasibleError: If no plan meets the limits.
        ValueError: If the limits do not go together.
        RuntimeError: If the solver neither found a plan nor ruled one out.
    """
    prepared = question.prepared
    priced = prepared.priced
    found = _OBJECTIVES[question.objective](question)
    parts = [_spoken(question), f"{prepared.granularity} granularity", *_spoken_limits(question)]
    parts += ["gate and up tied"] if prepared.tie_gate_up else []
    return _allocation(priced, found, question.limit / priced.weights, ", ".join(parts))


def best_of(solves: Sequence[Callable[[], Allocation]]) -> Allocation:
    """The plan of least predicted loss among those that the functions give.

    Raises:
        InfeasibleError: If none of them finds a plan: that of the last one.
    """
    return min(feasible(solves), key=lambda plan: plan.predicted_loss)


def uniform(
    table: SensitivityTable,
    scheme: Scheme,
    *,
    cost_model: LatencyModel | None = None,
    tokens: float | None = None,
) -> Allocation:
    """The plan in which every block has the same scheme.

    Raises:
        ValueError: If the table lacks the scheme or it does not fit some blocks, which are named.
    """
    if scheme not in table.schemes:
        menu = ", ".join(str(item) for item in table.schemes)
        raise ValueError(f"the table has no scheme {scheme}; it has {menu}")
    column = table.schemes.index(scheme)
    wrong = [
        block.name
        for block, row in zip(table.blocks, table.loss, strict=True)
        if not np.isfinite(row[column])
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"scheme {scheme} does not fit {', '.join(wrong[:3])}{more}")
    return _uniform(price(table, cost_model, tokens), column)


def uniform_plans(priced: Priced) -> tuple[Allocation, ...]:
    """The uniform plan of every scheme that fits all blocks."""
    fits_S = np.isfinite(priced.loss).all(axis=0)
    return tuple(_uniform(priced, int(column)) for column in np.flatnonzero(fits_S))


def best_uniform(
    table: SensitivityTable,
    *,
    storage_bits: float,
    cost_model: LatencyModel | None = None,
    tokens: float | None = None,
    max_latency_us: float | None = None,
) -> Allocation | None:
    """The uniform plan of least predicted loss within the limits; None if none fits."""
    plans = uniform_plans(price(table, cost_model, tokens))
    return least_loss_within(plans, storage_bits=storage_bits, max_latency_us=max_latency_us)


def least_loss_within(
    plans: Sequence[Allocation], *, storage_bits: float, max_latency_us: float | None = None
) -> Allocation | None:
    """The plan of least predicted loss among those within the limits; None if none is."""
    fitting = [
        plan
        for plan in plans
        if plan.storage_bits <= storage_bits
        and (max_latency_us is None or (plan.predicted_latency_us or 0.0) <= max_latency_us)
    ]
    return min(fitting, key=lambda plan: plan.predicted_loss, default=None)


def next_uniform(table: SensitivityTable, *, bits: float) -> Allocation | None:
    """The smallest uniform plan of more than that many bits per weight; None if there is none."""
    plans = uniform_plans(price(table, None, None))
    larger = [plan for plan in plans if plan.bits_per_weight > bits]
    return min(larger, key=lambda plan: plan.storage_bits, default=None)


def check_solved_on(plan: Allocation, table: SensitivityTable) -> None:
    """Raise ValueError unless the plan's predicted loss is what the table says of its choices."""
    place = {scheme: column for column, scheme in enumerate(table.schemes)}
    names = {block.name for block in table.blocks}
    if set(plan.schemes) == names and set(plan.schemes.values()) <= set(place):
        loss = sum(
            row[place[plan.schemes[block.name]]]
            for block, row in zip(table.blocks, table.loss, strict=True)
        )
        if math.isclose(loss, plan.predicted_loss, rel_tol=1e-6, abs_tol=1e-300):
            return
    raise ValueError(
        "the plan was solved on another measurement than the folder holds now; run mxq allocate"
    )


def pareto(
    table: SensitivityTable, points: Sequence[float], *, solver: str | Solver = "pulp"
) -> tuple[tuple[float, float], ...]:
    """Bits per weight reached and predicted loss, for each number of bits asked for."""
    plans = [allocate(table, bits=bits, solver=solver) for bits in points]
    return tuple((plan.bits_per_weight, plan.predicted_loss) for plan in plans)


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """Scheme number of each block, a lower bound of the loss, and whether it is proven best."""

    choice: Choice
    bound: float
    proven: bool


def _uniform(priced: Priced, column: int) -> Allocation:
    choice = np.full(len(priced.loss), column)
    bound = _chosen_sum(priced.loss, choice)
    asked = _chosen_sum(priced.storage, choice) / priced.weights
    description = f"uniform {priced.table.schemes[column]}"
    return _allocation(priced, _Answer(choice, bound, proven=True), asked, description)


def _limit(priced: Priced, bits: float | None, storage_bits: int | None) -> float:
    if storage_bits is not None and bits is None:
        return float(storage_bits)
    if bits is not None and storage_bits is None:
        return bits * priced.weights
    raise ValueError("give either bits (per weight) or storage_bits (over all blocks)")


def _least_loss(question: Question) -> _Answer:
    priced, grouped = question.prepared.priced, question.prepared.grouped
    if question.max_latency_us is not None and priced.latency is None:
        raise ValueError("max_latency_us needs cost_model and tokens")
    problem = grouped.problem
    budgets = [_storage_within(grouped, question.limit, priced.weights)]
    if question.max_latency_us is not None:
        budgets.append(replace(problem.budgets[1], limit=question.max_latency_us))
    limited = AllocationProblem(problem.loss, tuple(budgets), _floors(question))
    solution = question.solver(limited, gap=question.gap)
    return _Answer(grouped.expand(solution.choice), solution.bound, solution.proven)


def _least_product_by_layer(question: Question) -> _Answer:
    """MxMoE's allocation: each layer on its own, with its share of the budget."""
    priced, labels = question.prepared.priced, question.prepared.labels
    if question.floor_bits is not None or question.max_latency_us is not None:
        raise ValueError("objective 'mxmoe' takes neither floor_bits nor max_latency_us")
    if question.r < 1 and priced.latency is None:
        raise ValueError("objective 'mxmoe' with r < 1 needs cost_model and tokens")
    _check_within_layers(question.prepared)
    choice, bound, proven = np.zeros(len(priced.loss), dtype=np.intp), 0.0, True
    for members in layers_of(priced.table).values():
        grouped = group(priced, labels, members)
        weights = float(priced.weights_B[members].sum())
        share = question.limit / priced.weights * weights
        storage = _storage_within(grouped, share, weights)
        product = least_product(
            AllocationProblem(grouped.problem.loss, (storage,)),
            grouped.problem.budgets[-1].cost,
            r=question.r,
            solver=question.solver,
            gap=question.gap,
        )
        choice[members] = grouped.expand(product.choice)
        bound += product.least_loss
        proven = proven and product.proven
    return _Answer(choice, bound, proven)


def _check_within_layers(prepared: Prepared) -> None:
    layers: dict[str, int] = {}
    for block, label in zip(prepared.priced.table.blocks, prepared.labels, strict=True):
        if layers.setdefault(label, block.layer) != block.layer:
            raise ValueError(
                f"objective 'mxmoe' solves each layer alone, but {block.name} shares a scheme with "
                f"blocks of layer {layers[label]}; use objective 'loss'"
            )


_OBJECTIVES: Mapping[str, Callable[[Question], _Answer]] = {
    "loss": _least_loss,
    "mxmoe": _least_product_by_layer,
}


def _storage_within(grouped: Grouped, limit: float, weights: float) -> Budget:
    """The storage budget with its limit; out of reach is said in bits per weight."""
    check_storage(grouped, limit, weights)
    return replace(grouped.problem.budgets[0], limit=limit)


def _floors(question: Question) -> tuple[Floor, ...]:
    if question.floor_bits is None:
        return ()
    prepared = question.prepared
    floors = zip(prepared.grouped.problem.floors, prepared.floor_weights, strict=True)
    return tuple(replace(floor, minimum=question.floor_bits * weights) for floor, weights in floors)


def _allocation(priced: Priced, answer: _Answer, asked: float, description: str) -> Allocation:
    table, choice = priced.table, answer.choice
    latency = None if priced.latency is None else _chosen_sum(priced.latency, choice)
    return Allocation(
        schemes={
            block.name: table.schemes[column]
            for block, column in zip(table.blocks, choice.tolist(), strict=True)
        },
        predicted_loss=_chosen_sum(priced.loss, choice),
        bound=answer.bound,
        proven=answer.proven,
        storage_bits=round(_chosen_sum(priced.storage, choice)),
        weights=priced.weights,
        asked_bits=asked,
        unit=table.unit,
        description=description,
        rotated_layers=table.rotated_layers,
        predicted_latency_us=latency,
        latency_source=priced.latency_source,
    )


def _chosen_sum(values: Matrix, choice: Choice) -> float:
    return float(values[np.arange(len(choice)), choice].sum())


def _spoken(question: Question) -> str:
    r = question.r
    by_layer = f"least loss^{r:g} x time^{1 - r:g} by layer"
    return "least loss" if question.objective == "loss" else by_layer


def _spoken_limits(question: Question) -> list[str]:
    parts = []
    if question.floor_bits is not None:
        parts.append(f"at least {question.floor_bits:g} bits in each layer")
    if question.max_latency_us is not None:
        parts.append(f"at most {question.max_latency_us:g} us")
    return parts

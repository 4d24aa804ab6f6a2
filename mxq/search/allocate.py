"""From a sensitivity table to an allocation: the questions that a user asks of the solver."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from mxq.artifacts import Allocation, SensitivityTable
from mxq.scheme import Scheme
from mxq.search.cost import LatencyModel, storage_cost
from mxq.search.granularity import group_labels, joined_labels
from mxq.search.mxmoe import least_product
from mxq.search.problem import (
    ROUNDING,
    AllocationProblem,
    Budget,
    Choice,
    Floor,
    InfeasibleError,
    Matrix,
    Solver,
    tie,
)
from mxq.search.solvers import solver_named

_STORAGE, _LATENCY = "storage bits", "latency us"


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
    priced = _priced(table, cost_model, tokens)
    labels = group_labels(table.blocks, granularity, tie_gate_up=tie_gate_up)
    for tie_B in ties:
        labels = joined_labels(labels, tie_B)
    limit = _limit(priced, bits, storage_bits)
    limits = (limit, floor_bits, max_latency_us)
    question = _Question(priced, labels, *limits, solver_named(solver), r, gap)
    answer = _OBJECTIVES[objective](question)
    parts = [_spoken(objective, r), f"{granularity} granularity", *_spoken_limits(question)]
    parts += ["gate and up tied"] if tie_gate_up else []
    return _allocation(priced, answer, limit / priced.weights, ", ".join(parts))


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
    priced = _priced(table, cost_model, tokens)
    choice = np.full(len(table.blocks), column)
    loss = _chosen_sum(priced.loss, choice)
    asked = _chosen_sum(priced.storage, choice) / priced.weights
    return _allocation(priced, _Answer(choice, loss, proven=True), asked, f"uniform {scheme}")


def best_uniform(
    table: SensitivityTable,
    *,
    storage_bits: float,
    cost_model: LatencyModel | None = None,
    tokens: float | None = None,
    max_latency_us: float | None = None,
) -> Allocation | None:
    """The uniform plan of least predicted loss within the limits; None if none fits."""
    plans = _uniform_plans(table, cost_model, tokens)
    fitting = [
        plan
        for plan in plans
        if plan.storage_bits <= storage_bits
        and (max_latency_us is None or (plan.predicted_latency_us or 0.0) <= max_latency_us)
    ]
    return min(fitting, key=lambda plan: plan.predicted_loss, default=None)


def next_uniform(table: SensitivityTable, *, bits: float) -> Allocation | None:
    """The smallest uniform plan of more than that many bits per weight; None if there is none."""
    larger = [plan for plan in _uniform_plans(table) if plan.bits_per_weight > bits]
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


def _uniform_plans(
    table: SensitivityTable, cost_model: LatencyModel | None = None, tokens: float | None = None
) -> list[Allocation]:
    return [
        uniform(table, scheme, cost_model=cost_model, tokens=tokens)
        for column, scheme in enumerate(table.schemes)
        if all(np.isfinite(row[column]) for row in table.loss)
    ]


def pareto(
    table: SensitivityTable, points: Sequence[float], *, solver: str | Solver = "pulp"
) -> tuple[tuple[float, float], ...]:
    """Bits per weight reached and predicted loss, for each number of bits asked for."""
    plans = [allocate(table, bits=bits, solver=solver) for bits in points]
    return tuple((plan.bits_per_weight, plan.predicted_loss) for plan in plans)


@dataclass(frozen=True, slots=True, eq=False)
class _Priced:
    """A table as arrays [B, S], with what each entry costs."""

    table: SensitivityTable
    loss: Matrix
    storage: Matrix
    latency: Matrix | None
    latency_source: str | None
    weights_B: Matrix

    @property
    def weights(self) -> int:
        return int(self.weights_B.sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    priced: _Priced
    labels: tuple[str, ...]
    limit: float
    floor_bits: float | None
    max_latency_us: float | None
    solver: Solver
    r: float
    gap: float


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """Scheme number of each block, a lower bound of the loss, and whether it is proven best."""

    choice: Choice
    bound: float
    proven: bool


def _priced(
    table: SensitivityTable, cost_model: LatencyModel | None, tokens: float | None
) -> _Priced:
    if (cost_model is None) != (tokens is None):
        raise ValueError("latency needs both cost_model and tokens (the tokens of one step)")
    latency, source = None, None
    if cost_model is not None and tokens is not None:
        latency = cost_model.latency_us(
            table.blocks,
            table.schemes,
            tokens=tokens,
            calibration_tokens=table.calibration_tokens,
        )
        source = f"{cost_model.describe()}, {tokens:g} tokens in a step"
    return _Priced(
        table,
        np.array(table.loss, dtype=np.float64),
        storage_cost(table.blocks, table.schemes),
        latency,
        source,
        np.array([b.out_features * b.in_features for b in table.blocks], dtype=np.float64),
    )


def _limit(priced: _Priced, bits: float | None, storage_bits: int | None) -> float:
    if storage_bits is not None and bits is None:
        return float(storage_bits)
    if bits is not None and storage_bits is None:
        return bits * priced.weights
    raise ValueError("give either bits (per weight) or storage_bits (over all blocks)")


def _least_loss(question: _Question) -> _Answer:
    priced = question.priced
    if question.max_latency_us is not None and priced.latency is None:
        raise ValueError("max_latency_us needs cost_model and tokens")
    everything = np.arange(len(priced.loss))
    problem, expand = _tied(question, everything, _floors(question))
    budgets = [_storage_within(problem, question.limit, priced.weights)]
    if question.max_latency_us is not None:
        latency = problem.budgets[1]
        budgets.append(Budget(latency.name, latency.cost, question.max_latency_us))
    limited = AllocationProblem(problem.loss, tuple(budgets), problem.floors)
    solution = question.solver(limited, gap=question.gap)
    return _Answer(expand(solution.choice), solution.bound, solution.proven)


def _least_product_by_layer(question: _Question) -> _Answer:
    """MxMoE's allocation: each layer on its own, with its share of the budget."""
    priced = question.priced
    if question.floor_bits is not None or question.max_latency_us is not None:
        raise ValueError("objective 'mxmoe' takes neither floor_bits nor max_latency_us")
    if question.r < 1 and priced.latency is None:
        raise ValueError("objective 'mxmoe' with r < 1 needs cost_model and tokens")
    _check_within_layers(question)
    choice, bound, proven = np.zeros(len(priced.loss), dtype=np.intp), 0.0, True
    for members in _layers(priced.table).values():
        problem, expand = _tied(question, members, ())
        weights = float(priced.weights_B[members].sum())
        storage = _storage_within(problem, question.limit / priced.weights * weights, weights)
        product = least_product(
            AllocationProblem(problem.loss, (storage,)),
            problem.budgets[-1].cost,
            r=question.r,
            solver=question.solver,
            gap=question.gap,
        )
        choice[members] = expand(product.choice)
        bound += product.least_loss
        proven = proven and product.proven
    return _Answer(choice, bound, proven)


def _check_within_layers(question: _Question) -> None:
    layers: dict[str, int] = {}
    for block, label in zip(question.priced.table.blocks, question.labels, strict=True):
        if layers.setdefault(label, block.layer) != block.layer:
            raise ValueError(
                f"objective 'mxmoe' solves each layer alone, but {block.name} shares a scheme with "
                f"blocks of layer {layers[label]}; use objective 'loss'"
            )


_OBJECTIVES: Mapping[str, Callable[[_Question], _Answer]] = {
    "loss": _least_loss,
    "mxmoe": _least_product_by_layer,
}


def _tied(
    question: _Question, members: Choice, floors: tuple[Floor, ...]
) -> tuple[AllocationProblem, Callable[[Choice], Choice]]:
    """Groups of the members, with all costs and no limits yet."""
    priced = question.priced
    budgets = [Budget(_STORAGE, priced.storage[members], inf)]
    if priced.latency is not None:
        budgets.append(Budget(_LATENCY, priced.latency[members], inf))
    problem = AllocationProblem(priced.loss[members], tuple(budgets), floors)
    return tie(problem, [question.labels[member] for member in members])


def _storage_within(problem: AllocationProblem, limit: float, weights: float) -> Budget:
    """The storage budget with its limit; out of reach is said in bits per weight."""
    storage = problem.budgets[0]
    cheapest = float(np.where(np.isfinite(problem.loss), storage.cost, inf).min(axis=1).sum())
    if cheapest > limit * (1 + ROUNDING):
        raise InfeasibleError(
            f"{limit / weights:.6g} bits per weight were asked for, but the cheapest plan needs "
            f"{cheapest / weights:.6g} ({cheapest:.0f} bits, metadata included); raise the "
            "budget, offer a cheaper scheme, or use a finer granularity"
        )
    return Budget(storage.name, storage.cost, limit)


def _floors(question: _Question) -> tuple[Floor, ...]:
    if question.floor_bits is None:
        return ()
    priced = question.priced
    return tuple(
        Floor(
            f"storage bits of layer {layer}",
            members,
            priced.storage[members],
            question.floor_bits * float(priced.weights_B[members].sum()),
        )
        for layer, members in _layers(priced.table).items()
    )


def _layers(table: SensitivityTable) -> Mapping[int, Choice]:
    layer_B = np.array([block.layer for block in table.blocks])
    return {int(layer): np.flatnonzero(layer_B == layer) for layer in np.unique(layer_B)}


def _allocation(priced: _Priced, answer: _Answer, asked: float, description: str) -> Allocation:
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


def _spoken(objective: str, r: float) -> str:
    return "least loss" if objective == "loss" else f"least loss^{r:g} x time^{1 - r:g} by layer"


def _spoken_limits(question: _Question) -> list[str]:
    parts = []
    if question.floor_bits is not None:
        parts.append(f"at least {question.floor_bits:g} bits in each layer")
    if question.max_latency_us is not None:
        parts.append(f"at most {question.max_latency_us:g} us")
    return parts

"""A sensitivity table made ready to be planned: all that does not depend on a limit.

A plan for another budget needs none of this again, so a session keeps it between questions.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from mxq.artifacts import SensitivityTable
from mxq.search.cost import LatencyModel, storage_cost
from mxq.search.granularity import group_labels, joined_labels
from mxq.search.problem import (
    ROUNDING,
    AllocationProblem,
    Budget,
    Choice,
    Floor,
    InfeasibleError,
    Matrix,
    least_cost,
    tie,
)


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """A table as arrays [B, S], with what each entry costs."""

    table: SensitivityTable
    loss: Matrix
    storage: Matrix
    latency: Matrix | None
    latency_source: str | None
    weights_B: Matrix

    @property
    def weights(self) -> int:
        """Weights of all blocks."""
        return int(self.weights_B.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """Blocks that share a scheme as one row of a problem, with all costs and no limits yet.

    ``expand`` turns a choice for the rows into one for the blocks.
    """

    problem: AllocationProblem
    expand: Callable[[Choice], Choice]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A priced table under one granularity.

    ``labels`` are the groups of the blocks. ``grouped`` is over all blocks, with a floor of 0 for
    each layer; ``floor_weights`` are the weights of those layers, in the same order.
    """

    priced: Priced
    granularity: str
    tie_gate_up: bool
    labels: tuple[str, ...]
    grouped: Grouped
    floor_weights: tuple[float, ...]


def price(table: SensitivityTable, cost_model: LatencyModel | None, tokens: float | None) -> Priced:
    """The table as arrays, with exact storage and, if there is a cost model, latencies.

    Raises:
        ValueError: If only one of ``cost_model`` and ``tokens`` is given.
    """
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
        routed = "1 token" if tokens == 1 else f"{tokens:g} tokens"
        source = f"{cost_model.describe()}, {routed} in a step"
    return Priced(
        table,
        np.array(table.loss, dtype=np.float64),
        storage_cost(table.blocks, table.schemes),
        latency,
        source,
        np.array([b.out_features * b.in_features for b in table.blocks], dtype=np.float64),
    )


def prepare(
    priced: Priced,
    *,
    granularity: str = "block",
    tie_gate_up: bool = False,
    ties: Sequence[Sequence[Hashable]] = (),
) -> Prepared:
    """A priced table with its groups; see ``mxq.search.allocate`` for the options.

    Raises:
        InfeasibleError: If a group has no scheme in common.
        ValueError: If there is no such granularity.
    """
    table = priced.table
    labels = group_labels(table.blocks, granularity, tie_gate_up=tie_gate_up)
    for tie_B in ties:
        labels = joined_labels(labels, tie_B)
    layers = layers_of(table)
    floors = tuple(
        Floor(f"storage bits of layer {layer}", members, priced.storage[members], 0.0)
        for layer, members in layers.items()
    )
    return Prepared(
        priced,
        granularity,
        tie_gate_up,
        labels,
        group(priced, labels, np.arange(len(table.blocks)), floors),
        tuple(float(priced.weights_B[members].sum()) for members in layers.values()),
    )


def group(
    priced: Priced, labels: tuple[str, ...], members: Choice, floors: tuple[Floor, ...] = ()
) -> Grouped:
    """Groups of the members: the storage budget comes first, that of latency, if any, second."""
    budgets = [Budget("storage bits", priced.storage[members], inf)]
    if priced.latency is not None:
        budgets.append(Budget("latency us", priced.latency[members], inf))
    problem = AllocationProblem(priced.loss[members], tuple(budgets), floors)
    return Grouped(*tie(problem, [labels[member] for member in members]))


def check_storage(grouped: Grouped, limit: float, weights: float) -> None:
    """Raise InfeasibleError, in bits per weight, if the cheapest plan needs more storage bits."""
    cheapest = least_cost(grouped.problem.loss, grouped.problem.budgets[0].cost)
    if cheapest > limit * (1 + ROUNDING):
        raise InfeasibleError(
            f"{limit / weights:.6g} bits per weight were asked for, but the cheapest plan needs "
            f"{cheapest / weights:.6g} ({cheapest:.0f} bits, metadata included); raise the "
            "budget, offer a cheaper scheme, or use a finer granularity"
        )


def layers_of(table: SensitivityTable) -> Mapping[int, Choice]:
    """Block numbers of each layer."""
    layer_B = np.array([block.layer for block in table.blocks])
    return {int(layer): np.flatnonzero(layer_B == layer) for layer in np.unique(layer_B)}

"""Plans of one table, one after the other: what does not depend on the budget is made once.

The plan is the one that ``mxq.search.allocate`` gives with the same limits and solver.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import numpy as np

from mxq.artifacts import Allocation, SensitivityTable
from mxq.config import AllocateOptions
from mxq.pinning import NO_PINS, Pins, keep_wide, naming_pins
from mxq.search.allocate import Question, answer, best_of, least_loss_within, uniform_plans
from mxq.search.cost import LatencyModel
from mxq.search.prepared import Prepared, Priced, prepare, price
from mxq.search.solver_lagrangian import solve_lagrangian

SOLVER_SECONDS = 0.5
"""When the solver stops to prove that a plan is the best one; what it has by then is shown."""

Restricted = tuple[Sequence[SensitivityTable], Sequence[Sequence[Hashable]]]
"""Tables with infinite loss for what may not be chosen, of which a plan keeps to one, and ties."""

Restrict = Callable[[SensitivityTable, AllocateOptions], Restricted]
"""What the engine of the options leaves of a table; raises ValueError if that is nothing."""


def unrestricted(table: SensitivityTable, options: AllocateOptions) -> Restricted:
    """The table as it is: mxq's own runtime takes every plan."""
    return (table,), ()


@dataclass(frozen=True, slots=True)
class Explored:
    """A plan, the uniform plan beside it, and how it was found.

    ``uniform`` is None where no uniform plan fits, or where a floor is asked for, which a uniform
    plan keeps only by chance. ``groups`` is the number of choices that the solver made.
    """

    plan: Allocation
    uniform: Allocation | None
    groups: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Rules:
    """Everything for one set of rules: the tables, of which a plan keeps to one, and their groups.

    ``uniforms`` are the uniform plans that keep the rules; pins do not bind them.
    """

    prepared: tuple[Prepared, ...]
    uniforms: tuple[Allocation, ...]


class Session:
    """A table with its prices, and what was prepared for each set of rules that was asked for."""

    def __init__(
        self,
        table: SensitivityTable,
        *,
        cost_model: LatencyModel | None = None,
        tokens: float | None = None,
        restrict: Restrict = unrestricted,
        pins: Pins = NO_PINS,
        solver_seconds: float = SOLVER_SECONDS,
    ) -> None:
        self.priced = price(table, cost_model, tokens)
        self.uniforms = uniform_plans(self.priced)
        self.pins = pins
        self._restrict = restrict
        self._solver = partial(solve_lagrangian, time_limit_s=solver_seconds)
        self._rules: dict[AllocateOptions, _Rules] = {}
        self._lock = Lock()

    def solve(self, options: AllocateOptions) -> Explored:
        """The plan of least predicted loss for these options; one at a time.

        Raises:
            ValueError: If no plan meets the limits; the message says what would be needed.
            RuntimeError: If the solver neither found a plan nor ruled one out.
        """
        assert options.bits is not None
        limit = options.bits * self.priced.weights
        with self._lock:
            start = time.perf_counter()
            rules = self._rules_of(options)
            limits = (limit, options.floor_bits, options.max_latency_us)
            questions = (Question(p, *limits, self._solver) for p in rules.prepared)
            with naming_pins(self.pins):
                plan = best_of([partial(answer, question) for question in questions])
            seconds = time.perf_counter() - start
        beside = None
        if options.floor_bits is None:
            beside = least_loss_within(
                rules.uniforms, storage_bits=int(limit), max_latency_us=options.max_latency_us
            )
        return Explored(plan, beside, len(rules.prepared[0].grouped.problem.loss), seconds)

    def refusal(self, options: AllocateOptions) -> str | None:
        """Why no plan keeps the rules of these options, whatever its limits; None if one may."""
        try:
            with self._lock:
                self._rules_of(options)
        except ValueError as error:
            return str(error)
        return None

    def _rules_of(self, options: AllocateOptions) -> _Rules:
        key = replace(options, bits=16.0, floor_bits=None, max_latency_us=None)
        if key not in self._rules:
            self._rules[key] = self._prepare(options)
        return self._rules[key]

    def _prepare(self, options: AllocateOptions) -> _Rules:
        tables, ties = self._restrict(self.priced.table, options)
        # Prices are of blocks and schemes, which a restriction leaves as they are.
        allowed = [
            (self._priced(table), self._priced(keep_wide(table, self.pins))) for table in tables
        ]
        with naming_pins(self.pins):
            prepared = tuple(
                prepare(
                    priced,
                    granularity=options.granularity,
                    tie_gate_up=options.tie_gate_up,
                    ties=ties,
                )
                for _, priced in allowed
            )
        return _Rules(
            prepared, tuple(plan for priced, _ in allowed for plan in uniform_plans(priced))
        )

    def _priced(self, table: SensitivityTable) -> Priced:
        """The prices with the losses of a table that was restricted."""
        return replace(self.priced, table=table, loss=np.array(table.loss, dtype=np.float64))

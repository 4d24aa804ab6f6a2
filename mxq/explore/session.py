"""Plans of one table, one after the other: what does not depend on the budget is made once.

The plan is the one that ``mxq.search.allocate`` gives with the same limits and solver.
"""

import time
from dataclasses import dataclass
from functools import partial
from threading import Lock

from mxq.artifacts import Allocation, SensitivityTable
from mxq.config import AllocateOptions
from mxq.search.allocate import Question, answer, least_loss_within, uniform_plans
from mxq.search.cost import LatencyModel
from mxq.search.prepared import Prepared, prepare, price
from mxq.search.solver_lagrangian import solve_lagrangian

SOLVER_SECONDS = 0.4
"""When the solver stops to prove that a plan is the best one; what it has by then is shown."""


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


class Session:
    """A table with its prices, and the groups of each granularity that was asked for."""

    def __init__(
        self,
        table: SensitivityTable,
        *,
        cost_model: LatencyModel | None = None,
        tokens: float | None = None,
        solver_seconds: float = SOLVER_SECONDS,
    ) -> None:
        self.priced = price(table, cost_model, tokens)
        self.uniforms = uniform_plans(self.priced)
        self._solver = partial(solve_lagrangian, time_limit_s=solver_seconds)
        self._prepared: dict[tuple[str, bool], Prepared] = {}
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
            prepared = self._prepare(options.granularity, options.tie_gate_up)
            limits = (limit, options.floor_bits, options.max_latency_us)
            plan = answer(Question(prepared, *limits, self._solver))
            seconds = time.perf_counter() - start
        beside = None
        if options.floor_bits is None:
            beside = least_loss_within(
                self.uniforms, storage_bits=int(limit), max_latency_us=options.max_latency_us
            )
        return Explored(plan, beside, len(prepared.grouped.problem.loss), seconds)

    def _prepare(self, granularity: str, tie_gate_up: bool) -> Prepared:
        key = granularity, tie_gate_up
        if key not in self._prepared:
            self._prepared[key] = prepare(
                self.priced, granularity=granularity, tie_gate_up=tie_gate_up
            )
        return self._prepared[key]

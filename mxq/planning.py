"""Stages 3 and 4: the price of every block under every scheme, and the plan that fits a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from mxq.artifacts import Allocation, Provenance, SensitivityTable
from mxq.checkpoint.size import block_budget
from mxq.config import OWN, AllocateOptions
from mxq.engines import load_rules, restrict
from mxq.for_engine import Inside, Ties, best_inside, inside, marked
from mxq.json_values import decode
from mxq.latency import load_pricing
from mxq.models.adapter import ModelAdapter
from mxq.pinning import NO_PINS, Pins, keep_wide, naming_pins, pins_of
from mxq.scheme import Scheme
from mxq.search.allocate import allocate, best_uniform, uniform
from mxq.search.cost import LatencyModel
from mxq.storage import digest_of, load_artifact, to_text
from mxq.workspace import Workspace, make_provenance


@dataclass(frozen=True, slots=True)
class _Plans:
    """The plans of a run by name, with what they were solved from."""

    plans: Mapping[str, Allocation]
    provenance: Provenance


def run_allocate(
    work: Workspace, adapter: ModelAdapter, table: SensitivityTable, options: AllocateOptions
) -> dict[str, Allocation]:
    """Stages 3 and 4, kept too: a solver that ran into its time limit need not give it again."""

    def make() -> _Plans:
        pins = pins_of(work, table, options)
        provenance = _made_from(table, options, pins)
        # Nobody knows whether another run's own solver was the same.
        solved = None if callable(options.solver) else work.cached("plans", _Plans, provenance)
        if solved is None:
            solved = _Plans(plan(table, options, adapter, pins=pins), provenance)
            work.save("plans", solved)
        work.save("allocation", solved.plans["plan"])
        return solved

    return dict(work.team.from_lead(_Plans, make).plans)


def keep_plans(
    work: Workspace,
    table: SensitivityTable,
    options: AllocateOptions,
    plans: Mapping[str, Allocation],
) -> None:
    """Write plans that were solved anew, with the options that they answer."""
    work.save("plans", _Plans(plans, _made_from(table, options, plans["plan"].pinned)))
    work.save("allocation", plans["plan"])


def options_of(work: Workspace, plan: Allocation) -> AllocateOptions | None:
    """The options that a plan of the work folder answers; None if nothing there tells."""
    try:
        solved = load_artifact(work.path("plans"), _Plans)
        settings = solved.provenance.settings
        asked = {f.name: settings[f.name] for f in fields(AllocateOptions) if f.name in settings}
        options = decode(AllocateOptions, asked)
    except ValueError:  # absent, or of another version
        return None
    return options if solved.plans.get("plan") == plan else None


def _made_from(table: SensitivityTable, options: AllocateOptions, pins: Pins) -> Provenance:
    asked = {name: value for name, value in asdict(options).items() if name != "profiles"}
    if callable(options.solver):
        asked["solver"] = OWN
    if options.device is not None:
        asked["prices"] = digest_of(repr(load_pricing(options.device, options.profiles)))
    if options.engine is None:
        del asked["engine"], asked["tensor_parallel"]  # as in files that are older than they
    else:
        asked["rules"] = digest_of(repr(load_rules(options.engine)))
    return make_provenance(
        table.provenance.model_digest,
        table.provenance.calibration_digest,
        {**asked, "pinned": dict(pins), "table": digest_of(to_text(table))},
    )


def plan(
    table: SensitivityTable,
    options: AllocateOptions,
    adapter: ModelAdapter | None = None,
    *,
    pins: Pins = NO_PINS,
) -> dict[str, Allocation]:
    """Stages 3 and 4: prices and the plan, with the uniform plan of the same size beside it.

    ``adapter`` is needed for a budget of the whole checkpoint only. With an engine both keep its
    rules, and the plan says what the best one without them would lose. ``pins`` bind the plan, not
    the uniform one.
    """
    cost = None
    if options.device is not None:
        cost = load_pricing(options.device, options.profiles).cost
    found = inside(table, options)
    forced = options.forced_scheme()
    if forced is not None:
        _check_forced(forced, found)
        chosen = uniform(table, forced, cost_model=cost, tokens=options.tokens)
        return {"plan": marked(chosen, found, None)}
    limit = None
    if options.size_bytes is not None:
        assert adapter is not None
        limit = block_budget(adapter, options.size_bytes)
    chosen = _solved(table, found, _Budget(options, cost, limit, pins))
    if options.floor_bits is not None:
        return {"plan": chosen}  # a uniform plan keeps the floor only by chance
    tables = (table,) if found is None else found.tables
    asked = limit if limit is not None else int((options.bits or 0) * chosen.weights)
    beside = _best_uniform(tables, options, cost, asked)
    return (
        {"plan": chosen}
        if beside is None
        else {"plan": chosen, "uniform": marked(beside, found, None)}
    )


@dataclass(frozen=True, slots=True)
class _Budget:
    """What plans are asked for: prices of a device, bits left for blocks, pinned experts."""

    options: AllocateOptions
    cost: LatencyModel | None
    limit: int | None
    pins: Pins

    def solve(self, table: SensitivityTable, ties: Ties) -> Allocation:
        """The best plan of a table that gives pinned experts its widest schemes."""
        with naming_pins(self.pins):
            found = self._solve(keep_wide(table, self.pins), ties)
        return replace(found, pinned=dict(self.pins))

    def _solve(self, table: SensitivityTable, ties: Ties) -> Allocation:
        options = self.options
        return allocate(
            table,
            bits=options.bits,
            storage_bits=self.limit,
            granularity=options.granularity,
            tie_gate_up=options.tie_gate_up,
            floor_bits=options.floor_bits,
            cost_model=self.cost,
            tokens=options.tokens,
            max_latency_us=options.max_latency_us,
            solver=options.solver,
            objective=options.objective,
            r=options.r,
            ties=ties,
        )


def _solved(table: SensitivityTable, found: Inside | None, budget: _Budget) -> Allocation:
    """The best plan; with an engine the best inside its rules, and what the best one loses."""
    if found is None:
        return budget.solve(table, ())
    chosen = best_inside(found, budget.solve)
    # Plans of least product are not comparable in loss alone.
    is_comparable = budget.options.objective == "loss"
    free = budget.solve(table, ()).predicted_loss if is_comparable else None
    return marked(chosen, found, free)


def _best_uniform(
    tables: Sequence[SensitivityTable],
    options: AllocateOptions,
    cost: LatencyModel | None,
    asked: int,
) -> Allocation | None:
    plans = [
        best_uniform(
            table,
            storage_bits=asked,
            cost_model=cost,
            tokens=options.tokens,
            max_latency_us=options.max_latency_us,
        )
        for table in tables
    ]
    fitting = [plan for plan in plans if plan is not None]
    return min(fitting, key=lambda plan: plan.predicted_loss, default=None)


def _check_forced(scheme: Scheme, found: Inside | None) -> None:
    """Raise ValueError unless the engine takes a scheme for every block."""
    if found is not None:
        restrict(
            found.rules,
            found.tables[0].blocks,
            (scheme,),
            found.restriction.tensor_parallel,
        )

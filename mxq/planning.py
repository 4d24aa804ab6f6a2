"""Stages 3 and 4: the price of every block under every scheme, and the plan that fits a budget."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from mxq.artifacts import Allocation, Provenance, SensitivityTable
from mxq.checkpoint.size import block_budget
from mxq.config import AllocateOptions
from mxq.json_values import decode
from mxq.latency import load_pricing
from mxq.models.adapter import ModelAdapter
from mxq.search.allocate import allocate, best_uniform, uniform
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
        provenance = _made_from(table, options)
        solved = work.cached("plans", _Plans, provenance)
        if solved is None:
            solved = _Plans(plan(table, options, adapter), provenance)
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
    work.save("plans", _Plans(plans, _made_from(table, options)))
    work.save("allocation", plans["plan"])


def options_of(work: Workspace, plan: Allocation) -> AllocateOptions | None:
    """The options that a plan of the work folder answers; None if nothing there tells."""
    try:
        solved = load_artifact(work.path("plans"), _Plans)
        asked = {f.name: solved.provenance.settings.get(f.name) for f in fields(AllocateOptions)}
        options = decode(AllocateOptions, asked)
    except ValueError:  # absent, or of another version
        return None
    return options if solved.plans.get("plan") == plan else None


def _made_from(table: SensitivityTable, options: AllocateOptions) -> Provenance:
    asked = {name: value for name, value in asdict(options).items() if name != "profiles"}
    if options.device is not None:
        asked["prices"] = digest_of(repr(load_pricing(options.device, options.profiles)))
    return make_provenance(
        table.provenance.model_digest,
        table.provenance.calibration_digest,
        {**asked, "table": digest_of(to_text(table))},
    )


def plan(
    table: SensitivityTable, options: AllocateOptions, adapter: ModelAdapter | None = None
) -> dict[str, Allocation]:
    """Stages 3 and 4: prices and the plan, with the uniform plan of the same size beside it.

    ``adapter`` is needed for a budget of the whole checkpoint only.
    """
    cost = None
    if options.device is not None:
        cost = load_pricing(options.device, options.profiles).cost
    forced = options.forced_scheme()
    if forced is not None:
        return {"plan": uniform(table, forced, cost_model=cost, tokens=options.tokens)}
    limit = None
    if options.size_bytes is not None:
        assert adapter is not None
        limit = block_budget(adapter, options.size_bytes)
    chosen = allocate(
        table,
        bits=options.bits,
        storage_bits=limit,
        granularity=options.granularity,
        tie_gate_up=options.tie_gate_up,
        floor_bits=options.floor_bits,
        cost_model=cost,
        tokens=options.tokens,
        max_latency_us=options.max_latency_us,
        solver=options.solver,
        objective=options.objective,
        r=options.r,
    )
    if options.floor_bits is not None:
        return {"plan": chosen}  # a uniform plan keeps the floor only by chance
    asked = limit if limit is not None else int((options.bits or 0) * chosen.weights)
    beside = best_uniform(
        table,
        storage_bits=asked,
        cost_model=cost,
        tokens=options.tokens,
        max_latency_us=options.max_latency_us,
    )
    return {"plan": chosen} if beside is None else {"plan": chosen, "uniform": beside}

"""What ``--engine`` changes in a run: the schemes that are measured, rotation, and the plan.

The rules themselves are in ``mxq.engines``; here they meet the options, the model and the table.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isinf

from mxq.artifacts import Allocation, BlockInfo, SensitivityTable
from mxq.config import AllocateOptions, MeasureOptions
from mxq.engines import (
    EngineRules,
    Restriction,
    fitting_schemes,
    format_warnings,
    load_rules,
    restrict,
)
from mxq.models.adapter import ModelAdapter
from mxq.profiling.table import block_infos
from mxq.scheme import Scheme
from mxq.search.allocate import best_of
from mxq.search.problem import InfeasibleError

Ties = Sequence[Sequence[Hashable]]


@dataclass(frozen=True, slots=True)
class Inside:
    """A table with infinite loss for all that an engine does not take, and what it ties.

    There are several tables where an engine takes schemes of one sort or of another, not of both.
    """

    rules: EngineRules
    restriction: Restriction
    tables: tuple[SensitivityTable, ...]


def inside(table: SensitivityTable, options: AllocateOptions) -> Inside | None:
    """What the engine of the options leaves of a table; None without an engine.

    Raises:
        ValueError: If the engine takes nothing for some block, or the inputs are rotated.
    """
    if options.engine is None:
        return None
    rules = load_rules(options.engine)
    _check_rotation(rules, table)
    restriction = restrict(rules, table.blocks, table.schemes, options.tensor_parallel)
    tables = tuple(_keep(table, allowed) for allowed in restriction.alternatives)
    lacking = [_block_without(found) for found in tables]
    if all(lacking):
        raise ValueError(
            f"{rules.title} {rules.version} takes none of the schemes that are listed for "
            f"{lacking[0]}; mxq check --engine {rules.engine} shows its rules"
        )
    kept = tuple(found for found, block in zip(tables, lacking, strict=True) if block is None)
    return Inside(rules, restriction, kept)


def _keep(table: SensitivityTable, allowed: Sequence[Sequence[bool]]) -> SensitivityTable:
    """The table with infinite loss for what is not allowed."""
    loss = tuple(
        tuple(loss if may else inf for loss, may in zip(losses, row, strict=True))
        for losses, row in zip(table.loss, allowed, strict=True)
    )
    return replace(table, loss=loss)


def _block_without(table: SensitivityTable) -> str | None:
    """The first block that no scheme is left for."""
    rows = zip(table.blocks, table.loss, strict=True)
    return next((block.name for block, losses in rows if all(map(isinf, losses))), None)


def best_inside(found: Inside, solve: Callable[[SensitivityTable, Ties], Allocation]) -> Allocation:
    """The plan of least loss among the alternatives.

    Raises:
        InfeasibleError: If none of them has a plan, with what the last of them lacks.
    """
    try:
        return best_of([partial(solve, table, found.restriction.ties) for table in found.tables])
    except InfeasibleError as error:
        raise InfeasibleError(f"inside the rules of {found.rules.title}: {error}") from error


def marked(plan: Allocation, found: Inside | None, unrestricted: float | None) -> Allocation:
    """The plan with the engine that it was solved for, and the loss of the best plan without it.

    A plan inside the rules is one without them too, so it bounds the best of those.
    """
    if found is None:
        return plan
    ranks = found.restriction.tensor_parallel
    on = f" on {ranks} ranks" if ranks > 1 else ""
    return replace(
        plan,
        engine=found.rules.engine,
        tensor_parallel=ranks,
        unrestricted_loss=None if unrestricted is None else min(unrestricted, plan.predicted_loss),
        description=f"{plan.description}, inside the rules of {found.rules.title} "
        f"{found.rules.version}{on}",
    )


def measured_for(
    adapter: ModelAdapter, options: AllocateOptions, measured: MeasureOptions
) -> MeasureOptions:
    """The measuring options with only what the engine takes; as they are without an engine.

    Raises:
        ValueError: If the options ask for what the engine does not take.
    """
    if options.engine is None:
        return measured
    rules, blocks = load_rules(options.engine), block_infos(adapter)
    forbids = rules.of_kind("not rotated")
    if forbids and measured.rotation == "on":
        says = forbids[0].says
        raise ValueError(f"--rotation on does not go with --engine {rules.engine}: {says}")
    rotation = "off" if forbids else measured.rotation
    return replace(measured, schemes=_menu(rules, blocks, options, measured), rotation=rotation)


def notes_for(options: AllocateOptions, measured: MeasureOptions) -> tuple[str, ...]:
    """What the engine changes in a run, for who starts it."""
    if options.engine is None:
        return ()
    rules = load_rules(options.engine)
    ranks = f", {options.tensor_parallel} ranks" if options.tensor_parallel > 1 else ""
    schemes = _offered(measured.schemes, measured)
    return (
        f"For {rules.title} {rules.version}{ranks}: rotation is {measured.rotation}, and only "
        f"{', '.join(str(scheme) for scheme in schemes)} are measured.",
        *format_warnings(rules, schemes),
    )


def _menu(
    rules: EngineRules,
    blocks: Sequence[BlockInfo],
    options: AllocateOptions,
    measured: MeasureOptions,
) -> tuple[Scheme, ...]:
    """The schemes asked for, or the default ones of the engine.

    Raises:
        ValueError: If the engine takes one of them for no block, or some block has none.
    """
    ranks = options.tensor_parallel
    schemes = measured.schemes or fitting_schemes(rules, blocks, ranks)
    offered = _offered(schemes, measured)
    found = restrict(rules, blocks, offered, ranks)
    used = {
        scheme
        for allowed in found.alternatives
        for row in allowed
        for scheme, may in zip(offered, row, strict=True)
        if may
    }
    unused = [str(scheme) for scheme in offered if scheme not in used]
    if unused:
        raise ValueError(
            f"{rules.title} {rules.version} takes {', '.join(unused)} for no block of this model; "
            f"leave them out of --schemes (mxq check --engine {rules.engine} shows its rules)"
        )
    return schemes


def _offered(schemes: Sequence[Scheme], measured: MeasureOptions) -> tuple[Scheme, ...]:
    """Those schemes, and the ones that are listed for single projections."""
    listed = {scheme for menu in measured.by_projection.values() for scheme in menu}
    return tuple(sorted({*schemes, *listed}))


def _check_rotation(rules: EngineRules, table: SensitivityTable) -> None:
    if not table.rotated_layers or not rules.of_kind("not rotated"):
        return
    layers = ", ".join(str(layer) for layer in table.rotated_layers[:5])
    more = ", ..." if len(table.rotated_layers) > 5 else ""
    raise ValueError(
        f"the inputs of layers {layers}{more} were measured rotated, which {rules.title} does not "
        "read; measure again with mxq measure --rotation off, or mxq quantize "
        f"--engine {rules.engine}, in another work folder"
    )

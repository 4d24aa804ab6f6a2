"""What can be told to be wrong before anything is computed, told first.

A run may take hours. A solver that does not exist, a device without a file, a budget below the
cheapest plan or a folder that cannot be written would else be found at its end.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from mxq.artifacts import SensitivityTable
from mxq.checkpoint.size import block_budget
from mxq.choices import Choices, measure_settings
from mxq.config import AllocateOptions, MeasureOptions, OutputOptions
from mxq.for_engine import inside
from mxq.latency import load_pricing
from mxq.models.adapter import ModelAdapter
from mxq.pinning import NO_PINS, Pins, keep_wide, naming_pins
from mxq.profiling.losses import MeasureSettings
from mxq.profiling.table import check_fit, unmeasured_table
from mxq.publish import check_apart
from mxq.search.prepared import check_storage, prepare, price
from mxq.search.problem import feasible
from mxq.search.solvers import solver_named


def check_request(
    adapter: ModelAdapter,
    allocate: AllocateOptions,
    measured: MeasureOptions,
    output: OutputOptions,
    choices: Choices | None,
) -> None:
    """Raise ValueError for a request that would fail later, with what to change."""
    check_apart(output, adapter.source.folder)
    settings = measure_settings(adapter, measured, choices)
    check_fit(adapter.blocks(), settings)
    solver_named(allocate.solver)
    if allocate.device is not None:
        load_pricing(allocate.device, allocate.profiles)
    _check_budget(adapter, allocate, settings, NO_PINS)
    for folder in (output.output, output.work_folder):
        check_writable(folder)


def check_pinned(
    adapter: ModelAdapter,
    allocate: AllocateOptions,
    measured: MeasureOptions,
    choices: Choices | None,
    pins: Pins,
) -> None:
    """Raise ValueError if pinned experts leave no plan in the budget, before it is measured."""
    if pins:
        with naming_pins(pins):
            _check_budget(adapter, allocate, measure_settings(adapter, measured, choices), pins)


def check_writable(folder: Path) -> None:
    """Raise ValueError unless files can be written to a folder, or to where it is to be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}: {there}); give another folder"
        ) from error


def _check_budget(
    adapter: ModelAdapter, options: AllocateOptions, settings: MeasureSettings, pins: Pins
) -> None:
    """Raise ValueError if the cheapest plan that keeps all rules is over the budget."""
    if options.plan is not None:
        return
    table = unmeasured_table(adapter, settings)
    found = inside(table, options)
    tables, ties = ((table,), ()) if found is None else (found.tables, found.restriction.ties)
    weights = sum(block.weights for block in adapter.blocks())
    limit = (options.bits or 0) * weights
    if options.size_bytes is not None:
        limit = block_budget(adapter, options.size_bytes)

    def check(candidates: SensitivityTable) -> None:
        prepared = prepare(
            price(keep_wide(candidates, pins), None, None),
            granularity=options.granularity,
            tie_gate_up=options.tie_gate_up,
            ties=ties,
        )
        check_storage(prepared.grouped, limit, weights)

    feasible([partial(check, candidates) for candidates in tables])

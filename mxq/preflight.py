"""What can be told to be wrong before anything is computed, told first.

A run may take hours. A solver that does not exist, a device without a file, a budget below the
cheapest plan or a folder that cannot be written would else be found at its end.
"""

from pathlib import Path
from tempfile import TemporaryFile

from mxq.checkpoint.size import block_budget
from mxq.choices import Choices, measure_settings
from mxq.config import AllocateOptions, MeasureOptions, OutputOptions
from mxq.for_engine import choices_of
from mxq.latency import load_pricing
from mxq.models.adapter import ModelAdapter
from mxq.pinning import NO_PINS, Pins, naming_pins, widest
from mxq.profiling.losses import MeasureSettings
from mxq.profiling.table import check_fit
from mxq.publish import check_apart
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
    """Raise ValueError if the cheapest candidate of every block is over the budget."""
    if options.plan is not None:
        return
    blocks = adapter.blocks()
    is_pinned = [f"{adapter.site_of(block)}.{block.expert}" in pins for block in blocks]
    weights = sum(block.weights for block in blocks)
    limit = (options.bits or 0) * weights
    if options.size_bytes is not None:
        limit = block_budget(adapter, options.size_bytes)
    cheapest = min(
        sum(
            min(
                s.storage_bits(b.out_features, b.in_features) for s in (widest(may) if pin else may)
            )
            for b, may, pin in zip(blocks, choices, is_pinned, strict=True)
        )
        for choices in choices_of(adapter, options, settings)
    )
    if cheapest > limit * (1 + 1e-9):
        raise ValueError(
            f"{limit / weights:.6g} bits per weight were asked for, but the cheapest plan needs "
            f"{cheapest / weights:.6g} ({cheapest} bits, metadata included); raise the budget, or "
            "offer a cheaper scheme"
        )

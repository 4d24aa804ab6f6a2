"""Experts that keep a wide format whatever the budget: found in the profile, held in the plan.

A predicted loss is of second order: it is not made for an expert without which the model breaks.
Such experts are a handful among thousands, so their bytes hardly count, and no plan narrows them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf, isfinite

from mxq.artifacts import SensitivityTable
from mxq.config import AllocateOptions
from mxq.counted import counted
from mxq.profiling.activation import ActivationStats
from mxq.profiling.super_experts import find_super_experts
from mxq.scheme import Scheme
from mxq.search.problem import InfeasibleError
from mxq.workspace import Workspace

log = logging.getLogger("mxq")

Pins = Mapping[str, float]
"""Experts by name, with how many times their outputs are those of their layer."""

NO_PINS: Pins = {}

PINNED_BITS = 8
"""Least bits of a pinned expert's weights, where the menu has as many."""


def pins_for(options: AllocateOptions, profile: ActivationStats) -> Pins:
    """The experts that a plan of these options has to pin.

    None where the plan is forced, and none for "mxmoe": that is the mode of a paper without pins.
    """
    if not _asks_for_pins(options):
        return NO_PINS
    return {found.name: found.times for found in find_super_experts(profile.sites)}


def pins_of(work: Workspace, table: SensitivityTable, options: AllocateOptions) -> Pins:
    """The same from a work folder; without a profile none, and the log says so.

    Raises:
        ValueError: If the profile is damaged, or older than what is needed of it.
    """
    if not _asks_for_pins(options) or all(block.expert is None for block in table.blocks):
        return NO_PINS
    if not work.path("profile").is_file():
        log.warning("%s holds no profile, so no expert is pinned", work.folder)
        return NO_PINS
    return pins_for(options, work.profile())


def _asks_for_pins(options: AllocateOptions) -> bool:
    return options.pin != "off" and options.plan is None and options.objective != "mxmoe"


def widest(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Those of ``PINNED_BITS`` and more; of fewer bits, where there are none, the widest."""
    least = min(PINNED_BITS, max(scheme.w_bits for scheme in schemes))
    return tuple(scheme for scheme in schemes if scheme.w_bits >= least)


def keep_wide(table: SensitivityTable, pins: Pins) -> SensitivityTable:
    """The table with infinite loss for narrower schemes of pinned experts."""
    if not pins:
        return table
    rows = []
    for block, losses in zip(table.blocks, table.loss, strict=True):
        offered = [s for s, loss in zip(table.schemes, losses, strict=True) if isfinite(loss)]
        if offered and block.expert is not None and f"{block.site}.{block.expert}" in pins:
            kept = widest(offered)
            pairs = zip(table.schemes, losses, strict=True)
            rows.append(tuple(loss if scheme in kept else inf for scheme, loss in pairs))
        else:
            rows.append(losses)
    return replace(table, loss=tuple(rows))


@contextmanager
def naming_pins(pins: Pins) -> Iterator[None]:
    """Say in the message of a request that cannot be met that experts are pinned."""
    try:
        yield
    except ValueError as error:
        if not pins:
            raise
        kind = InfeasibleError if isinstance(error, InfeasibleError) else ValueError
        names = ", ".join(list(pins)[:3]) + (", ..." if len(pins) > 3 else "")
        raise kind(
            f"with {counted(len(pins), 'expert')} pinned to {PINNED_BITS} bits or the widest "
            f"format ({names}): {error}; --pin off plans without pins"
        ) from error

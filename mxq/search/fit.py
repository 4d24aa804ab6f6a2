"""From timed launches to the constants of a branch, by linear least squares.

A launch takes its overhead plus rounds of equal tiles: cycles outside the loop, units of inputs
with weights from memory and units with weights from the cache (``kernel_cost.launch_time``). Once
it is supposed which unit holds up each of the two loops, the time is linear in the cycles outside
the loop and in one over the efficiency of those units. All nine suppositions are tried; the
simplest that explains the times is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, isclose, log
from statistics import median

import numpy as np
from scipy.optimize import nnls

from mxq.artifacts import KernelCase, KernelTiming
from mxq.counted import counted
from mxq.kernels.spec import TILE_PLANS, UNIT, TilePlan, format_of
from mxq.search.device import Device
from mxq.search.figures import BranchFigures
from mxq.search.kernel_cost import (
    LIMITS,
    BranchConstants,
    KernelModel,
    Products,
    TileTime,
    UnitCycles,
    branch_key,
    launch_time,
    multiprocessor_of,
    tile_grid,
    tile_time,
    unit_cycles,
)
from mxq.search.problem import Matrix
from mxq.search.profiles import BranchProfile
from mxq.search.tiles import max_split

LEAST_TIMINGS = 4
"""Timings of a branch below which nothing is fitted."""

_NOISE = 1e-3
"""Relative error of a clock; models that agree better than this explain the times equally well."""


def branch_of(case: KernelCase) -> str:
    """Name of the branch that a case times."""
    return branch_key(format_of(case.scheme), plan_of_tile(case.tile))


def plan_of_tile(tile: int) -> TilePlan:
    """The tile plan with tiles of that many tokens.

    Raises:
        ValueError: If there is none.
    """
    for plan in TILE_PLANS:
        if plan.tokens == tile:
            return plan
    raise ValueError(
        f"no tile plan has tiles of {counted(tile, 'token')}; was the profile made by this mxq?"
    )


def fit_launch(timings: Sequence[KernelTiming], device: Device) -> float:
    """Microseconds of a launch: the median of those without tiles, else the device file's."""
    empty = [timing.median_us for timing in timings if timing.case.tokens == 0]
    return median(empty) if empty else device.launch_us


def fit_branch(
    timings: Sequence[KernelTiming],
    device: Device,
    figures: BranchFigures | None,
    launch_us: float,
) -> BranchProfile:
    """The constants of the branch that all timings are of.

    Raises:
        ValueError: If there are too few timings, or no constants explain them.
    """
    name = branch_of(timings[0].case)
    if len(timings) < LEAST_TIMINGS:
        raise ValueError(
            f"{counted(len(timings), 'timing')} of {name}; a fit needs {LEAST_TIMINGS}"
        )
    constants = _fit(timings, device, figures, launch_us)
    predicted = []
    for place, timing in enumerate(timings):
        others = [other for index, other in enumerate(timings) if index != place]
        left_out = _fit(others, device, figures, launch_us)
        predicted.append(predict_us(timing.case, device, figures, left_out, launch_us))
    return BranchProfile(constants, figures, tuple(timings), tuple(predicted))


def predict_us(
    case: KernelCase,
    device: Device,
    figures: BranchFigures | None,
    constants: BranchConstants,
    launch_us: float,
) -> float:
    """Microseconds of a case under some constants."""
    name = branch_of(case)
    known = {} if figures is None else {name: figures}
    model = KernelModel(device, known, {name: constants}, launch_us)
    plan = plan_of_tile(case.tile)
    time = model.tile_time(format_of(case.scheme), plan)
    return launch_time(_products(case, time), plan, model).total_us


@dataclass(frozen=True, slots=True)
class _Candidate:
    constants: BranchConstants
    score: float

    @property
    def efficiency(self) -> float:
        """The least of the efficiencies."""
        return min(e for e in self.constants.efficiencies.values() if e is not None)


def _fit(
    timings: Sequence[KernelTiming],
    device: Device,
    figures: BranchFigures | None,
    launch_us: float,
) -> BranchConstants:
    case = timings[0].case
    plan = plan_of_tile(case.tile)
    cycles = unit_cycles(format_of(case.scheme), plan, device, figures)
    table = np.array([_row(timing, plan, device, launch_us) for timing in timings])
    candidates = [
        found
        for first, repeat in product(LIMITS, LIMITS)
        if (found := _candidate(table, cycles, first, repeat)) is not None
    ]
    if not candidates:
        raise ValueError(
            f"no constants explain the {len(timings)} timings of {branch_of(case)}: they do not "
            "grow with the inputs"
        )
    # Where two units would hold up both loops alike, no time tells them apart: it is taken to be
    # the one that then runs nearer to its rate.
    return min(candidates, key=lambda found: (round(found.score, 6), -found.efficiency)).constants


def _row(
    timing: KernelTiming, plan: TilePlan, device: Device, launch_us: float
) -> tuple[float, float, float, float]:
    """Cycles as a sum of cycles outside the loop, from memory and from the cache, and the cycles.

    All tiles of a case take as long, so it is rounds of them. Relative to the measured time.
    """
    grid = tile_grid(_products(timing.case, TileTime(0, 1, 1)), plan, device.sm_count)
    rounds, blocks = ceil(grid.tiles / grid.slots), int(grid.blocks_P[0])
    units = grid.resident * grid.units / blocks
    cycles = timing.median_us * multiprocessor_of(device).clock_mhz
    busy = 1 - launch_us / timing.median_us
    return rounds / cycles, rounds * units / cycles, rounds * units * (blocks - 1) / cycles, busy


def _candidate(table: Matrix, cycles: UnitCycles, first: str, repeat: str) -> _Candidate | None:
    """Constants if these units hold up the two loops; None if the constants then say otherwise."""
    names = sorted({first, repeat})
    columns = [table[:, 0]]
    for name in names:
        column = np.zeros(len(table))
        column += table[:, 1] * cycles.first[name] if name == first else 0.0
        column += table[:, 2] * cycles.repeat[name] if name == repeat else 0.0
        columns.append(column)
    if any(not column.any() for column in columns):
        return None
    # The columns differ by orders of magnitude; in units of their norm they do not.
    norms = [float(np.linalg.norm(column)) for column in columns]
    scaled = np.stack([column / norm for column, norm in zip(columns, norms, strict=True)], axis=1)
    found, misfit = nnls(scaled, table[:, 3])
    tile_cycles, *slownesses = (value / norm for value, norm in zip(found, norms, strict=True))
    if min(slownesses) <= 0.1:
        return None
    efficiencies = {name: 1 / value for name, value in zip(names, slownesses, strict=True)}
    constants = _constants(float(tile_cycles), efficiencies)
    if not _agrees(tile_time(cycles, constants), cycles, efficiencies, first, repeat):
        return None
    count = len(table)
    score = count * log(float(misfit) ** 2 / count + _NOISE**2) + log(count) * len(columns)
    return _Candidate(constants, score)


def _agrees(
    time: TileTime,
    cycles: UnitCycles,
    efficiencies: Mapping[str, float],
    first: str,
    repeat: str,
) -> bool:
    """Whether the slowest units are the supposed ones."""
    return isclose(time.first, cycles.first[first] / efficiencies[first], rel_tol=1e-9) and isclose(
        time.repeat, cycles.repeat[repeat] / efficiencies[repeat], rel_tol=1e-9
    )


def _constants(tile_cycles: float, efficiencies: Mapping[str, float]) -> BranchConstants:
    return BranchConstants(
        tile_cycles,
        memory_efficiency=efficiencies.get("memory"),
        issue_efficiency=efficiencies.get("issue"),
        matrix_efficiency=efficiencies.get("matrix"),
    )


def _products(case: KernelCase, time: TileTime) -> Products:
    ones = np.ones(case.experts)
    return Products(
        tile_cycles_P=ones * time.tile_cycles,
        first_P=ones * time.first,
        repeat_P=ones * time.repeat,
        tokens_P=np.full(case.experts, case.tokens, dtype=np.int64),
        out_features_P=np.full(case.experts, case.out_features, dtype=np.int64),
        units=-(-case.in_features // UNIT),
        max_split=max_split(plan_of_tile(case.tile), case.experts * case.tokens),
    )

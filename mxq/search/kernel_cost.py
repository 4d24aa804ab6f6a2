"""The time of tiles, of launches and of blocks in the generated kernels (docs/cost-model.md).

A tile is ``tokens`` x 128 outputs of one product. Its loop is held up by the slowest of three
units: the memory path, the issue of instructions, the matrix unit. All cycles here are those of one
multiprocessor (SM), and those of a loop are for one unit of 128 inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from mxq.kernels.spec import ROW_TILE, UNIT, Branch, TilePlan, WeightFormat, stages
from mxq.search.device import Device, Multiprocessor
from mxq.search.figures import BranchFigures
from mxq.search.problem import Matrix
from mxq.search.tiles import Counts, makespan, split_factor

LIMITS = ("memory", "issue", "matrix")


@dataclass(frozen=True, slots=True)
class BranchConstants:
    """What timing a branch finds: cycles of a tile outside its loop, and how well the loop runs.

    An efficiency is the part of a unit's rate that the loop reaches; None if that unit never was
    the one that held it up.
    """

    tile_cycles: float
    memory_efficiency: float | None
    issue_efficiency: float | None
    matrix_efficiency: float | None

    def __post_init__(self) -> None:
        """Raise ValueError for constants that no kernel has."""
        if not 0 <= self.tile_cycles < 1e7:
            raise ValueError(f"{self.tile_cycles:g} cycles of a tile outside its loop")
        known = [value for value in self.efficiencies.values() if value is not None]
        if not known:
            raise ValueError("a branch needs at least one efficiency")
        for value in known:
            if not 0 < value < 10:
                raise ValueError(f"an efficiency of {value:g} is not between 0 and 10")

    @property
    def efficiencies(self) -> Mapping[str, float | None]:
        """By the names in ``LIMITS``."""
        values = (self.memory_efficiency, self.issue_efficiency, self.matrix_efficiency)
        return dict(zip(LIMITS, values, strict=True))


@dataclass(frozen=True, slots=True)
class UnitCycles:
    """Cycles that each unit needs at its full rate for 128 inputs of a tile, by ``LIMITS``.

    ``first`` is for a tile whose weights come from memory, ``repeat`` for the next tile of the same
    weights with other tokens, which runs beside it and finds them in the cache.
    """

    first: Mapping[str, float]
    repeat: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TileTime:
    """Cycles of a tile outside its loop, and in it for 128 inputs."""

    tile_cycles: float
    first: float
    repeat: float


def unit_cycles(
    form: WeightFormat, plan: TilePlan, device: Device, figures: BranchFigures | None
) -> UnitCycles:
    """What 128 inputs of a tile need of each unit; issue is 0 without figures of the branch."""
    sm = multiprocessor_of(device)
    metadata_bytes = 4 * UNIT // form.group_size if form.group_size is not None else 0
    weight_bytes = ROW_TILE * (UNIT * form.w_bits // 8 + metadata_bytes)
    input_bytes = plan.tokens * UNIT * (2 if form.input == "bf16" else 1)
    from_cache = (weight_bytes + input_bytes) / sm.l2_bytes_per_clock
    # GB/s is 1e3 bytes in a microsecond, MHz is cycles in one, TFLOP/s is 1e6 operations in one.
    memory_rate = device.bandwidth_gb_s * 1e3 / (device.sm_count * sm.clock_mhz)
    matrix_rate = device.rate_of(form.arithmetic) * 1e6 / (device.sm_count * sm.clock_mhz)
    shared = {
        "issue": 0.0 if figures is None else _issue_cycles(figures),
        "matrix": 2 * plan.tokens * ROW_TILE * UNIT / matrix_rate,
    }
    return UnitCycles(
        {"memory": max(weight_bytes / memory_rate, from_cache), **shared},
        {"memory": from_cache, **shared},
    )


def _issue_cycles(figures: BranchFigures) -> float:
    """Each of 4 schedulers issues a warp instruction in a cycle, one of the integer pipe in two."""
    instructions = max(figures.loop_instructions, 2 * figures.alu_instructions)
    return instructions * figures.warps / 4 * UNIT / figures.step


def tile_time(cycles: UnitCycles, constants: BranchConstants) -> TileTime:
    """The slowest unit holds up the loop; one without an efficiency never does."""
    first, repeat = (
        max(needed[limit] / e for limit, e in constants.efficiencies.items() if e is not None)
        for needed in (cycles.first, cycles.repeat)
    )
    return TileTime(constants.tile_cycles, first, repeat)


@dataclass(frozen=True, slots=True)
class KernelModel:
    """Tile times on a device: compiled figures, and constants where branches were timed.

    Without ``constants`` of a branch those that the device file assumes count. ``launch_us`` None
    is that of the device file.
    """

    device: Device
    figures: Mapping[str, BranchFigures]
    constants: Mapping[str, BranchConstants] = field(default_factory=dict)
    launch_us: float | None = None

    @property
    def launch_time_us(self) -> float:
        """Microseconds of a launch without tiles."""
        return self.device.launch_us if self.launch_us is None else self.launch_us

    def tile_time(self, form: WeightFormat, plan: TilePlan) -> TileTime:
        """Of the branch for a format under a plan."""
        branch = branch_key(form, plan)
        cycles = unit_cycles(form, plan, self.device, self.figures.get(branch))
        constants = self.constants.get(branch, assumed_constants(self.device))
        return tile_time(cycles, constants)


def branch_key(form: WeightFormat, plan: TilePlan) -> str:
    """How compiled figures and profiles name the branch for a format under a plan."""
    return str(Branch(form, plan.tokens, stages(form, plan)))


def assumed_constants(device: Device) -> BranchConstants:
    """What the device file says for every branch."""
    sm = multiprocessor_of(device)
    return BranchConstants(
        sm.tile_cycles, sm.memory_efficiency, sm.issue_efficiency, sm.matrix_efficiency
    )


def multiprocessor_of(device: Device) -> Multiprocessor:
    """The multiprocessor of a device.

    Raises:
        ValueError: If its file does not describe one.
    """
    if device.multiprocessor is None:
        raise ValueError(
            f"the file of device {device.name!r} has no multiprocessor, which tile times need"
        )
    return device.multiprocessor


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """The products of one launch, P of them: tile times, tokens and sizes.

    ``units`` are those of 128 inputs, the same for all; ``max_split`` is the most slices.
    """

    tile_cycles_P: Matrix
    first_P: Matrix
    repeat_P: Matrix
    tokens_P: Counts
    out_features_P: Counts
    units: int
    max_split: int


@dataclass(frozen=True, slots=True)
class LaunchTime:
    """How long one launch takes, and why.

    ``rounds`` is how many tiles run one after the other if all take as long, ``longest_us`` the
    longest tile, ``work_us`` all tiles if the multiprocessors shared them without a remainder,
    ``tiles_us`` the time until the last tile ends.
    """

    tiles: int
    split: int
    rounds: int
    work_us: float
    longest_us: float
    tiles_us: float
    launch_us: float

    @property
    def total_us(self) -> float:
        """Time of the launch."""
        return self.launch_us + self.tiles_us


def launch_time(products: Products, plan: TilePlan, model: KernelModel) -> LaunchTime:
    """One launch over the tiles of its products.

    Programs that share a multiprocessor share its units, so a loop takes as many times longer; the
    cycles outside the loop overlap.
    """
    sm_count = model.device.sm_count
    clock_mhz = multiprocessor_of(model.device).clock_mhz
    grid = tile_grid(products, plan, sm_count)
    blocks_P = np.maximum(grid.blocks_P, 1)
    loops_P = grid.units * (products.first_P + (blocks_P - 1) * products.repeat_P) / blocks_P
    durations_P = products.tile_cycles_P + grid.resident * loops_P
    shared_P = products.tile_cycles_P / plan.ctas_per_sm + loops_P
    return LaunchTime(
        tiles=grid.tiles,
        split=grid.split,
        rounds=ceil(grid.tiles / grid.slots),
        work_us=float((grid.tiles_P * shared_P).sum()) / sm_count / clock_mhz,
        longest_us=float(durations_P[grid.tiles_P > 0].max(initial=0.0)) / clock_mhz,
        tiles_us=makespan(durations_P.tolist(), grid.tiles_P.tolist(), grid.slots) / clock_mhz,
        launch_us=model.launch_time_us,
    )


@dataclass(frozen=True, slots=True, eq=False)
class TileGrid:
    """How a launch is cut: tiles and blocks of tokens of each product, and what runs at a time.

    A tile has ``units`` units of inputs; ``resident`` programs share a multiprocessor. The blocks
    of tokens of a product are next to each other in the table, so they run at the same time: the
    one load of the weights from memory holds them up together.
    """

    tiles_P: Counts
    blocks_P: Counts
    split: int
    units: int
    slots: int
    resident: int

    @property
    def tiles(self) -> int:
        """Tiles of all products."""
        return int(self.tiles_P.sum())


def tile_grid(products: Products, plan: TilePlan, sm_count: int) -> TileGrid:
    """The tiles of a launch on a device of that many multiprocessors."""
    slots = sm_count * plan.ctas_per_sm
    columns_P = -(-products.out_features_P // ROW_TILE)
    blocks_P = -(-products.tokens_P // plan.tokens)
    tiles_P = columns_P * blocks_P
    split = split_factor(int(tiles_P.sum()), slots, products.max_split)
    split = min(split, products.units)
    return TileGrid(
        tiles_P=tiles_P * split,
        blocks_P=blocks_P,
        split=split,
        units=ceil(products.units / split),
        slots=slots,
        resident=min(plan.ctas_per_sm, max(1, ceil(int(tiles_P.sum()) * split / sm_count))),
    )

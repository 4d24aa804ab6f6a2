"""What this machine has free, and how fast it is just now."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from mxq.compute import CPU
from mxq.numerics import search_grid
from mxq.scheme import Scheme

_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where the second and the first version of control groups say a limit and what is used."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is free: memory that this process may take, and disk in the work folder."""

    memory_bytes: int
    disk_bytes: int


ROWS = 16
"""Rows that are multiplied at a time, each by a matrix of its own: more than a cache holds."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Speeds of this machine: multiply-adds count as two operations.

    ``row_operations_per_second`` are those of single rows times matrices, which memory limits.
    """

    operations_per_second: float
    searched_weights_per_second: float
    read_bytes_per_second: float = 1e9
    row_operations_per_second: float = 1e10


def machine(folder: Path) -> Machine:
    """What is free for this process, and in the folder or the nearest one above it that exists.

    Layers that a stopped run has packed there count as free: they are not written again.
    """
    packed = sum(path.stat().st_size for path in folder.glob("packed-*/*"))
    return Machine(_free_memory(), free_disk(folder) + packed)


def free_disk(folder: Path) -> int:
    """Bytes that are free in a folder, or in the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def measure_rates(device: torch.device = CPU) -> Rates:
    """Products of matrices and of rows, and the clip search, timed on a usual size."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 1024, generator=generator).to(device) for n in (512, 1024))
    product = _fastest(lambda: x @ w.T)
    search = _fastest(lambda: search_grid(w[:128], Scheme.parse("w4a16_g128_asym"))[0])
    square = w.expand(ROWS, 1024, 1024).contiguous()
    rows = _fastest(lambda: (x[:ROWS, None] @ square)[:, 0])
    return Rates(
        2 * 512 * 1024 * 1024 / product,
        128 * 1024 / search,
        row_operations_per_second=2 * ROWS * 1024 * 1024 / rows,
    )


def _free_memory() -> int:
    """What this process may hold: available memory, within the limit of its control group."""
    own = int(psutil.Process().memory_info().rss)
    free = int(psutil.virtual_memory().available)
    for folder, limit, used in _CONTROL_GROUPS:
        most, taken = _number(folder / limit), _number(folder / used)
        if most is not None and taken is not None:
            free = min(free, max(0, most - taken + _cached_files(folder)))
    return free + own


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None if there is no such file or limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached_files(folder: Path) -> int:
    """Bytes of files in memory, which a control group counts and gives up when it must."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(" ", 1) for line in lines)
    return int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))


def _fastest(run: Callable[[], Tensor]) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        run()[0, 0].item()  # a value read: a GPU is done by then
        best = min(best, time.perf_counter() - start)
    return best

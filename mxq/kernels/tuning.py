"""Times kernels of one format on a GPU: which launches, how they are timed, and on what.

A ``Bench`` is the machine: it makes launches and reads the clock. ``cuda_bench`` is the real one;
tests pass one of their own. What the times mean is not decided here (``mxq.search.fit``).
"""

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from mxq.artifacts import KernelCase, KernelTiming
from mxq.kernels.spec import TILE_PLANS, TilePlan, WeightFormat, format_of
from mxq.scheme import Scheme

Shape = tuple[int, int]
"""Output and input features of a product."""

Launch = Callable[[], None]
Launcher = Callable[[KernelCase], Sequence[Launch]]
"""Prepares a case: one launch for each copy of the weights."""

Timer = Callable[[Sequence[Launch], int], Sequence[float]]
"""Runs the launches in turn, so many times over: microseconds of one launch, each time."""

# Both products of experts of three sizes in use, small, middle and large: six numbers of inputs.
DEFAULT_SHAPES: tuple[Shape, ...] = (
    (1536, 2048), (2048, 768), (2816, 2048), (2048, 1408), (28672, 4096), (4096, 14336),
)  # fmt: skip

COLD_BYTES = 256 * 1024**2
"""Weights that a round of copies holds at least: several times the cache of any GPU (60 MB)."""

LEAST_COPIES = 4
REPEATED_TILES = 4
_LARGE_EXPERT = 16 * 1024**2  # weights
_REPLAYS = 20


@dataclass(frozen=True, slots=True)
class Bench:
    """A machine to time kernels on; ``clocks_mhz`` reads its clocks, at best right after a load."""

    gpu: str
    launcher: Launcher
    timer: Timer
    clocks_mhz: Callable[[], Mapping[str, float]]
    versions: Mapping[str, str]


def tuning_cases(
    schemes: Iterable[Scheme],
    shapes: Sequence[Shape] = DEFAULT_SHAPES,
    plans: Sequence[TilePlan] = TILE_PLANS,
) -> tuple[KernelCase, ...]:
    """Launches for every format and tile plan, those of one kernel next to each other.

    Each shape is timed with few and with many experts that get one tile of tokens each, so that
    their weights come from memory, and with a few experts that get ``REPEATED_TILES`` tiles, so
    that most find them in the cache. One launch of each plan has no tiles.

    Raises:
        ValueError: If no kernel computes a scheme.
    """
    by_format: dict[WeightFormat, Scheme] = {}
    for scheme in schemes:
        by_format.setdefault(format_of(scheme), scheme)
    ordered = [by_format[form] for form in sorted(by_format)]
    return tuple(
        case
        for plan in plans
        for place, scheme in enumerate(ordered)
        for case in _cases_of_branch(scheme, shapes, plan, with_empty=place == 0)
    )


def _cases_of_branch(
    scheme: Scheme, shapes: Sequence[Shape], plan: TilePlan, *, with_empty: bool
) -> Iterator[KernelCase]:
    if with_empty:
        yield _case(scheme, plan, 1, 0, shapes[0])
    for shape in shapes:
        few, many = (1, 8) if shape[0] * shape[1] > _LARGE_EXPERT else (4, 32)
        yield _case(scheme, plan, few, plan.tokens, shape)
        yield _case(scheme, plan, many, plan.tokens, shape)
        yield _case(scheme, plan, few, REPEATED_TILES * plan.tokens, shape)


def _case(scheme: Scheme, plan: TilePlan, experts: int, tokens: int, shape: Shape) -> KernelCase:
    weight_bytes = experts * scheme.storage_bits(*shape) // 8
    copies = max(LEAST_COPIES, -(-COLD_BYTES // weight_bytes)) if tokens else 1
    return KernelCase(scheme, plan.tokens, experts, tokens, *shape, copies=copies)


def time_cases(
    cases: Sequence[KernelCase],
    bench: Bench,
    *,
    replays: int = _REPLAYS,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[KernelTiming, ...]:
    """Each case timed on the bench, in order."""
    timings = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress(f"{format_of(case.scheme)}/{case.tile}", done, len(cases))
        times = np.asarray(bench.timer(bench.launcher(case), replays), dtype=np.float64)
        low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
        timings.append(KernelTiming(case, len(times), middle, low, high))
    return tuple(timings)


def cuda_bench() -> Bench:
    """The GPU of this machine.

    Raises:
        RuntimeError: If there is none that torch can use.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "mxq tune times kernels on a CUDA GPU and torch finds none here; without a profile "
            "latencies come from compiled figures and the device file"
        )
    from mxq.kernels.timed_launches import group_gemm_launches  # imports triton

    return Bench(
        gpu=torch.cuda.get_device_name(),
        launcher=group_gemm_launches,
        timer=time_graph,
        clocks_mhz=clocks_mhz,
        versions=_versions(),
    )


def time_graph(launches: Sequence[Launch], replays: int) -> list[float]:
    """Microseconds of one launch in each replay of a CUDA graph that holds all of them."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # of torch
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # of torch
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # of torch
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(launches))
    return times


def clocks_mhz() -> dict[str, float]:
    """Clocks of the multiprocessors and of the memory as the driver's tool reports them, never set.

    Empty where it cannot tell.
    """
    names = {"sm": "clocks.sm", "memory": "clocks.mem", "sm most": "clocks.max.sm"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names.values())}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        cells = done.stdout.splitlines()[0].split(",")
        return {name: float(cell) for name, cell in zip(names, cells, strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}  # a profile without clocks is still a profile


def _versions() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    for name in ("mxq", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found

"""Reading the clock: CUDA graphs of launches over copies of the weights, ceilings, clocks.

``NoClock`` runs every launch once and returns no time: with it everything but the timing is tested
on a machine without a GPU, and no number that was not measured can be written down.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Protocol

import torch

WARM_UPS = 3
LEAST_REPLAYS = 20
MOST_REPLAYS = 60
TARGET_US = 200_000.0
"""Device time that the replays of a case aim at, within the two limits above."""


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one launch over the replays of a graph; all None where nothing was timed."""

    median_us: float | None
    p10_us: float | None
    p90_us: float | None
    replays: int


class Clock(Protocol):
    """Times launches; ``device`` is where their tensors have to be."""

    device: str

    def time(self, launches: Sequence[Callable[[], object]]) -> Times:
        """Time of one of the launches, which run in turn."""
        ...


class NoClock:
    """Launches everything once and times nothing."""

    device = "cpu"

    def time(self, launches: Sequence[Callable[[], object]]) -> Times:
        """No time."""
        for launch in launches:
            launch()
        return Times(None, None, None, 0)


class CudaClock:
    """Replays of a CUDA graph between two events."""

    device = "cuda"

    def time(self, launches: Sequence[Callable[[], object]]) -> Times:
        """Median, 10th and 90th percentile of the time of a replay, over its launches."""
        graph = _recorded(launches)
        for _ in range(WARM_UPS):
            graph.replay()
        once = _replay_us(graph)
        count = int(min(max(TARGET_US / max(once, 1.0), LEAST_REPLAYS), MOST_REPLAYS))
        times = [_replay_us(graph) / len(launches) for _ in range(count)]
        tenths = quantiles(times, n=10, method="inclusive")
        return Times(tenths[4], tenths[0], tenths[8], count)


def _recorded(launches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles what is not compiled, allocates workspaces
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


def measure_ceilings(clock: Clock) -> dict[str, float | None]:
    """Bytes a second of a large copy, and operations a second of large products, by arithmetic.

    Random data throughout: zeros run faster than real weights. None where nothing was timed or
    this torch lacks the product.
    """
    is_real = clock.device == "cuda"
    size, side = (2**30, 8192) if is_real else (2**16, 128)
    source = torch.randint(0, 256, (size,), device=clock.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = clock.time([lambda: target.copy_(source)] * 4).median_us
    ceilings = {"copy_bytes_per_s": None if copied is None else 2e6 * size / copied}
    for name, product in _products(side, clock.device).items():
        try:
            us = clock.time([product] * 4).median_us
        except (RuntimeError, NotImplementedError):
            us = None
        ceilings[f"{name}_flops_per_s"] = None if us is None else 2e6 * side**3 / us
    return ceilings


def _products(side: int, device: str) -> Mapping[str, Callable[[], object]]:
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    a8, b8 = ((40 * x).clamp(-127, 127).to(torch.int8) for x in (a, b))
    af, bf = (x.to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device=device)
    return {
        "bf16": lambda: a @ b.T,
        "int8": lambda: torch._int_mm(a8, b8.T),
        "fp8": lambda: torch._scaled_mm(
            af, bf.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }

"""Time the step from packed words on disk to kernel order, for one layer of experts.

Words are random: the time does not depend on them. The default is a layer of 60 experts with three
projections of 2048 x 1408, 519 million weights, read as ``mxq.checkpoint`` reads them.

    python benchmarks/bench_repack.py --scheme w4a16_g128_asym --threads 2 --json out.json
"""

import argparse
import datetime
import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxq.checkpoint.tensors import from_tensors, tensor_shapes
from mxq.kernels.arena import GroupedWeights, Problem, WeightSize, group_weights
from mxq.scheme import Scheme, parse_schemes

DEFAULT_SCHEMES = (
    "w2a16_g128_asym,w3a16_g128_asym,w4a16_g128_asym,w8a16_g128_asym,w4a8_grow_sym,w8a8_grow_sym"
)


def stored_tensors(size: WeightSize) -> Mapping[str, Tensor]:
    """Random tensors of one weight, as a file holds them."""
    generator = torch.Generator().manual_seed(2026)
    tensors = {}
    for suffix, (shape, dtype) in tensor_shapes(
        size.scheme, size.out_features, size.in_features
    ).items():
        patterns = torch.randint(-(2**31), 2**31, shape, generator=generator)
        tensors[suffix] = (
            patterns.to(dtype) if dtype == torch.int32 else torch.ones(shape).to(dtype)
        )
    return tensors


def read(sizes: list[WeightSize], columns: list[int], experts: list[int]) -> Iterator[Problem]:
    """Each weight unpacked when it is asked for; those of a size share their tensors."""
    stored = {size: stored_tensors(size) for size in set(sizes)}
    for size, column, expert in zip(sizes, columns, experts, strict=True):
        q = from_tensors(stored[size], size.scheme, size.out_features, size.in_features)
        yield Problem(q, column, expert)
        del q


def repack_layer(scheme: Scheme, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and bytes of the arenas, for one layer."""
    hidden, inner, experts = arguments.hidden, arguments.inner, arguments.experts
    first = [WeightSize(scheme, inner, hidden)] * (2 * experts)
    second = [WeightSize(scheme, hidden, inner)] * experts
    start = time.perf_counter()
    arenas: list[GroupedWeights] = [
        group_weights(
            read(first, [0, inner] * experts, [i // 2 for i in range(2 * experts)]), first
        ),
        group_weights(read(second, [0] * experts, list(range(experts))), second),
    ]
    seconds = time.perf_counter() - start
    weights = 3 * experts * hidden * inner
    return {
        "scheme": str(scheme),
        "seconds": round(seconds, 2),
        "ns_per_weight": round(seconds / weights * 1e9, 2),
        "arena_mib": round(sum(a.words.numel() + 4 * a.meta.numel() for a in arenas) / 2**20, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "experts": arguments.experts,
        "hidden": arguments.hidden,
        "inner": arguments.inner,
        "weights": 3 * arguments.experts * arguments.hidden * arguments.inner,
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "also_running": arguments.also_running,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scheme", default=DEFAULT_SCHEMES, help="one or several, with commas")
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--also-running", default="nothing", help="what else loads the machine")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run, print, and write the JSON file if asked to."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    schemes = parse_schemes(arguments.scheme)
    result = _about(arguments) | {"layers": [repack_layer(s, arguments) for s in schemes]}
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()

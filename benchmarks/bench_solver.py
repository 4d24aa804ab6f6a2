"""Time the allocation solver against plain PuLP on a problem as large as the largest models.

44,544 blocks are the 58 expert layers of a DeepSeek-V3 (256 experts, 3 projections). Losses and
token counts are heavy-tailed and the same on every run. Plain PuLP (the whole problem handed to
CBC) runs in a process of its own, so that it can be stopped and its memory be read.

    python benchmarks/bench_solver.py --blocks 44544 --schemes 8 --budgets 2 --json out.json
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pulp

from mxq.search import SOLVERS, AllocationProblem, Budget

OUT_FEATURES, IN_FEATURES = 2048, 7168
BLOCKS_PER_LAYER = 768
GROUP_BITS = 20 / 128  # one 16-bit scale and about 4 bits of zero point for each group of 128


def heavy_tailed_problem(
    blocks: int, schemes: int, budgets: int, *, tightness: float, equal_loss: bool = False
) -> AllocationProblem:
    """Blocks of several layers; ``tightness`` 1 leaves just the cheapest plan, 0 any plan."""
    rng = np.random.default_rng(2026)
    w_bits = np.array([2, 3, 4, 8, 2, 4, 5, 6])[np.arange(schemes) % 8]
    a_bits = np.array([16, 16, 16, 16, 8, 8, 16, 8])[np.arange(schemes) % 8]
    layer = np.arange(blocks) // BLOCKS_PER_LAYER
    tokens = rng.pareto(1.1, blocks) + 1e-3
    scale = np.exp(rng.normal(0, 1, layer.max() + 1))[layer] * tokens * rng.lognormal(0, 1, blocks)
    steps = 4.0**-w_bits + np.where(a_bits == 8, 3e-4, 0.0)
    loss = scale[:, None] * steps * rng.lognormal(0, 0.3, (blocks, schemes))
    if equal_loss:
        loss = np.ones((blocks, schemes))
    bits = np.full((blocks, schemes), OUT_FEATURES * IN_FEATURES * 1.0) * (w_bits + GROUP_BITS)
    # Memory-bound experts pay for bytes, compute-bound ones for arithmetic, which a8 halves.
    share = tokens / tokens.mean()
    latency = np.maximum((w_bits + GROUP_BITS) / 4, share[:, None] * a_bits / 16)
    costs = {"bytes": bits / 8, "latency": latency}
    return AllocationProblem(
        loss,
        tuple(_budget(name, costs[name], tightness) for name in list(costs)[:budgets]),
    )


def _budget(name: str, cost: np.ndarray, tightness: float) -> Budget:
    cheapest, dearest = cost.min(axis=1).sum(), cost.max(axis=1).sum()
    return Budget(name, cost, float(dearest - tightness * (dearest - cheapest)))


def time_solver(solver: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of building and solving, and what the solution says of itself."""
    start = time.perf_counter()
    problem = heavy_tailed_problem(
        arguments.blocks, arguments.schemes, arguments.budgets, tightness=arguments.tightness
    )
    solution = SOLVERS[solver](problem, gap=arguments.gap)
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "gap": solution.gap,
        "proven": solution.proven,
        "loss": solution.loss,
        "peak_mib": _peak_mib(resource.RUSAGE_SELF),
    }


def solve_plainly(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole problem as one PuLP model for CBC."""
    start = time.perf_counter()
    problem = heavy_tailed_problem(
        arguments.blocks, arguments.schemes, arguments.budgets, tightness=arguments.tightness
    )
    model = pulp.LpProblem("plain", pulp.LpMinimize)
    x = [
        [model.add_variable(f"x{b}_{s}", cat="Binary") for s in range(arguments.schemes)]
        for b in range(arguments.blocks)
    ]
    model.setObjective(pulp.LpAffineExpression(_terms(x, problem.loss)))
    for budget in problem.budgets:
        unit = budget.limit
        model += pulp.LpAffineExpression(_terms(x, budget.cost / unit)) <= 1
    for row in x:
        model += pulp.LpAffineExpression([(variable, 1.0) for variable in row]) == 1
    built = time.perf_counter() - start
    remaining = max(arguments.plain_limit - built, 1.0)
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=arguments.gap, timeLimit=remaining))
    proven = model.sol_status == pulp.LpSolutionOptimal
    found = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    peak = max(_peak_mib(resource.RUSAGE_SELF), _peak_mib(resource.RUSAGE_CHILDREN))
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "build_seconds": round(built, 3),
        "gap": arguments.gap if proven else None,
        "proven": proven,
        "loss": float(pulp.value(model.objective)) if found else None,
        "peak_mib": peak,
    }


def _terms(x: list[list[pulp.LpVariable]], values: np.ndarray) -> list[tuple[Any, float]]:
    return [
        (variable, value)
        for row, numbers in zip(x, values.tolist(), strict=True)
        for variable, value in zip(row, numbers, strict=True)
    ]


def plain_in_subprocess(arguments: argparse.Namespace) -> dict[str, Any]:
    """``solve_plainly`` in another process, stopped a little after its limit."""
    command = [sys.executable, __file__, "--plain-only"]
    for name in ("blocks", "schemes", "budgets", "tightness", "gap", "plain_limit"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    stopped = {"seconds": arguments.plain_limit, "gap": None, "proven": False, "peak_mib": None}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.plain_limit + 60, check=False
        )
    except subprocess.TimeoutExpired:
        return {**stopped, "note": "stopped: neither solved nor ended at its time limit"}
    if done.returncode != 0:
        return {**stopped, "note": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _peak_mib(who: int) -> float:
    return round(resource.getrusage(who).ru_maxrss / 1024, 1)


def _about(arguments: argparse.Namespace) -> Mapping[str, Any]:
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "blocks": arguments.blocks,
        "schemes": arguments.schemes,
        "budgets": arguments.budgets,
        "tightness": arguments.tightness,
        "gap_asked": arguments.gap,
        "cpus": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pulp": pulp.__version__,
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=44544)
    parser.add_argument("--schemes", type=int, default=8)
    parser.add_argument("--budgets", type=int, default=2, choices=(1, 2))
    parser.add_argument(
        "--tightness", type=float, default=0.75, help="0 any plan, 1 only the cheapest"
    )
    parser.add_argument("--gap", type=float, default=1e-4)
    parser.add_argument("--solver", default="pulp", choices=tuple(SOLVERS))
    parser.add_argument("--plain-limit", type=float, default=120.0, help="seconds; 0 leaves it out")
    parser.add_argument("--plain-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run, print, and write the JSON file if asked to."""
    arguments = _arguments()
    if arguments.plain_only:
        print(json.dumps(solve_plainly(arguments)))
        return
    result = {**_about(arguments), "solver": arguments.solver}
    result |= time_solver(arguments.solver, arguments)
    if arguments.plain_limit > 0:
        result["plain_pulp"] = plain_in_subprocess(arguments)
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()

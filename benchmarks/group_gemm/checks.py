"""Results against the float32 definition, on the device, for every format and tile plan.

A check also compiles its kernels into Triton's cache, so several processes check at once and the
process that times afterwards compiles nothing.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from group_gemm.cases import OURS, Case
from group_gemm.products import Half, error_over_bound, is_reproducible
from group_gemm.shapes import TINY, Model, plan_named
from group_gemm.weights import random_grid
from mxq.kernels.arena import Problem, group_weights, size_of
from mxq.kernels.group_gemm import GroupGemm, Launches
from mxq.kernels.layout import layout_of
from mxq.kernels.reference import make_inputs_torch
from mxq.kernels.routing import route
from mxq.kernels.spec import TILE_PLANS, format_of
from mxq.numerics import QuantizedWeight
from mxq.scheme import Scheme

EXPERTS, TOP_K = 6, 2
TOKENS_OF = {"decode": 20, "middle": 150, "prefill": 500}
PART_SECONDS = 240
"""Longest that a process checks; with kernels to compile it takes about a minute."""

OUTPUTS, INPUTS = 200, 512
"""Outputs that leave the last tile half empty; inputs of four units."""


@dataclass(frozen=True, slots=True)
class Check:
    """One product with these schemes, in tiles of a plan."""

    schemes: tuple[str, ...]
    launches: Launches
    plan: str

    @property
    def name(self) -> str:
        """What names it in a results file."""
        return f"{'+'.join(self.schemes)}/{self.launches}/{self.plan}"


def checks_for(cases: Iterable[Case], models: Mapping[str, Model]) -> tuple[Check, ...]:
    """Everything that our cases launch, each once: schemes of either product in every tile plan.

    The tiles of a case depend on its routing's size, so all plans are checked for all of them.
    """
    found = []
    for case in cases:
        if case.runner == OURS:
            found += [
                Check(schemes, "single" if case.launches == "single" else "mixed", plan.name)
                for schemes in products_of(case, models)
                for plan in TILE_PLANS
            ]
    return tuple(dict.fromkeys(found))


def products_of(case: Case, models: Mapping[str, Model]) -> tuple[tuple[str, ...], ...]:
    """Distinct schemes of the first and of the second product of a case."""
    plan = plan_named(case.plan, models[case.model])
    return tuple(tuple(sorted(map(str, set(half)))) for half in (plan.first, plan.down))


def run_check(check: Check, device: str, tokens: int | None = None) -> dict[str, Any]:
    """Error over bound (more than 1 fails), whether two runs agree in every bit, seconds."""
    started = time.perf_counter()
    half, tokens = _product(check, device, tokens or TOKENS_OF[check.plan])
    error = error_over_bound(half, tokens)
    same = is_reproducible(half, tokens)
    tile_plan = half.gemms[0].plan_for(tokens).name
    return {
        "name": check.name,
        # On the CPU all checks are of few tokens, to be quick.
        "passed": error <= 1.0 and same and (device == "cpu" or tile_plan == check.plan),
        "error_over_bound": error,
        "identical_bits": same,
        "tile_plan": tile_plan,
        "seconds": round(time.perf_counter() - started, 2),
    }


def run_checks(
    checks: Sequence[Check], device: str, *, workers: int, folder: Path
) -> list[dict[str, Any]]:
    """All checks, in ``workers`` processes, or in this one if 0."""
    if workers == 0 or len(checks) < 2:
        tiny = 5 if device == "cpu" else None
        return [guarded(check, device, tiny) for check in checks]
    parts = [checks[number::workers] for number in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(_run_part, parts, (folder / f"checks-{i}.json" for i in range(workers)))
        return [result for results in found for result in results]


def _run_part(part: Sequence[Check], path: Path) -> list[dict[str, Any]]:
    """Checks in a process of their own, and in a new one after one that a check has broken."""
    results: list[dict[str, Any]] = []
    target = path.with_suffix(".done")
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--check", str(path), str(target)]
    while len(results) < len(part):
        target.unlink(missing_ok=True)
        left = part[len(results) :]
        path.write_text(json.dumps([[c.schemes, c.launches, c.plan] for c in left]))
        status = _status(command)
        done = json.loads(target.read_text()) if target.is_file() else []
        if len(done) < len(left) and not (done and "reason" in done[-1]):
            done.append(_failure(left[len(done)], f"its process ended with {status}"))
        results += done
    return results


def _status(command: Sequence[str]) -> str:
    """How a process ended, in words; one that hangs is stopped."""
    try:
        return f"status {subprocess.run(command, check=False, timeout=PART_SECONDS).returncode}"
    except subprocess.TimeoutExpired:
        return f"no end in {PART_SECONDS} seconds"


def check_worker(source: Path, target: Path) -> None:
    """The part of one process: checks from a file, results into another after each.

    It ends after a check that raised: an error on the device makes all later ones fail too.
    """
    results = []
    for schemes, launches, plan in json.loads(source.read_text()):
        results.append(guarded(Check(tuple(schemes), launches, plan), "cuda", None))
        part = target.with_suffix(".part")
        part.write_text(json.dumps(results))
        part.replace(target)
        if "reason" in results[-1]:
            return


def guarded(check: Check, device: str, tokens: int | None) -> dict[str, Any]:
    """A check whose exception is a failure with a reason."""
    try:
        return run_check(check, device, tokens)
    except Exception as error:  # noqa: BLE001  # a compiler or driver error of any kind
        return _failure(check, f"{type(error).__name__}: {error}"[:500])


def _failure(check: Check, reason: str) -> dict[str, Any]:
    return {"name": check.name, "passed": False, "reason": reason}


def _product(check: Check, device: str, tokens: int) -> tuple[Half, int]:
    """Experts that have all schemes in turn, one of them without tokens."""
    generator = torch.Generator().manual_seed(5)
    schemes = [Scheme.parse(text) for text in check.schemes]
    inputs = INPUTS if device == "cuda" else TINY.hidden
    count = max(2 * EXPERTS, len(schemes) + len(schemes) % 2)
    weights = [_weight(schemes[i % len(schemes)], inputs, generator) for i in range(count)]
    problems = [Problem(q, column=(i % 2) * OUTPUTS, expert=i // 2) for i, q in enumerate(weights)]
    group = group_weights(problems, [size_of(q) for q in weights], device=device)
    gemm = GroupGemm(group, top_k=TOP_K, launches=check.launches)
    experts = count // 2
    keys = torch.rand(tokens, experts - 1, generator=generator)
    index = keys.topk(TOP_K, dim=1).indices.to(torch.int32).to(device)
    routing = route(index, experts)
    x_TK = torch.randn(tokens, inputs, generator=generator).to(device)
    made = make_inputs_torch(x_TK, False, gemm.inputs)
    return Half((gemm,), made, routing, gemm.tables(routing, tokens)), tokens


def _weight(scheme: Scheme, k: int, generator: torch.Generator) -> QuantizedWeight:
    form = format_of(scheme)
    if form.is_integer:
        codes = torch.randint(2**form.w_bits, (OUTPUTS, k), generator=generator).to(torch.uint8)
    else:
        codes = torch.randn(OUTPUTS, k, generator=generator).to(layout_of(form).code_dtype)
    return QuantizedWeight(codes, *random_grid(scheme, OUTPUTS, k, generator), scheme)

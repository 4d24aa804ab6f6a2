"""One run of the benchmark: checks, cases until the time is over, a file that is always whole."""

import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from group_gemm.cases import OURS, Case, all_cases
from group_gemm.checks import checks_for, run_checks
from group_gemm.goals import goal_table, judge
from group_gemm.peers import available
from group_gemm.rows import Refused, make_row
from group_gemm.shapes import MODELS, TINY, TOKENS, Model
from group_gemm.timing import Clock, CudaClock, NoClock, measure_ceilings
from mxq.kernels.tuning import clocks_mhz

RESULTS = Path(__file__).resolve().parents[1] / "results"

DRY_TOKENS = (1,)

CLOCK_SECONDS = 10.0
"""Clocks are read at most so often: asking takes as long as timing a case."""

MEMORY_KEPT = 0.4
"""Share of the device's memory that freed tensors may hold until it is given back."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where results go and what is done.

    ``only`` is a text that the keys of cases contain; ``retry`` forgets failed checks and cases
    that were left out.
    """

    json: Path
    minutes: float
    workers: int
    only: str = ""
    is_dry: bool = False
    goals_only: bool = False
    retry: bool = False


def run(options: Options) -> int:
    """Check, time, judge. 1 if a check failed or a case of ours has no row.

    Raises:
        SystemExit: If there is no GPU, or the file is not one that this run may go on with.
    """
    results = _load(options)
    if not options.goals_only:
        if not (options.is_dry or torch.cuda.is_available()):
            raise SystemExit("there is no CUDA GPU here to time on; --dry-run needs none")
        _run(results, NoClock() if options.is_dry else CudaClock(), options)
    print("\n".join(goal_table(judge(results["rows"]))))
    wrong = [check["name"] for check in results["checks"] if not check["passed"]]
    wrong += [case["key"] for case in results["left_out"] if f"/{OURS}/" in case["key"]]
    for name in wrong:
        print(f"FAILED {name}")
    return 1 if wrong else 0


def _run(results: dict[str, Any], clock: Clock, options: Options) -> None:
    started = time.monotonic()
    shapes, tokens = ((TINY,), DRY_TOKENS) if options.is_dry else (MODELS, TOKENS)
    cases = [case for case in all_cases(shapes, tokens) if options.only in case.key]
    models = {model.name: model for model in shapes}
    runners = {case.runner for case in cases} - {OURS}
    results["peers"] |= available(sorted(runners))
    results["ceilings"] = results["ceilings"] or measure_ceilings(clock)
    _check(results, cases, models, clock, options)
    _write(options.json, results)
    before, read_at = results["minutes"], 0.0
    for case in _left(results, cases):
        minutes = (time.monotonic() - started) / 60
        if minutes > options.minutes:
            print(f"{options.minutes:g} minutes are over; run the same command to go on")
            break
        _time_case(case, results, models, clock)
        if clock.device == "cuda" and time.monotonic() - read_at > CLOCK_SECONDS:
            read_at = time.monotonic()
            results["clocks_mhz"].append({"after": case.key, **clocks_mhz()})
        results["minutes"] = round(before + minutes, 2)
        _write(options.json, results)


def _check(
    results: dict[str, Any],
    cases: Sequence[Case],
    models: Mapping[str, Model],
    clock: Clock,
    options: Options,
) -> None:
    """Checks that the file does not have yet."""
    known = {check["name"] for check in results["checks"]}
    left = [check for check in checks_for(cases, models) if check.name not in known]
    print(f"{len(left)} checks", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results["checks"] += run_checks(
            left,
            clock.device,
            workers=0 if options.is_dry else options.workers,
            folder=Path(folder),
        )


def _left(results: Mapping[str, Any], cases: Sequence[Case]) -> list[Case]:
    """Cases without a row, those of absent peers left out."""
    known = {row["key"] for row in (*results["rows"], *results["left_out"])}
    absent = {name for name, found in results["peers"].items() if found.startswith("missing")}
    return [case for case in cases if case.key not in known and case.runner not in absent]


def _time_case(
    case: Case, results: dict[str, Any], models: Mapping[str, Model], clock: Clock
) -> None:
    """Append the row of a case, or why there is none."""
    failed = {c["name"]: _reason(c) for c in results["checks"] if not c["passed"]}
    started = time.perf_counter()
    try:
        row = make_row(case, models, clock, results["ceilings"], failed)
    except Refused as refusal:
        results["left_out"].append({"key": case.key, "reason": str(refusal)})
        print(f"{case.key}: {refusal}", flush=True)
    except Exception as error:  # noqa: BLE001  # of a peer, a compiler or the driver
        reason = f"{type(error).__name__}: {error}"[:500]
        results["left_out"].append({"key": case.key, "reason": reason})
        print(f"{case.key}: {reason}", flush=True)
        _stop_if_broken(clock)
    else:
        results["rows"].append({**row, "seconds": round(time.perf_counter() - started, 2)})
        print(_line(row), flush=True)
    if clock.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        if torch.cuda.memory_reserved() > MEMORY_KEPT * total:
            torch.cuda.empty_cache()


def _stop_if_broken(clock: Clock) -> None:
    """After an error on the device nothing runs in this process; the file has all until then."""
    if clock.device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(
                f"the device stopped working ({error}); run the same command again to go on "
                "with the next case"
            ) from error


def _reason(check: Mapping[str, Any]) -> str:
    return str(check.get("reason", f"error over bound {check.get('error_over_bound')}"))


def _line(row: Mapping[str, Any]) -> str:
    if row["median_us"] is None:
        return f"{row['key']}: launched, not timed"
    share = "-" if row["roofline_share"] is None else f"{row['roofline_share']:.0%}"
    return (
        f"{row['key']}: {row['median_us']:.1f} us ({row['p10_us']:.1f}..{row['p90_us']:.1f}), "
        f"weights {row['weight_tb_s']:.2f} TB/s, {row['tflop_s']:.0f} TFLOP/s, {share} of roofline"
    )


def _load(options: Options) -> dict[str, Any]:
    """The results so far, or an empty file's.

    Raises:
        SystemExit: If the file is of another GPU or of a dry run, or a dry run writes to results.
    """
    path, about = options.json, _about(options.is_dry)
    if options.is_dry and RESULTS in path.resolve().parents:
        raise SystemExit(f"a dry run times nothing; write it elsewhere than {RESULTS}")
    if not path.is_file():
        empty: dict[str, Any] = {"ceilings": {}, "checks": [], "rows": [], "left_out": []}
        empty["clocks_mhz"] = []
        return {"about": about, "peers": {}, "minutes": 0.0, **empty}
    results: dict[str, Any] = json.loads(path.read_text())
    found = results["about"]
    is_same = all(found[key] == about[key] for key in ("gpu", "dry_run"))
    if not (is_same or options.goals_only):
        raise SystemExit(f"{path} is of {_machine(found)}, this is {_machine(about)}; name another")
    if options.retry:
        results["checks"] = [check for check in results["checks"] if check["passed"]]
        results["left_out"] = []
    return results


def _machine(about: Mapping[str, Any]) -> str:
    return "a dry run" if about["dry_run"] else f"GPU {about['gpu']}"


def _write(path: Path, results: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def _about(is_dry: bool) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available() and not is_dry
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "dry_run": is_dry,
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": str(torch.version.cuda),
        },
    }

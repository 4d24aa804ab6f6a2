"""Time the whole pipeline on a CPU: where the time goes, and how long peers take for as much.

    python benchmarks/bench_pipeline.py --model MODEL --calibration file:PATH --peers FOLDER \
        --json benchmarks/results/pipeline-NAME.json

Cases (benchmarks/README.md lists them), each in a fresh process with cold caches: mxq on a small
model and on a random one of 10^9 parameters that is written here; AutoRound and llm-compressor on
the small one, in environments of their own (benchmarks/peers/make_environments.sh FOLDER). All get
the same token ids and number of threads, quantize every linear of the decoder layers, and load the
model within the time; imports are timed apart. The file is written after each case, and the same
command goes on where it stopped. Nothing else should run on the machine meanwhile; each row has the
load that it started under. Where something does, ``--loaded`` runs with one thread and keeps the
rows apart: the processor's seconds of mxq's steps are taken from them, and neither seconds of the
clock nor goals.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from bench_memory import RESULTS, commit
from speed.cases import Amounts, chosen_cases, shares, tool_of
from speed.goals import goals_of
from speed.models import (
    RandomShape,
    about_model,
    random_ids,
    save_tokens,
    small_model,
    text_ids,
)
from speed.processes import python_of, run_case

QUICK = Amounts(small_samples=8, random_samples=8, seqlen=64, schemes=5)
QUICK_SHAPE = RandomShape(gb=0.05, layers=1, vocabulary=1000)


def main() -> int:
    """Run what the results file lacks; the exit status is 1 if a case failed."""
    arguments = _arguments()
    amounts = _amounts(arguments)
    shape = QUICK_SHAPE if arguments.quick else RandomShape(arguments.random_gb)
    results = _open_results(arguments, amounts, shape)
    kind = "loaded" if arguments.loaded else "rows"
    # Threads that wait for one that another program has put off take a processor's time.
    used = replace(amounts, threads=1) if arguments.loaded else amounts
    room = Path(tempfile.mkdtemp(prefix="mxq-speed-", dir=arguments.folder))
    try:
        for run in range(arguments.runs):
            for case in chosen_cases(arguments.only, random_peer=arguments.random_peer):
                if not _is_done(results, case, run, kind):
                    row = {"run": run, "commit": commit(), "threads": used.threads}
                    row |= _run(case, arguments, used, shape, room)
                    _add(results, row, arguments.json, kind)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    for goal in goals_of(results["rows"]):
        found = "" if goal.found is None else f"{goal.found:.2f} times, at least {goal.least:g}: "
        print(f"{goal.text}: {found}{goal.verdict}")
    return int(any("error" in row for row in results.get(kind, ())))


def _run(
    case: str, arguments: argparse.Namespace, amounts: Amounts, shape: RandomShape, room: Path
) -> dict[str, Any]:
    """The row of one case; one that says so if its tool is not there."""
    python = python_of(tool_of(case), arguments.peers)
    if python is None:
        wanted = f"no environment {tool_of(case)} in --peers {arguments.peers}"
        return {"case": case, "skipped": f"{wanted} (benchmarks/peers/make_environments.sh)"}
    is_small = case.startswith("small/")
    model = small_model(arguments.model) if is_small else room / "random"
    if not model.exists():
        shape.write(model, arguments.seed)
    tokens = room / f"{case.partition('/')[0]}.safetensors"
    if not tokens.exists():
        size = amounts.samples(case), amounts.seqlen, arguments.seed
        if is_small:
            save_tokens(text_ids(model, arguments.calibration, *size), tokens)
        else:
            save_tokens(random_ids(shape.vocabulary, *size), tokens)
    print(f"{case} ...", flush=True)
    row = run_case(case, amounts, python=python, model=model, tokens=tokens, folder=room)
    return {**row, "model": about_model(model)}


def _add(results: dict[str, Any], row: dict[str, Any], path: Path, kind: str = "rows") -> None:
    """Keep a row in the place of one that failed or was skipped, write the file, and tell it."""
    rows = results.setdefault(kind, [])
    for old in [r for r in rows if (r["case"], r["run"]) == (row["case"], row["run"])]:
        rows.remove(old)
    rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if "total_s" not in row:
        print(row["case"], row.get("error", row.get("skipped")), flush=True)
        return
    per_million = row["total_s"] / row["model"]["parameters"] * 1e6
    print(
        f"{row['case']}: {row['total_s']:.1f} s ({row['processor_s']:.1f} s of processors), "
        f"{per_million:.3f} s per million parameters, imports {row['import_s']:.1f} s"
    )
    for by in ("stage", "part") if "clock" in row else ():
        found = sorted(shares(row["clock"], by).items(), key=lambda item: -item[1])
        print(f"  by {by}: " + ", ".join(f"{name} {share:.1%}" for name, share in found[:9]))


def _is_done(results: Mapping[str, Any], case: str, run: int, kind: str = "rows") -> bool:
    rows = results.get(kind, ())
    return any((row["case"], row["run"]) == (case, run) and "total_s" in row for row in rows)


def _open_results(
    arguments: argparse.Namespace, amounts: Amounts, shape: RandomShape
) -> dict[str, Any]:
    """The file to go on with, or a new one.

    Raises:
        SystemExit: If the file was measured with other settings or on another machine.
    """
    settings = {
        **amounts.as_settings(),
        "model": small_model(arguments.model).name,
        "calibration": _without_folders(arguments.calibration),
        "random": asdict(shape),
        "seed": arguments.seed,
    }
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "is_quick": arguments.quick,
        "settings": settings,
        "machine": _machine(),
        "rows": [],
    }
    if not arguments.json.is_file():
        return results
    found: dict[str, Any] = json.loads(arguments.json.read_text())
    for key in ("settings", "is_quick", "machine"):
        if found[key] != results[key]:
            raise SystemExit(
                f"{arguments.json} was measured with other {key}: {found[key]}, now "
                f"{results[key]}; give another --json"
            )
    return found


def _without_folders(calibration: str) -> str:
    """A spelling of a calibration set without the folders of its files."""
    parts = calibration.removeprefix("file:").split(",")
    named = [
        name + equals + Path(path).name
        for name, equals, path in (
            part.partition("=") if "=" in part else ("", "", part) for part in parts
        )
    ]
    return ",".join(named)


def _machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for path in [Path("/proc/cpuinfo")]
        if path.is_file()
        for line in path.read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def _amounts(arguments: argparse.Namespace) -> Amounts:
    if arguments.quick:
        return replace(QUICK, threads=arguments.threads)
    return Amounts(
        small_samples=arguments.samples,
        random_samples=arguments.random_samples,
        seqlen=arguments.seqlen,
        bits=arguments.bits,
        threads=arguments.threads,
        all_on_random=arguments.random_all_schemes,
    )


def _arguments() -> argparse.Namespace:
    amounts = Amounts()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="folder of the small model, or demo")
    parser.add_argument("--calibration", default="demo", help="text, as mxq quantize takes it")
    parser.add_argument("--peers", type=Path, help="folder with autoround/ and llmcompressor/")
    parser.add_argument("--json", type=Path, required=True, help="results file, gone on with")
    parser.add_argument("--only", default="", help="cases whose name contains the text")
    parser.add_argument(
        "--loaded",
        action="store_true",
        help="other programs run beside it: one thread, rows apart, for the steps of mxq alone",
    )
    parser.add_argument("--runs", type=int, default=1, help="of every case; the page has medians")
    parser.add_argument("--samples", type=int, default=amounts.small_samples)
    parser.add_argument("--random-samples", type=int, default=amounts.random_samples)
    parser.add_argument("--seqlen", type=int, default=amounts.seqlen)
    parser.add_argument("--bits", type=float, default=amounts.bits)
    parser.add_argument("--threads", type=int, default=amounts.threads)
    parser.add_argument("--random-gb", type=float, default=RandomShape().gb, help="10^9 B of bf16")
    parser.add_argument("--random-all-schemes", action="store_true", help="eight, not four")
    parser.add_argument("--random-peer", action="store_true", help="llm-compressor on it too")
    parser.add_argument("--folder", type=Path, help="where there is room (twice the random model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny amounts: tries every path")
    arguments = parser.parse_args()
    if arguments.quick and arguments.json.resolve().is_relative_to(RESULTS.resolve()):
        parser.error("--quick measures nothing of worth; name a --json outside of results/")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

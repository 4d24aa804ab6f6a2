"""One case in a fresh process with cold caches, and the row that comes of it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed.cases import Amounts, make_job, tool_of
from speed.models import forget_pages

HERE = Path(__file__).resolve().parent
RUNNERS: Mapping[str, Path] = {
    "mxq": HERE / "run_mxq.py",
    "autoround": HERE.parent / "peers" / "run_autoround.py",
    "llmcompressor": HERE.parent / "peers" / "run_llmcompressor.py",
}

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def python_of(tool: str, peers: Path | None) -> Path | None:
    """The interpreter that runs a tool, None if it is not installed."""
    if tool == "mxq":
        return Path(sys.executable)
    path = None if peers is None else peers / tool / "bin" / "python"
    return path if path is not None and path.is_file() else None


def run_case(
    case: str, amounts: Amounts, *, python: Path, model: Path, tokens: Path, folder: Path
) -> dict[str, Any]:
    """Run a case; a row with ``error`` and the end of its output if it fails."""
    room = Path(tempfile.mkdtemp(prefix="case-", dir=folder))
    try:
        job = make_job(case, amounts, model=model, tokens=tokens, room=room)
        forget_pages(model)
        load = os.getloadavg()[0]
        started = time.perf_counter()
        runner = RUNNERS[tool_of(case)]
        row = run_job(python, runner, job, room)
        row |= {"process_s": time.perf_counter() - started, "load_at_start": load}
        if "error" not in row and tool_of(case) == "autoround":
            # In a process of its own: a model that was rounded is not what is in the file.
            row |= run_job(python, runner, {**job, "task": "evaluate"}, room)
        return {"case": case, "samples": amounts.samples(case), **row}
    finally:
        shutil.rmtree(room, ignore_errors=True)


def run_job(python: Path, runner: Path, job: Mapping[str, Any], room: Path) -> dict[str, Any]:
    """Give a job to a runner in a fresh process; what it wrote to ``job["row"]``, or ``error``.

    The process has ``job["threads"]`` threads, no network, and keeps its caches in ``room``.
    """
    # A peer must not see packages of our environment.
    is_own = str(python) == sys.executable
    done = subprocess.run(
        [str(python), str(runner)],
        input=json.dumps(job),
        cwd=room,
        env=_environment(room, job["threads"], is_own=is_own),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    row = Path(job["row"])
    if done.returncode != 0 or not row.is_file():
        return {"error": f"exit status {done.returncode}: {done.stdout[-2000:]}"}
    found: dict[str, Any] = json.loads(row.read_text())
    row.unlink()
    return found


def _environment(room: Path, threads: int, *, is_own: bool) -> dict[str, str]:
    """The same threads for all, nothing from the network, every cache in an empty folder."""
    kept = {k: v for k, v in os.environ.items() if is_own or k != "PYTHONPATH"}
    caches = {
        name: str(room / name.lower())
        for name in (
            *("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME"),
            *("AR_AUTO_SCHEME_CACHE", "AR_WORK_SPACE", "AUTO_ROUND_CACHE"),
        )
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    counts = {name: str(threads) for name in THREAD_VARIABLES}
    return {**kept, **caches, **offline, **counts}

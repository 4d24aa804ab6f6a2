"""Run every target under atheris, by hand, and keep what came of it: a million inputs in all.

    python tests/fuzz/campaign.py --folder fuzz-work --json benchmarks/results/fuzz.json

A target whose result is in the folder is not run again, so a campaign can be stopped and go on.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent

INPUTS: Mapping[str, int] = {
    "artifact": 250_000,
    "plan_fields": 250_000,
    "spellings": 150_000,
    "text_rows": 100_000,
    "artifact_document": 80_000,
    "device_file": 60_000,
    "safetensors_header": 50_000,
    "calibration_tokens": 40_000,
    "index_file": 40_000,
    "plan_modules": 20_000,
    "model_config": 8_000,
    "model_header": 6_000,
}
"""By what an input costs: the last two build a model for each."""

VERSIONED = ("mxq", "atheris", "safetensors", "torch", "transformers", "huggingface_hub")


def main() -> int:
    arguments = _parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda name: _run(name, arguments.folder), INPUTS))
    result = {
        "what": "inputs tried by atheris on each reader of foreign files (tests/fuzz/targets.py)",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
        "inputs": sum(row["inputs"] for row in rows),
        "findings": sum(row["outcome"] != "no finding" for row in rows),
        "targets": rows,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["findings"] > 0)


def _run(name: str, folder: Path) -> dict[str, object]:
    """What a target's run has written, after running it if it has not."""
    path = folder / f"{name}.json"
    if not path.is_file():
        command = [sys.executable, HERE / "run_fuzz.py", name, "--inputs", str(INPUTS[name])]
        threads = {"OMP_NUM_THREADS": "1", **os.environ}
        with (folder / f"{name}.log").open("w") as log:
            subprocess.run([*command, "--json", path], stdout=log, stderr=log, env=threads)
    row = json.loads(path.read_text())
    return {key: value for key, value in row.items() if key != "atheris"}


def _commit() -> str:
    command = ["git", "-C", HERE, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fuzz every reader of foreign files.")
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What the accuracy benchmarks share: their options, and a results file that is gone on with."""

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mxq.workspace import library_versions


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options for a model, its texts, and the results file."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True, help="NAME=FILE, repeatable")
    parser.add_argument("--json", required=True, type=Path, help="results file, gone on with")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10, help="held-out windows of each domain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def open_results(
    args: argparse.Namespace, more: Mapping[str, Any], empty: Mapping[str, Any]
) -> dict[str, Any]:
    """The file to go on with, or a new one with what ``empty`` has.

    Raises:
        SystemExit: If the file was measured with other settings; ``more`` are those of one script.
    """
    settings = {
        "model": Path(args.model).name,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "window": args.window,
        "windows": args.windows,
        "calibration": _names(args.calibration.removeprefix("file:").split(",")),
        "evaluate": _names(args.evaluate),
        **more,
        "versions": library_versions(),
    }
    if not args.json.is_file():
        return {"date": datetime.now(UTC).date().isoformat(), **settings, **empty}
    found: dict[str, Any] = json.loads(args.json.read_text())
    for key, value in settings.items():
        if found.get(key) != value:
            raise SystemExit(
                f"{args.json} was measured with other {key}: {found.get(key)}, now {value}; give "
                "another --json"
            )
    return found


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the file anew."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def _names(entries: list[str]) -> list[str]:
    """Entries ``domain=path`` without the folders of their files."""
    return [
        "=".join((*entry.split("=")[:-1], Path(entry.split("=")[-1]).name)) for entry in entries
    ]

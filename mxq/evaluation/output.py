"""What the evaluation scripts have in common: options, error lines, result files, table cells."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mxq import __version__
from mxq.evaluation.statistics import DRAWS, FEW_UNITS, SEED, Estimate

NARROWEST = 100
"""Columns to assume where the output is not a terminal."""

Report = dict[str, object]


def run_script(
    arguments: argparse.Namespace,
    evaluate: Callable[[argparse.Namespace], tuple[Report, Sequence[Table]]],
    name: str,
) -> int:
    """Evaluate, write ``--json``, print the tables; the exit status. A mistake is one line."""
    try:
        require_folder_of(arguments.json)
        report, tables = evaluate(arguments)
        if arguments.json is not None:
            text = json.dumps(report, indent=2, allow_nan=False) + "\n"
            arguments.json.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{name}: {' '.join(str(error).split())}\n")
        return 1
    console = Console()
    wide = console if console.is_terminal else Console(width=max(console.width, NARROWEST))
    for table in tables:
        wide.print(table)
    return 0


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The models, and the options that every script has."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, folder, or demo")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals, as a share (0.95)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu, auto (a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")


def require_folder_of(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work and not after it.

    Raises:
        ValueError: If its folder does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"result file {path} needs the folder {path.parent}; make it first")


def watch(title: str, numbers: Sequence[int]) -> Iterable[int]:
    """A progress bar on the error stream."""
    return track(numbers, title, console=Console(stderr=True), transient=True)


def versions(*packages: str) -> dict[str, str]:
    """Versions of mxq, torch, transformers and the packages named."""
    found = {
        "mxq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**found, **{package: version(package) for package in packages}}


def interval_facts(confidence: float) -> Report:
    """What the intervals of a result are, for its file."""
    return {"confidence": confidence, "draws": DRAWS, "seed": SEED}


def as_json(value: object) -> object:
    """Dataclasses as objects, without what is absent; an Estimate keeps what it does not know."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
        keep = isinstance(value, Estimate)
        return {name: as_json(item) for name, item in pairs if keep or item is not None}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def make_table(
    title: str, names: Sequence[str], columns: Sequence[str], caption: str = ""
) -> Table:
    """An empty table: columns of names, then columns of numbers."""
    table = Table(title=title, caption=caption or None, caption_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def interval_cell(found: Estimate | None, form: str) -> str:
    """A mean, and its interval on the line below it."""
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return form.format(found.value)
    return f"{form.format(found.value)}\n{form.format(found.low)} .. {form.format(found.high)}"


def error_cell(found: Estimate | None, form: str) -> str:
    """A difference with its sign, +- its standard error."""
    if found is None:
        return ""
    error = "?" if found.stderr is None else form.format(found.stderr)
    return f"{'+' if found.value >= 0 else ''}{form.format(found.value)} +- {error}"


def interval_caption(confidence: float, units: Sequence[int], kind: str) -> str:
    """What the second lines of a table are; ``units`` are how many each row or part has."""
    if min(units) < 2:
        return f"No intervals: they need at least 2 {kind}, and there is one text or task with 1."
    said = (
        f"Second lines: {100 * confidence:g}% intervals, a BCa bootstrap over {kind} ({DRAWS:,} "
        f"draws, seed {SEED})."
    )
    few = f" With as few as {min(units)} {kind} they are too narrow."
    return said + (few if min(units) < FEW_UNITS else "")

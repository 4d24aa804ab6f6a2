"""What the evaluation scripts print and write: error lines, result files, tables."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mxq import __version__
from mxq.counted import counted
from mxq.evaluation.losses import Loss, ModelLosses
from mxq.evaluation.statistics import DRAWS, FEW_UNITS, SEED, Estimate
from mxq.evaluation.texts import Prepared
from mxq.terminal import NARROWEST

NAME_WIDTH = 8
"""Columns that the name of a model keeps where a terminal is narrow."""

WIDEST = 1000
"""Columns that no table needs."""

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
    for table in tables:
        _print(table)
    return 0


def _print(table: Table) -> None:
    """Print a table: in a terminal as wide as that, elsewhere as wide as the table likes."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDEST)
        console = Console(width=max(NARROWEST, console.measure(table).maximum))
    console.print(table)


def require_folder_of(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work and not after it.

    Raises:
        ValueError: If its folder does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"result file {path} needs the folder {path.parent}; make it first")


def watch(title: str, numbers: Sequence[int]) -> Iterable[int]:
    """A progress bar on the error stream."""
    return track(numbers, escape(title), console=Console(stderr=True), transient=True)


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


def text_facts(prepared: Prepared) -> Report:
    """What models were scored on, for their result."""
    return {
        "text": prepared.options.text,
        "window": prepared.window,
        "limit": prepared.options.limit,
        "reference": prepared.reference,
        "baseline": prepared.names[prepared.baseline],
        **interval_facts(prepared.options.confidence),
    }


def losses_report(losses: ModelLosses) -> Report:
    """The losses of a model over all texts, and those of each under ``domains``."""
    overall = as_json(losses.overall)
    assert isinstance(overall, dict)
    return {**overall, "domains": as_json(losses.domains)}


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
    """An empty table: columns of names, then columns of numbers; texts are taken literally."""
    shown = escape(caption) if caption else None
    table = Table(title=escape(title), caption=shown, caption_justify="left")
    for name in names:
        table.add_column(name, overflow="fold", min_width=NAME_WIDTH)
    for column in columns:
        table.add_column(escape(column), justify="right")
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


def loss_cells(loss: Loss) -> list[str]:
    """Perplexity, KL and flips of a model, each with its interval."""
    return [
        interval_cell(loss.perplexity, "{:.4f}"),
        interval_cell(loss.kl, "{:.6f}"),
        interval_cell(loss.flips, "{:.2%}"),
    ]


def difference_cells(loss: Loss) -> list[str]:
    """Differences to the baseline in nats, perplexity, KL and flips; empty for the baseline."""
    apart = loss.difference
    if apart is None:
        return [""] * 4
    percent = replace(apart.perplexity_ratio, value=apart.perplexity_ratio.value - 1)
    return [
        error_cell(apart.nll, "{:.4f}"),
        error_cell(percent, "{:.2%}"),
        error_cell(apart.kl, "{:.6f}"),
        error_cell(apart.flips, "{:.2%}"),
    ]


def text_title(prepared: Prepared, found: Sequence[ModelLosses]) -> str:
    """What was scored, over a table."""
    options, tokens = prepared.options, found[0].overall.tokens
    most = "" if options.limit is None else f", at most {options.limit:,} of each domain"
    return f"{options.text}: {counted(tokens, 'token')}{most}, in windows of {prepared.window:,}"


def task_title(shots: int | None, limit: int | None) -> str:
    """What was asked, over a table; None where the tasks decide."""
    parts = ["Tasks"]
    if limit is not None:
        parts.append(f"the first {counted(limit, 'question')} of each task")
    if shots is not None:
        parts.append(f"{counted(shots, 'example')} before each question")
    return ", ".join(parts)


def text_caption(prepared: Prepared, found: Sequence[ModelLosses]) -> str:
    """What intervals and distances in a table of losses are."""
    windows = [loss.windows for loss in found[0].domains.values()]
    said = interval_caption(prepared.options.confidence, windows, "windows")
    if prepared.reference is None:
        return said
    return (
        f"{said} KL: KL({prepared.reference} || model) in nats per token. Flips: positions where "
        "the likeliest token is another one."
    )


def interval_caption(confidence: float, units: Sequence[int], kind: str) -> str:
    """What the second lines of a table are; ``units`` are how many each row or part has."""
    if max(units) < 2:
        return f"No intervals: they need at least 2 {kind} of each text or task."
    said = (
        f"Second lines: {100 * confidence:g}% intervals, a BCa bootstrap over {kind} ({DRAWS:,} "
        f"draws, seed {SEED})."
    )
    if min(units) < 2:
        return f"{said} Rows with a text or task of 1 of them have none."
    few = f" With as few as {min(units)} {kind} they are too narrow."
    return said + (few if min(units) < FEW_UNITS else "")

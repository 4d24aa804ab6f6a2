"""Size, bits, perplexity, KL, flips and task accuracy of models, side by side.

    python eval/compare.py Qwen/Qwen1.5-MoE-A2.7B out-a out-b --text wikitext2
    python eval/compare.py demo out --text demo --tasks demo --json r.json --plot r.html

KL and flips are distances to the first model, or to --reference; differences are paired, window by
window and question by question. docs/evaluating.md says what each column is.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

import mxq  # noqa: F401  (registers the checkpoint format)
from mxq.evaluation.losses import ModelLosses
from mxq.evaluation.options import (
    add_common_options,
    add_task_options,
    add_text_options,
    task_options,
    text_options,
)
from mxq.evaluation.output import (
    Report,
    as_json,
    difference_cells,
    interval_caption,
    interval_cell,
    loss_cells,
    losses_report,
    make_table,
    require_folder_of,
    run_script,
    task_title,
    text_caption,
    text_facts,
    text_title,
    versions,
    watch,
)
from mxq.evaluation.plot import DISTANCE, Point, require_plotly, write_plot
from mxq.evaluation.sizes import Weight, weigh
from mxq.evaluation.statistics import Estimate
from mxq.evaluation.tasks import TaskResult, difference_cell, measure_tasks, prepared_tasks
from mxq.evaluation.texts import Prepared, measure, prepare


@dataclass(frozen=True, slots=True)
class Row:
    """All that was found of one model; no tasks where none were asked for."""

    weight: Weight
    losses: ModelLosses
    tasks: Mapping[str, TaskResult]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_script(_parser().parse_args(argv), _evaluate, "compare")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Sizes and losses of models, side by side.")
    add_common_options(parser)
    add_text_options(parser, reference="the first")
    add_task_options(parser, required=False, limit="--task-limit")
    parser.add_argument("--batch", type=int, default=1, help="windows, sequences at a time (1)")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw loss over size there")
    return parser


def _evaluate(arguments: argparse.Namespace) -> tuple[Report, Sequence[Table]]:
    require_folder_of(arguments.plot)
    require_plotly(arguments.plot)
    reference = arguments.reference or arguments.models[0]
    prepared = prepare(
        arguments.models,
        text_options(arguments),
        reference=reference,
        baseline=arguments.baseline,
    )
    weights = [weigh(name) for name in prepared.names]
    rows = _rows(prepared, weights, arguments)
    if arguments.plot is not None:
        title = text_title(prepared, [row.losses for row in rows])
        bars = f"bars: {100 * arguments.confidence:g}% intervals"
        write_plot(arguments.plot, [_point(row) for row in rows], f"{title}; {bars}")
    report: Report = {
        **text_facts(prepared),
        "models": [_row_report(row) for row in rows],
        "versions": versions(*(["lm_eval"] if arguments.tasks else [])),
    }
    return report, _tables(prepared, rows, arguments)


def _rows(
    prepared: Prepared, weights: Sequence[Weight], arguments: argparse.Namespace
) -> list[Row]:
    """Each model in turn; the questions are read before the first model is loaded."""
    if arguments.tasks is None:
        losses = measure(prepared, watch)
        return [Row(weight, loss, {}) for weight, loss in zip(weights, losses, strict=True)]
    options = task_options(arguments)
    with prepared_tasks(prepared.names, options) as manager:
        losses = measure(prepared, watch)
        answers = measure_tasks(prepared.names, manager, options, baseline=prepared.baseline)
    return [
        Row(weight, loss, results.tasks)
        for weight, loss, results in zip(weights, losses, answers, strict=True)
    ]


def _row_report(row: Row) -> Report:
    report: Report = {
        "model": row.losses.model,
        "weight": as_json(row.weight),
        **losses_report(row.losses),
    }
    return {**report, "tasks": as_json(row.tasks)} if row.tasks else report


def _point(row: Row) -> Point:
    loss = row.losses.overall
    values = {"perplexity": loss.perplexity, DISTANCE: loss.kl}
    values |= {f"accuracy on {name}": _accuracy(task)[1] for name, task in row.tasks.items()}
    found = {name: value for name, value in values.items() if value is not None}
    return Point(row.losses.model, row.weight.file_bytes, row.weight.bits_per_weight, found)


def _accuracy(task: TaskResult) -> tuple[str, Estimate]:
    """The metric of a task that stands for it: ``acc``, else its first one."""
    name = "acc" if "acc" in task.metrics else next(iter(task.metrics))
    return name, task.metrics[name]


def _tables(
    prepared: Prepared, rows: Sequence[Row], arguments: argparse.Namespace
) -> Sequence[Table]:
    losses = [row.losses for row in rows]
    tasks = [f"{name}\n{_accuracy(task)[0]}" for name, task in rows[0].tasks.items()]
    columns = ["MB", "bits", "perplexity", "KL", "flips", *tasks]
    caption = text_caption(prepared, losses)
    questions = [task.n for task in rows[0].tasks.values()]
    if questions:
        said = interval_caption(prepared.options.confidence, questions, "questions")
        asked = task_title(arguments.shots, arguments.task_limit)
        caption += f" {asked}: {said[0].lower()}{said[1:]}"
    means = make_table(text_title(prepared, losses), ["model"], columns, caption)
    apart = make_table(
        f"Paired differences to {losses[prepared.baseline].model} +- standard error",
        ["model"],
        ["nats per token", "perplexity", "KL", "flips", *tasks],
    )
    for row in rows:
        loss, weight = row.losses.overall, row.weight
        bits = "?" if weight.bits_per_weight is None else f"{weight.bits_per_weight:.4f}"
        scores = [interval_cell(_accuracy(task)[1], "{:.4f}") for task in row.tasks.values()]
        size = f"{weight.file_bytes / 1e6:,.2f}"
        means.add_row(escape(row.losses.model), size, bits, *loss_cells(loss), *scores)
        if loss.difference is not None:
            changes = [_task_difference(task) for task in row.tasks.values()]
            apart.add_row(escape(row.losses.model), *difference_cells(loss), *changes)
    return (means, apart) if len(rows) > 1 else (means,)


def _task_difference(task: TaskResult) -> str:
    return difference_cell((task.differences or {}).get(_accuracy(task)[0]))


if __name__ == "__main__":
    sys.exit(main())

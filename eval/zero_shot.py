"""Accuracy of models on lm-evaluation-harness tasks, side by side.

    python eval/zero_shot.py out --tasks arc_easy,hellaswag
    python eval/zero_shot.py original out --tasks mmlu --shots 5 --batch 8
    python eval/zero_shot.py out --tasks demo            # the embedded questions: no network
    python eval/zero_shot.py out --tasks mine --task-path FOLDER

Differences between models are taken question by question; docs/evaluating.md says how.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

import mxq  # noqa: F401  (registers the checkpoint format)
from mxq.evaluation.demo_tasks import demo_names
from mxq.evaluation.output import (
    Report,
    add_common_options,
    as_json,
    interval_caption,
    interval_cell,
    interval_facts,
    make_table,
    run_script,
    versions,
)
from mxq.evaluation.tasks import (
    ModelTasks,
    TaskOptions,
    difference_cell,
    measure_tasks,
    parse_batch,
    parse_names,
    prepared_tasks,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_script(_parser().parse_args(argv), _evaluate, "zero_shot")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Accuracy of causal language models on tasks.")
    add_common_options(parser)
    names = ", ".join(demo_names())
    parser.add_argument("--tasks", required=True, help=f"names, separated by commas; also {names}")
    parser.add_argument("--task-path", type=Path, help="folder with .yaml tasks of your own")
    parser.add_argument(
        "--shots", type=int, help="examples before each question (what the task says, mostly 0)"
    )
    parser.add_argument("--limit", type=int, help="no more than this many questions of each task")
    parser.add_argument(
        "--batch", default="1", help="sequences at a time (1), or auto: what the GPU holds"
    )
    return parser


def _evaluate(arguments: argparse.Namespace) -> tuple[Report, Sequence[Table]]:
    options = TaskOptions(
        names=parse_names(arguments.tasks),
        folder=arguments.task_path,
        shots=arguments.shots,
        limit=arguments.limit,
        batch=parse_batch(arguments.batch),
        device=arguments.device,
        confidence=arguments.confidence,
    )
    with prepared_tasks(arguments.models, options) as manager:
        found = measure_tasks(arguments.models, manager, options)
    report: Report = {
        "limit": options.limit,
        **interval_facts(options.confidence),
        "models": [as_json(results) for results in found],
        "versions": versions("lm_eval"),
    }
    return report, _tables(found, options.confidence)


def _tables(found: Sequence[ModelTasks], confidence: float) -> Sequence[Table]:
    """Metrics of each task and model, and differences to the first model."""
    tasks = found[0].tasks
    metrics = list(dict.fromkeys(metric for task in tasks.values() for metric in task.metrics))
    caption = interval_caption(confidence, [task.n for task in tasks.values()], "questions")
    means = make_table("Tasks", ("task", "model"), ["shots", "questions", *metrics], caption)
    apart = make_table(
        f"Paired differences to {found[0].model} +- standard error (questions gained, lost)",
        ("task", "model"),
        metrics,
    )
    for name in tasks:
        for number, results in enumerate(found):
            task = results.tasks[name]
            shots = "" if task.shots is None else str(task.shots)
            cells = [interval_cell(task.metrics.get(metric), "{:.4f}") for metric in metrics]
            means.add_row("" if number else name, results.model, shots, f"{task.n:,}", *cells)
            if task.differences is not None:
                cells = [difference_cell(task.differences.get(metric)) for metric in metrics]
                apart.add_row("" if number > 1 else name, results.model, *cells)
    return (means, apart) if len(found) > 1 else (means,)


if __name__ == "__main__":
    sys.exit(main())

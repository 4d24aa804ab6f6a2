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

from rich.markup import escape
from rich.table import Table

import mxq  # noqa: F401  (registers the checkpoint format)
from mxq.evaluation.loading import find_baseline
from mxq.evaluation.options import add_common_options, add_task_options, task_options
from mxq.evaluation.output import (
    Report,
    as_json,
    interval_caption,
    interval_cell,
    interval_facts,
    make_table,
    run_script,
    task_title,
    versions,
)
from mxq.evaluation.tasks import (
    ModelTasks,
    TaskOptions,
    difference_cell,
    measure_tasks,
    prepared_tasks,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_script(_parser().parse_args(argv), _evaluate, "zero_shot")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Accuracy of causal language models on tasks.")
    add_common_options(parser)
    add_task_options(parser, required=True)
    parser.add_argument(
        "--batch", default="1", help="sequences at a time (1), or auto: what the GPU holds"
    )
    return parser


def _evaluate(arguments: argparse.Namespace) -> tuple[Report, Sequence[Table]]:
    options = task_options(arguments)
    baseline = find_baseline(arguments.models, arguments.baseline)
    with prepared_tasks(arguments.models, options) as manager:
        found = measure_tasks(arguments.models, manager, options, baseline=baseline)
    report: Report = {
        "limit": options.limit,
        "baseline": arguments.models[baseline],
        **interval_facts(options.confidence),
        "models": [as_json(results) for results in found],
        "versions": versions("lm_eval"),
    }
    return report, _tables(found, baseline, options)


def _tables(found: Sequence[ModelTasks], baseline: int, options: TaskOptions) -> Sequence[Table]:
    """Metrics of each task and model, and differences to the baseline."""
    tasks = found[0].tasks
    metrics = list(dict.fromkeys(metric for task in tasks.values() for metric in task.metrics))
    counts = [task.n for task in tasks.values()]
    caption = interval_caption(options.confidence, counts, "questions")
    title = task_title(options.shots, options.limit)
    means = make_table(title, ("task", "model"), ["shots", "questions", *metrics], caption)
    apart = make_table(
        f"Paired differences to {found[baseline].model} +- standard error (questions gained, lost)",
        ("task", "model"),
        metrics,
    )
    for name in tasks:
        for number, results in enumerate(found):
            task = results.tasks[name]
            shots = "" if task.shots is None else str(task.shots)
            cells = [interval_cell(task.metrics.get(metric), "{:.4f}") for metric in metrics]
            model = escape(results.model)
            means.add_row("" if number else escape(name), model, shots, f"{task.n:,}", *cells)
            if task.differences is not None:
                cells = [difference_cell(task.differences.get(metric)) for metric in metrics]
                is_first = number == int(baseline == 0)
                apart.add_row(escape(name) if is_first else "", model, *cells)
    return (means, apart) if len(found) > 1 else (means,)


if __name__ == "__main__":
    sys.exit(main())

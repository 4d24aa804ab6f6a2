"""Accuracy of a model on lm-evaluation-harness tasks.

    python eval/zero_shot.py out --tasks arc_easy,hellaswag
    python eval/zero_shot.py out --tasks demo            # the embedded questions: no network
    python eval/zero_shot.py out --tasks mine --task-path FOLDER

The harness is given the loaded model: by itself it does not know the checkpoint format of mxq, and
would score a model whose experts were never loaded.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from rich.console import Console
from rich.table import Table

import mxq  # registers the checkpoint format
from mxq import demo
from mxq.evaluation import load_model, load_tokenizer, require_folder_of

DEMO_QUESTIONS = 200
"""Questions of the task ``demo``, and of the task of each domain."""

BOOTSTRAP_DRAWS = 1000
"""For the standard error of the metrics that have no formula; that of accuracies has one."""

TaskResults = Mapping[str, Mapping[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        report = _evaluate(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"zero_shot: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    Console().print(_table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Accuracy of a causal language model on tasks.")
    parser.add_argument("model", help="hub id, folder, or demo")
    names = ", ".join(_demo_names())
    parser.add_argument("--tasks", required=True, help=f"names, separated by commas; also {names}")
    parser.add_argument("--task-path", type=Path, help="folder with .yaml tasks of your own")
    parser.add_argument("--limit", type=int, help="no more than this many questions of each task")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (1)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, auto (a GPU if there is one)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser


def _demo_names() -> tuple[str, ...]:
    return ("demo", *(f"demo_{domain}" for domain in demo.DOMAINS))


def _evaluate(arguments: argparse.Namespace) -> dict[str, object]:
    """The result as it is written to JSON."""
    _check(arguments)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    with TemporaryDirectory() as folder:
        _write_demo_tasks(Path(folder), set(names).intersection(_demo_names()))
        own = (arguments.task_path,) if arguments.task_path is not None else ()
        manager = _task_manager(names, (*own, Path(folder)))
        results = _results(names, manager, arguments)
    return {
        "model": arguments.model,
        "limit": arguments.limit,
        "tasks": results,
        "versions": {
            "mxq": mxq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lm_eval": version("lm_eval"),
        },
    }


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    require_folder_of(arguments.json)
    for option in ("limit", "batch"):
        number = getattr(arguments, option)
        if number is not None and number < 1:
            raise ValueError(f"{option} is {number}; it must be at least 1")
    if arguments.task_path is not None and not arguments.task_path.is_dir():
        raise ValueError(f"task folder {arguments.task_path} does not exist; give one with .yaml")
    try:
        import lm_eval  # noqa: F401  (whether it is there)
    except ImportError as error:
        raise ValueError(
            f"tasks are run by lm-eval, which cannot be imported ({error}); install it with: "
            "pip install 'mxq[eval]'"
        ) from error


def _write_demo_tasks(folder: Path, names: Iterable[str]) -> None:
    """Write the demo tasks of those names: the questions, and the task in the harness's form."""
    in_turn = demo.questions(DEMO_QUESTIONS * len(demo.DOMAINS))
    for name in names:
        chosen = [question for question in in_turn if name in ("demo", f"demo_{question.domain}")]
        rows = [
            {"prompt": question.prompt, "choices": question.choices, "answer": question.answer}
            for question in chosen[:DEMO_QUESTIONS]
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = _demo_task(name, path)
        # JSON is YAML, so no writer of YAML is needed.
        path.with_suffix(".yaml").write_text(json.dumps(task), encoding="utf-8")


def _demo_task(name: str, path: Path) -> dict[str, object]:
    # The cache lies beside the questions, so that nothing of a run is left behind.
    files = {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # a choice goes on where the prompt breaks off
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }


def _task_manager(names: Sequence[str], folders: Sequence[Path]) -> object:
    """The harness's index of tasks: the standard ones are read only if a name needs them."""
    from lm_eval.tasks import TaskManager

    paths = [str(path) for path in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    local = manager.all_tasks
    if not set(names) <= set(local):
        manager = TaskManager(include_path=paths, include_defaults=True)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        menu = ", ".join(dict.fromkeys((*local, *_demo_names())))
        raise ValueError(
            f"{', '.join(unknown) or 'no name'} is no task here; choose {menu}, or a standard task "
            "(lm-eval ls tasks)"
        )
    return manager


def _results(names: Sequence[str], manager: object, arguments: argparse.Namespace) -> TaskResults:
    """Metrics of each task, as the harness computes them on the loaded model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # Its warnings are about options that a loaded model has decided already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, device=arguments.device)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch)
    try:
        output = lm_eval.simple_evaluate(
            model=harness,
            tasks=list(names),
            task_manager=manager,
            limit=arguments.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=False,
        )
    except OSError as error:
        raise ConnectionError(
            f"the questions of {', '.join(names)} could not be read ({error}); is there a network? "
            "Without one, use --tasks demo, or local tasks with --task-path FOLDER"
        ) from error
    counts = output["n-samples"]
    return {
        name: _metrics(metrics, counts.get(name, {}).get("effective"))
        for name, metrics in output["results"].items()
    }


def _metrics(metrics: Mapping[str, object], count: int | None) -> dict[str, float]:
    """``acc,none`` of the harness as ``acc``, its standard error as ``stderr``, and ``n``."""
    result: dict[str, float] = {}
    for key, value in metrics.items():
        name, _, answer_filter = key.partition(",")
        # Other fields are names, and "N/A" where a standard error is not known.
        if answer_filter and isinstance(value, int | float):
            plain = "stderr" if name == "acc_stderr" else name
            result[plain if answer_filter == "none" else f"{plain},{answer_filter}"] = float(value)
    if count is not None:
        result["n"] = count
    return result


def _table(report: Mapping[str, object]) -> Table:
    tasks = report["tasks"]
    assert isinstance(tasks, dict)
    columns = list(dict.fromkeys(key for metrics in tasks.values() for key in metrics))
    table = Table("task", *columns, title=str(report["model"]))
    for name, metrics in tasks.items():
        table.add_row(name, *(_cell(column, metrics) for column in columns))
    return table


def _cell(column: str, metrics: Mapping[str, float]) -> str:
    if column not in metrics:
        return ""
    return f"{metrics[column]:.0f}" if column == "n" else f"{metrics[column]:.4f}"


if __name__ == "__main__":
    sys.exit(main())

"""Score models on tasks of lm-evaluation-harness, one loaded at a time, question by question.

The answer to each question is kept, so that two models are compared on the questions where they
differ, and not by their totals.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mxq.evaluation.demo_tasks import demo_names, write_demo_tasks
from mxq.evaluation.harness import (
    Answers,
    Request,
    ask,
    check_questions,
    require_harness,
    task_manager,
)
from mxq.evaluation.loading import default_device, require_decodable, resolve
from mxq.evaluation.output import error_cell
from mxq.evaluation.statistics import Estimate, Stratum, difference, estimate, require_confidence

AUTO_BATCH = "auto"


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Which questions, and how they are asked.

    ``shots`` None leaves the number of examples before a question to the task; ``limit`` is the
    most questions of a task, None all of them. ``batch`` None is ``auto``: what the GPU holds.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    shots: int | None = None
    limit: int | None = None
    batch: int | None = 1
    device: str | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        for name, number, least in (
            ("shots", self.shots, 0),
            ("limit", self.limit, 1),
            ("batch", self.batch, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} is {number}; it must be at least {least}")
        require_confidence(self.confidence)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"task folder {self.folder} does not exist; give one with .yaml")
        if self.batch is None and default_device(self.device) == "cpu":
            raise ValueError(
                "batch is auto, which looks for the largest batch that a GPU holds; on a CPU give "
                "a number"
            )
        require_harness()


@dataclass(frozen=True, slots=True)
class TaskDifference:
    """Of a metric to the baseline, over the same questions.

    ``gained`` and ``lost`` count the questions that only this model or only the baseline answers
    right; None where a question has no right or wrong.
    """

    difference: Estimate
    gained: int | None
    lost: int | None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Metrics of a task by name, over ``n`` questions with ``shots`` examples before each.

    ``differences`` are to the baseline, by metric, and None for that one itself.
    """

    n: int
    shots: int | None
    metrics: Mapping[str, Estimate]
    differences: Mapping[str, TaskDifference] | None


@dataclass(frozen=True, slots=True)
class ModelTasks:
    """The results of one model by task, groups of tasks among them."""

    model: str
    tasks: Mapping[str, TaskResult]


def parse_names(text: str) -> tuple[str, ...]:
    """Names that are separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_batch(text: str) -> int | None:
    """A number of sequences, or None for ``auto``.

    Raises:
        ValueError: If it is neither.
    """
    try:
        return None if text == AUTO_BATCH else int(text)
    except ValueError as error:
        raise ValueError(f"batch is {text!r}; give a number of sequences, or auto") from error


@contextlib.contextmanager
def prepared_tasks(models: Sequence[str], options: TaskOptions) -> Iterator[object]:
    """The harness's index of tasks, once their questions were read; before a model is loaded.

    Raises:
        ValueError: If a model or a task is unknown, or a task has too few examples.
        ConnectionError: If the questions cannot be read.
    """
    for name in models:
        require_decodable(name)
    with TemporaryDirectory() as folder:
        write_demo_tasks(Path(folder), set(options.names).intersection(demo_names()))
        own = (options.folder,) if options.folder is not None else ()
        manager = task_manager(options.names, [str(path) for path in (*own, Path(folder))])
        check_questions(manager, options.names, options.shots)
        yield manager


def measure_tasks(
    models: Sequence[str], manager: object, options: TaskOptions, *, baseline: int = 0
) -> tuple[ModelTasks, ...]:
    """The results of every model, in order; differences are to that of the place ``baseline``.

    Raises:
        ValueError: If a model cannot be loaded.
    """
    request = Request(options.names, options.shots, options.limit, options.batch, options.device)
    found: dict[str, dict[str, Answers]] = {}
    for name in models:
        if resolve(name) not in found:
            found[resolve(name)] = ask(name, manager, request)
    base = found[resolve(models[baseline])]
    return tuple(
        ModelTasks(
            name,
            {
                task: _result(
                    answers, None if number == baseline else base[task], options.confidence
                )
                for task, answers in found[resolve(name)].items()
            },
        )
        for number, name in enumerate(models)
    )


def difference_cell(apart: TaskDifference | None) -> str:
    """A difference of a metric, and the questions behind it where they are right or wrong."""
    if apart is None:
        return ""
    counts = "" if apart.gained is None else f"\n({apart.gained:,} gained, {apart.lost:,} lost)"
    return f"{error_cell(apart.difference, '{:.4f}')}{counts}"


def _result(ours: Answers, base: Answers | None, confidence: float) -> TaskResult:
    metrics = {
        metric: estimate(ours.questions[metric], confidence)[0]
        if metric in ours.questions
        else Estimate(*mean)
        for metric, mean in ours.means.items()
    }
    if base is None:
        return TaskResult(ours.n, ours.shots, metrics, None)
    apart = {metric: _difference(metric, ours, base, confidence) for metric in metrics}
    return TaskResult(ours.n, ours.shots, metrics, apart)


def _difference(metric: str, ours: Answers, base: Answers, confidence: float) -> TaskDifference:
    """Of one metric; without a standard error where it is no mean over questions."""
    if metric not in ours.questions or metric not in base.questions:
        return TaskDifference(Estimate(ours.means[metric][0] - base.means[metric][0]), None, None)
    apart = difference(ours.questions[metric], base.questions[metric])
    (found,) = estimate(apart, confidence)
    if not all(map(_is_right_or_wrong, (*ours.questions[metric], *base.questions[metric]))):
        return TaskDifference(found, None, None)
    gained = sum(int((stratum.sums_QU > 0).sum()) for stratum in apart)
    lost = sum(int((stratum.sums_QU < 0).sum()) for stratum in apart)
    return TaskDifference(found, gained, lost)


def _is_right_or_wrong(stratum: Stratum) -> bool:
    """Whether each question has 0 or 1."""
    return bool(np.isin(stratum.sums_QU, (0, 1)).all())

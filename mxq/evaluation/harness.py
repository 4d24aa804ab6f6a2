"""The edge to lm-evaluation-harness: its index of tasks, its run, and its answers as numbers.

The harness is given the loaded model: by itself it does not know the checkpoint format of mxq, and
would score a model whose experts were never loaded.
"""

import contextlib
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch

from mxq.counted import counted
from mxq.evaluation.demo_tasks import demo_names
from mxq.evaluation.loading import free_memory, load_model, load_tokenizer
from mxq.evaluation.statistics import Stratum

BOOTSTRAP_DRAWS = 1000
"""Of the harness, for the standard error of the metrics that have no formula."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the harness is asked for; see ``mxq.evaluation.tasks.TaskOptions``."""

    names: tuple[str, ...]
    shots: int | None
    limit: int | None
    batch: int | None
    device: str | None


@dataclass(frozen=True, slots=True)
class Answers:
    """What the harness found for a task or a group of tasks.

    ``means`` has its value and standard error of each metric. ``questions`` has the metric of each
    question, a stratum for each leaf task, where the value is the mean of those.
    """

    n: int
    shots: int | None
    means: Mapping[str, tuple[float, float | None]]
    questions: Mapping[str, tuple[Stratum, ...]]


def require_harness() -> None:
    """Raise ValueError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401  (whether it is there)
    except ImportError as error:
        raise ValueError(
            f"tasks are run by lm-eval, which cannot be imported ({error}); install it with: "
            "pip install 'mxq[eval]'"
        ) from error


def task_manager(names: Sequence[str], folders: Sequence[str]) -> Any:
    """The harness's index of tasks: the standard ones are read only if a name needs them.

    Raises:
        ValueError: If a name is not in it.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(folders), include_defaults=False)
    local = manager.all_tasks
    if not set(names) <= set(local):
        manager = TaskManager(include_path=list(folders), include_defaults=True)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        menu = ", ".join(dict.fromkeys((*local, *demo_names())))
        raise ValueError(
            f"{', '.join(unknown) or 'no name'} is no task here; choose {menu}, or a standard task "
            "(lm-eval ls tasks)"
        )
    return manager


def check_questions(manager: Any, names: Sequence[str], shots: int | None) -> None:
    """Read the questions of the tasks, before a model is loaded.

    Raises:
        ValueError: If a task does not have that many examples for a question.
        ConnectionError: If the questions cannot be read.
    """
    for task in _load_tasks(manager, names):
        if not shots:
            continue
        name = task.config.task
        # The harness would go on without a word and ask without examples.
        if task.get_config("num_fewshot") == 0:
            raise ValueError(f"task {name} allows no examples (num_fewshot: 0); leave out --shots")
        # A task without examples of its own takes other questions of the test.
        pool = len(task.fewshot_docs())
        spare = pool - (not task.has_training_docs() and not task.has_validation_docs())
        if shots > spare:
            raise ValueError(
                f"shots is {shots}, but task {name} has {counted(spare, 'example')} for a "
                "question; ask for fewer"
            )


def _load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The task objects, those of groups among them."""
    with _quiet(), _reading(names):
        return list(manager.load(list(names))["tasks"].values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave the output to the results: what the harness prints goes to the error stream."""
    # Its warnings are about options that a loaded model has decided already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _reading(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectionError(
            f"the questions of {', '.join(names)} could not be read ({error}); is there a network? "
            "Without one, use --tasks demo, or local tasks with --task-path FOLDER"
        ) from error


def _refuse_broken(name: str, module: object, inputs: object, output: Any) -> None:
    """The largest of NaNs is some answer, so a broken model would have a score.

    Minus infinity is how some models rule a token out.
    """
    if (output.logits.isnan() | output.logits.isposinf()).any():
        raise ValueError(f"the logits of {name} are not finite somewhere; the model is broken")


def ask(name: str, manager: Any, request: Request) -> dict[str, Answers]:
    """The answers of one model by task and group; the model is gone from memory afterwards.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(name)
    model = load_model(name, device=request.device)
    model.register_forward_hook(partial(_refuse_broken, name))
    with _quiet(), _reading(request.names):
        output: Mapping[str, Any] = lm_eval.evaluate(
            lm=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size="auto" if request.batch is None else request.batch,
            ),
            task_dict=_with_shots(manager, request),
            limit=request.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=True,
        )
    del model
    free_memory()
    return dict(_all_answers(output))


def _with_shots(manager: Any, request: Request) -> Any:
    """The tasks with their examples, seeded as the harness's own command seeds them.

    That command (``lm_eval.simple_evaluate``) also asks git for a commit and pip for all packages
    after each model; git says on the error stream where there is none.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # Tasks may shuffle their questions or choices when they are loaded.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = manager.load(list(request.names))
    for task in loaded["tasks"].values():
        shots = task.get_config("num_fewshot") if request.shots is None else request.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _all_answers(output: Mapping[str, Any]) -> Iterator[tuple[str, Answers]]:
    """The answers of each task, and of each group that has metrics of its own."""
    for name, fields in output["results"].items():
        means = _means(fields)
        if not means:
            continue
        leaves = _leaves(name, output["group_subtasks"])
        strata = {metric: _strata(metric, leaves, output["samples"]) for metric in means}
        yield (
            name,
            Answers(
                n=sum(output["n-samples"][leaf]["effective"] for leaf in leaves),
                shots=output["n-shot"].get(name),
                means={_plain(metric): mean for metric, mean in means.items()},
                questions={
                    _plain(metric): found
                    for metric, found in strata.items()
                    if found is not None and _is_mean(means[metric][0], found)
                },
            ),
        )


def _means(fields: Mapping[str, object]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error by ``metric,filter``; other fields of a result are names."""
    numbers = {
        key: float(value)
        for key, value in fields.items()
        if "," in key and isinstance(value, int | float)
    }
    errors = {key: key.replace("_stderr,", ",") for key in fields if "_stderr," in key}
    return {
        key: (value, next((numbers.get(error) for error, of in errors.items() if of == key), None))
        for key, value in numbers.items()
        if key not in errors
    }


def _plain(metric: str) -> str:
    """``acc,none`` as ``acc``; another filter stays in the name."""
    return metric.removesuffix(",none")


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, those of its groups among them; a task itself."""
    below = children.get(name) or ()
    return [leaf for child in below for leaf in _leaves(child, children)] if below else [name]


def _strata(
    metric: str, leaves: Sequence[str], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Stratum, ...] | None:
    """The metric of each question by leaf, or None if some have no single number."""
    name, _, answer_filter = metric.partition(",")
    strata = []
    for leaf in leaves:
        asked = [sample for sample in samples[leaf] if sample["filter"] == answer_filter]
        asked.sort(key=lambda sample: int(sample["doc_id"]))
        values = [sample.get(name) for sample in asked]
        if not values or not all(isinstance(value, Real | np.bool_) for value in values):
            return None
        sums = np.array([values], dtype=np.float64)
        strata.append(Stratum(np.ones(len(values)), sums))
    return tuple(strata)


def _is_mean(value: float, strata: Sequence[Stratum]) -> bool:
    """Whether a value of the harness is the mean over all questions."""
    total = sum(float(stratum.sums_QU.sum()) for stratum in strata)
    count = sum(float(stratum.counts_U.sum()) for stratum in strata)
    return math.isclose(total / count, value, rel_tol=1e-9, abs_tol=1e-12)

"""The embedded questions as tasks of lm-evaluation-harness: no network, a task for each domain."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from mxq import demo
from mxq.demo import Question

DEMO_QUESTIONS = 200
"""Questions of the task ``demo``, and of the task of each domain."""

DEMO_EXAMPLES = 40
"""Questions beyond those at most, with their answers, for ``--shots``."""


def demo_names() -> tuple[str, ...]:
    """``demo`` and ``demo_DOMAIN``."""
    return ("demo", *(f"demo_{domain}" for domain in demo.DOMAINS))


def write_demo_tasks(folder: Path, names: Collection[str]) -> None:
    """Write the demo tasks of those names: the questions, and the task in the harness's form."""
    in_turn = demo.questions((DEMO_QUESTIONS + DEMO_EXAMPLES) * len(demo.DOMAINS))
    asked = in_turn[: DEMO_QUESTIONS * len(demo.DOMAINS)]
    prompts = {question.prompt for question in asked}  # short ones come more than once
    examples = [question for question in in_turn[len(asked) :] if question.prompt not in prompts]
    for name in names:
        files = {
            "test": _write(folder / f"{name}.jsonl", _of(name, asked)[:DEMO_QUESTIONS]),
            "train": _write(folder / f"{name}-examples.jsonl", _of(name, examples)[:DEMO_EXAMPLES]),
        }
        task = _demo_task(name, files, folder / "cache")
        # JSON is YAML, so no writer of YAML is needed.
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


def _of(name: str, questions: Iterable[Question]) -> Sequence[Question]:
    """The questions of a task."""
    return [question for question in questions if name in ("demo", f"demo_{question.domain}")]


def _write(path: Path, questions: Iterable[Question]) -> str:
    rows = (
        {"prompt": question.prompt, "choices": question.choices, "answer": question.answer}
        for question in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _demo_task(name: str, files: dict[str, str], cache: Path) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        # The cache lies beside the questions, so that nothing of a run is left behind.
        "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)},
        "test_split": "test",
        "training_split": "train",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # a choice goes on where the prompt breaks off
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }

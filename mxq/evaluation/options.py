"""The options of the evaluation scripts, and what is made of them."""

import argparse
from pathlib import Path

from mxq.evaluation.demo_tasks import demo_names
from mxq.evaluation.reference import KEEP_CHOICES
from mxq.evaluation.tasks import TaskOptions, parse_batch, parse_names
from mxq.evaluation.texts import TextOptions


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The models, and the options that every script has."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, folder, or demo")
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="one of the models, that differences are to (the reference, else the first)",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals, as a share (0.95)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu, auto (a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")


def add_text_options(parser: argparse.ArgumentParser, *, reference: str) -> None:
    """What models are scored on; ``reference`` says which one it is if none is given."""
    parser.add_argument(
        "--text",
        required=True,
        help="a .txt or .jsonl file, wikitext2, demo, or NAME=TEXT,NAME=TEXT for several domains",
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help=f"model that KL and flips are to ({reference})"
    )
    parser.add_argument("--window", type=int, help="tokens (2048, or what the models know if less)")
    parser.add_argument("--limit", type=int, help="read at most this many tokens of each domain")
    parser.add_argument(
        "--keep-logits",
        choices=KEEP_CHOICES,
        default="auto",
        help="keep the reference's logits in temporary files (yes), or the reference in memory "
        "beside each model (no); auto: files if they take less than half of the free disk",
    )


def text_options(arguments: argparse.Namespace) -> TextOptions:
    """The options that were given.

    Raises:
        ValueError: For what cannot be scored.
    """
    return TextOptions(
        text=arguments.text,
        window=arguments.window,
        limit=arguments.limit,
        batch=int(arguments.batch),
        device=arguments.device,
        confidence=arguments.confidence,
        keep_logits=arguments.keep_logits,
    )


def add_task_options(
    parser: argparse.ArgumentParser, *, required: bool, limit: str = "--limit"
) -> None:
    """Which questions are asked, and how; ``limit`` is the name of that option."""
    names = ", ".join(demo_names())
    parser.add_argument(
        "--tasks", required=required, help=f"names, separated by commas; also {names}"
    )
    parser.add_argument("--task-path", type=Path, help="folder with .yaml tasks of your own")
    parser.add_argument(
        "--shots", type=int, help="examples before each question (what the task says, mostly 0)"
    )
    parser.add_argument(
        limit,
        dest="task_limit",
        metavar="LIMIT",
        type=int,
        help="no more than this many questions of each task",
    )


def task_options(arguments: argparse.Namespace) -> TaskOptions:
    """The options that were given.

    Raises:
        ValueError: For what cannot be asked.
    """
    return TaskOptions(
        names=parse_names(arguments.tasks),
        folder=arguments.task_path,
        shots=arguments.shots,
        limit=arguments.task_limit,
        batch=parse_batch(str(arguments.batch)),
        device=arguments.device,
        confidence=arguments.confidence,
    )

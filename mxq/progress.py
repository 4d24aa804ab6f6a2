"""Progress on the terminal: stage, step, time left and memory; line by line in a file."""

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, str, int, int], None]
"""``(stage, step, done, total)``: progress of a run."""

log = logging.getLogger("mxq")

LINE_SECONDS = 20.0
"""Least time between two lines of one stage where the output is not a terminal."""


def stage(report: Report | None, name: str) -> Callable[[str, int, int], None]:
    """Progress of one stage, passed on to the report of the run."""

    def tell(step: str, done: int, total: int) -> None:
        if done == total:
            log.info("%s: %s, all %d done", name, step, total)
        if report is not None:
            report(name, step, done, total)

    return tell


@contextmanager
def progress_display() -> Iterator[Report]:
    """A display that takes ``(stage, step, done, total)``."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_report()
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, step: str, done: int, total: int) -> None:
            name = f"{stage}: {step}"
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total, memory="")
            progress.update(tasks[name], completed=done, total=total, memory=peak_memory())

        yield report


def peak_memory() -> str:
    """Largest resident memory of this process so far, for a reader."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kib = peak / 1024 if sys.platform == "darwin" else peak
    return f"peak {kib / 2**20:.2f} GiB"


def _line_report() -> Report:
    last: dict[str, float] = {}

    def report(stage: str, step: str, done: int, total: int) -> None:
        name, now = f"{stage}: {step}", time.monotonic()
        if done == total or now - last.get(name, -LINE_SECONDS) >= LINE_SECONDS:
            last[name] = now
            sys.stderr.write(f"{name} {done}/{total} ({peak_memory()})\n")
            sys.stderr.flush()

    return report

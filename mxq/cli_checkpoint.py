"""Commands on what a run wrote: a finished checkpoint or its work folder."""

import os
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from mxq import latency, report_tables
from mxq.cli_options import Checkpoint, CheckpointWork
from mxq.cli_runs import guarded
from mxq.report.write import write_report

commands = typer.Typer()


@commands.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or a work folder.")],
    work: CheckpointWork = None,
) -> None:
    """Show what is known of a checkpoint, or what a work folder holds."""
    guarded(lambda: report_tables.show_folder(folder, work))


@commands.command()
def report(
    folder: Checkpoint,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default FOLDER/report.html.")
    ] = None,
    work: CheckpointWork = None,
    is_opened: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Write one HTML page on a checkpoint: bits, losses, use of experts, time, provenance."""

    def run() -> None:
        profiles = latency.profile_folder(os.environ.get("XDG_CACHE_HOME"))
        path = write_report(folder, output, work, profiles=profiles)
        report_tables.show_written(path)
        if is_opened and not webbrowser.open(path.resolve().as_uri()):
            raise ValueError(f"no browser was found to open {path}; open it by hand")

    guarded(run)

"""Commands on what a run wrote: a finished checkpoint or its work folder."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from mxq import engine_tables, export_tables, report_tables, tables
from mxq.checking import check_folder
from mxq.checkpoint.export.plan import ExportOptions
from mxq.cli_options import (
    Checkpoint,
    CheckpointFormat,
    CheckpointWork,
    Compute,
    Destination,
    Device,
    Dtype,
    EngineName,
    Memory,
    Overwrite,
    Ranks,
    To,
    Tokens,
    Work,
)
from mxq.cli_runs import guarded, profiles_folder
from mxq.config import ResourceOptions, parse_size
from mxq.explore.question import Setting
from mxq.explore.run import run_explore
from mxq.exporting import run_export
from mxq.layerwise import run_measure_layers
from mxq.progress import progress_display
from mxq.report.write import write_report
from mxq.workspace import open_workspace

RESULTS = "What a run wrote"

commands = typer.Typer()


@commands.command(rich_help_panel=RESULTS)
def check(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A checkpoint of mxq, an exported one, or a work folder."
        ),
    ],
    engine: EngineName,
    tp: Ranks = 1,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Findings as JSON.")] = False,
) -> None:
    """Check a plan or a checkpoint against the rules of an inference engine.

    Ends with status 1 if one is broken.
    """

    def run() -> None:
        report = check_folder(folder, engine, tp)
        if as_json:
            typer.echo(engine_tables.check_json(report))
        else:
            engine_tables.show_check(report)
        if report.errors:
            raise typer.Exit(1)

    guarded(run)


@commands.command(rich_help_panel=RESULTS)
def export(
    checkpoint: Checkpoint,
    destination: Destination,
    to: To,
    dtype: Dtype = None,
    checkpoint_format: CheckpointFormat = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint for other tools: compressed-tensors, gptq, or a plain model."""

    def run() -> None:
        options = ExportOptions(dtype, checkpoint_format)
        with progress_display() as report:
            result = run_export(
                checkpoint, destination, to, options, overwrite=overwrite, report=report
            )
        export_tables.show_export(result)

    guarded(run)


@commands.command(rich_help_panel=RESULTS)
def explore(
    work: Work,
    device: Device = None,
    tokens: Tokens = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Of 127.0.0.1; 0: a free one.")
    ] = 0,
    browser: Annotated[bool, typer.Option(metavar="", help="Open the page.")] = True,
) -> None:
    """Show the plan and its loss for any budget, on a page with a slider in the browser."""

    def run() -> None:
        setting = Setting(work, device, tokens, profiles_folder())
        run_explore(setting, port=port, opens_browser=browser, announce=tables.show_address)

    guarded(run)


@commands.command(rich_help_panel=RESULTS)
def inspect(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A checkpoint, an exported one, or a work folder."),
    ],
    work: CheckpointWork = None,
) -> None:
    """Show what is known of a checkpoint, or what a work folder holds."""
    guarded(lambda: report_tables.show_folder(folder, work))


@commands.command(rich_help_panel=RESULTS)
def report(
    folder: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write.",
            show_default="FOLDER/report.html",
        ),
    ] = None,
    work: CheckpointWork = None,
    is_opened: Annotated[
        bool, typer.Option("--open", metavar="", help="Show the page in a browser.")
    ] = False,
    measures: Annotated[
        bool,
        typer.Option(
            "--measure-layers",
            metavar="",
            help="Measure first what each layer loses by itself; reads the original model.",
        ),
    ] = False,
    memory: Memory = "8GiB",
    compute: Compute = "auto",
) -> None:
    """Write one HTML page on a checkpoint: bits, losses, use of experts, time, provenance."""

    def run() -> None:
        measured = None
        if measures:
            resources = ResourceOptions(parse_size(memory), compute=compute)
            space = open_workspace(work or folder / "work", resources)
            with progress_display() as progress:
                measured = run_measure_layers(space, folder, report=progress)
        profiles = profiles_folder()
        path = write_report(folder, output, work, profiles=profiles, measured_layers=measured)
        report_tables.show_written(path)
        if is_opened and not webbrowser.open(path.resolve().as_uri()):
            raise ValueError(f"no browser was found to open {path}; open it by hand")

    guarded(run)

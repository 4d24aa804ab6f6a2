"""Commands on what a run wrote: a finished checkpoint or its work folder."""

from pathlib import Path
from typing import Annotated

import typer

from mxq import engine_tables, tables
from mxq.checking import check_folder
from mxq.checkpoint.export import export_checkpoint
from mxq.checkpoint.export.plan import ExportOptions
from mxq.cli_options import (
    Checkpoint,
    CheckpointFormat,
    Destination,
    Device,
    Dtype,
    EngineName,
    Replace,
    TensorParallel,
    To,
    Tokens,
    Work,
)
from mxq.cli_runs import guarded, profiles_folder
from mxq.explore.question import Setting
from mxq.explore.run import run_explore
from mxq.progress import progress_display

commands = typer.Typer()


@commands.command()
def check(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint of mxq, an exported one, or a work folder.")
    ],
    engine: EngineName,
    tp: TensorParallel = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Hold a plan or a checkpoint against the rules of an inference engine; status 1 on errors."""

    def run() -> None:
        report = check_folder(folder, engine, tp)
        if as_json:
            typer.echo(engine_tables.check_json(report))
        else:
            engine_tables.show_check(report)
        if report.errors:
            raise typer.Exit(1)

    guarded(run)


@commands.command()
def export(
    checkpoint: Checkpoint,
    destination: Destination,
    to: To,
    dtype: Dtype = None,
    checkpoint_format: CheckpointFormat = None,
    overwrite: Replace = False,
) -> None:
    """Write a checkpoint for other tools: compressed-tensors, gptq, or a plain model."""

    def run() -> None:
        options = ExportOptions(dtype, checkpoint_format)
        with progress_display() as report:
            result = export_checkpoint(
                checkpoint, destination, to, options, overwrite=overwrite, report=report
            )
        tables.show_export(result)

    guarded(run)


@commands.command()
def explore(
    work: Work,
    device: Device = None,
    tokens: Tokens = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 takes a free one.")
    ] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Show plans of a work folder on a local page: move the budget, see plan and loss at once."""

    def run() -> None:
        setting = Setting(work, device, tokens, profiles_folder())
        run_explore(setting, port=port, opens_browser=browser, announce=tables.show_address)

    guarded(run)

"""Commands on what a run wrote: a finished checkpoint or its work folder."""

from pathlib import Path
from typing import Annotated

import typer

from mxq import engine_tables
from mxq.checking import check_folder
from mxq.cli_options import EngineName, TensorParallel
from mxq.cli_runs import guarded

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

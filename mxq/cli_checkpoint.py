"""Commands on what a run wrote: a finished checkpoint or its work folder."""

import typer

from mxq import tables
from mxq.checkpoint.export import export_checkpoint
from mxq.checkpoint.export.plan import ExportOptions
from mxq.cli_options import Checkpoint, CheckpointFormat, Destination, Dtype, Replace, To
from mxq.cli_runs import guarded
from mxq.progress import progress_display

commands = typer.Typer()


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

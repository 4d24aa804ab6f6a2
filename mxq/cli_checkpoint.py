"""Commands on what a run wrote: a finished checkpoint or its work folder."""

from typing import Annotated

import typer

from mxq import tables
from mxq.cli_options import Device, Tokens, Work
from mxq.cli_runs import guarded, profiles_folder
from mxq.explore.question import Setting
from mxq.explore.run import run_explore

commands = typer.Typer()


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

"""Commands on what a run wrote: a finished checkpoint or its work folder."""

import typer

commands = typer.Typer()

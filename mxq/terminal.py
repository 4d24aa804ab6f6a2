"""The terminal that commands and scripts print to."""

from rich.console import Console

NARROWEST = 100
"""Columns to take at least where the output is not a terminal."""


def make_console(*, stderr: bool = False) -> Console:
    """The terminal, or a page wide enough for the tables."""
    console = Console(stderr=stderr)
    width = console.width if console.is_terminal else max(console.width, NARROWEST)
    return Console(stderr=stderr, width=width)

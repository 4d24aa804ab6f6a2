"""``mxq inspect``: the facts of a checkpoint in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mxq.checkpoint.export.record import find_export
from mxq.export_tables import show_exported
from mxq.publish import PLAN
from mxq.report import palette
from mxq.report.comparison import comparison, legend
from mxq.report.facts import Cell, Facts, gather
from mxq.report.origin import UNTOLD, command
from mxq.report.words import (
    byte_count,
    coverage,
    headlines,
    kept_choices,
    provenance,
    scheme_uses,
    warnings,
)
from mxq.tables import comparison_table, show_work
from mxq.terminal import make_console
from mxq.workspace import Workspace

MARKS = "0123456789abcdefg"
"""One letter for each number of bits, 10 and more as letters: g is 16."""

NARROW = 60
"""Columns that a table takes at least, so that its title and caption are lines and no column."""

LABEL_WIDTH = 30
"""Columns that a row's label and the lines of the table take beside the map."""


def show_folder(folder: Path, work: Path | None = None) -> None:
    """The facts of a checkpoint, the origin of an exported one, or a work folder's artifacts.

    Raises:
        ValueError: If it is neither.
    """
    if (folder / PLAN).is_file():
        show_facts(gather(folder, work))
        return
    exported = find_export(folder)
    if exported is not None:
        show_exported(folder, exported)
        return
    space = Workspace(folder)
    if not space.path("settings").is_file():
        raise ValueError(f"{folder} is neither an mxq checkpoint nor a work folder of mxq")
    show_work(space)


def show_facts(facts: Facts) -> None:
    """Headline, maps of bits, formats, losses, coverage, warnings and origin."""
    console, plan = make_console(), facts.plan
    console.print(f"[bold]{escape(facts.name)}[/]  {escape(str(facts.folder))}")
    console.print(f"Plan: {escape(plan.description)}")
    console.print(
        f"{plan.bits_per_weight:.4f} bits per weight, predicted loss {plan.predicted_loss:.6g} "
        f"{plan.unit}"
    )
    for line in headlines(facts):
        console.print(f"  {line.value:>10}  {line.label} [dim]({escape(line.remark)})")
    for table in bits_maps(facts, console.width):
        console.print(table)
    console.print(_schemes(facts))
    console.print(comparison_table(comparison(facts), facts.written.heldout_tokens))
    console.print(_legend_grid(facts.plan.unit))
    _show_lines(console, facts)


def show_written(path: Path) -> None:
    """Where a page was written, and how large it is."""
    make_console().print(
        f"Written to [bold]{escape(str(path))}[/] ({byte_count(path.stat().st_size)})"
    )


def bits_maps(facts: Facts, width: int) -> list[Table]:
    """Bits of routed experts by layer, and of other linears by path, that many columns wide."""
    experts = [cell for cell in facts.cells if cell.expert is not None]
    plain = [cell for cell in facts.cells if cell.expert is None]
    tables = [_expert_map(experts, width)] if experts else []
    return tables + ([_linear_map(plain, width)] if plain else [])


def _expert_map(cells: Sequence[Cell], width: int) -> Table:
    names = list(dict.fromkeys(cell.column for cell in cells))
    count = 1 + max(cell.expert or 0 for cell in cells)
    room = max(8, (width - LABEL_WIDTH) // len(names) - 3)
    mates = -(-count // room)
    at = {(cell.layer, cell.column, cell.expert): cell.bits for cell in cells}
    table = Table(title="Bits of routed experts: a row of experts for each layer", min_width=NARROW)
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(escape(name), no_wrap=True)
    for layer in sorted({cell.layer for cell in cells}):
        rows = [[at.get((layer, name, expert)) for expert in range(count)] for name in names]
        table.add_row(str(layer), *(_marks(_means(row, mates)) for row in rows))
    table.caption = _legend("experts", mates, cells)
    return table


def _linear_map(cells: Sequence[Cell], width: int) -> Table:
    layers = range(1 + max(cell.layer for cell in cells))
    names = list(dict.fromkeys(cell.column for cell in cells))
    longest = max(map(len, names))
    mates = -(-len(layers) // max(8, width - longest - 8))
    at = {(cell.column, cell.layer): cell.bits for cell in cells}
    table = Table(title="Bits of other linears: a row of layers for each", min_width=NARROW)
    table.add_column("linear", overflow="fold")
    table.add_column(f"layers 0 to {layers[-1]}", no_wrap=True)
    for name in names:
        row = [at.get((name, layer)) for layer in layers]
        table.add_row(escape(name), _marks(_means(row, mates)))
    table.caption = _legend("layers", mates, cells)
    return table


def _means(bits: Sequence[float | None], mates: int) -> list[float | None]:
    """Means of that many neighbours, None where none of them is there."""
    means: list[float | None] = []
    for start in range(0, len(bits), mates):
        found = [value for value in bits[start : start + mates] if value is not None]
        means.append(sum(found) / len(found) if found else None)
    return means


def _marks(bits: Sequence[float | None]) -> Text:
    """A letter for each number of bits, on the colour that the page gives it in the dark."""
    text = Text()
    for value in bits:
        if value is None:
            text.append(" ")
            continue
        place = min(max((value - 2) / 6, 0), 1) * (len(palette.BITS) - 1)
        ground = palette.DARK_OF[palette.BITS[round(place)]]
        ink = "#ffffff" if place < (len(palette.BITS) - 1) / 2 else "#000000"
        text.append(MARKS[min(int(value), len(MARKS) - 1)], style=f"{ink} on {ground}")
    return text


def _legend(what: str, mates: int, cells: Sequence[Cell]) -> str:
    """What a mark is; without a work folder nothing tells the bits of scales."""
    is_whole = all(cell.loss is not None for cell in cells)
    counts = "scales and zero points included" if is_whole else "of the codes alone"
    mark = "A mark is" if mates == 1 else f"A mark is the mean of {mates} {what}:"
    return (
        f"{mark} stored bits per weight ({counts}), rounded down: 3 is 3.0 to 3.99. From 10 on it "
        "is a letter, g for 16."
    )


def _schemes(facts: Facts) -> Table:
    table = Table(title="Blocks in each format")
    for column in ("format", "of experts", "other linears"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for use in scheme_uses(facts):
        table.add_row(str(use.scheme), f"{use.of_experts:,}", f"{use.plain:,}")
    return table


def _legend_grid(unit: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, meaning in legend(unit):
        grid.add_row(f"[dim]{escape(name)}", f"[dim]{escape(meaning)}")
    return grid


def _show_lines(console: Console, facts: Facts) -> None:
    routed = kept_choices(facts.written_pack.expert_choices)
    for line in (*routed, *coverage(facts)):
        console.print(escape(line))
    for line in (*warnings(facts), *facts.notes):
        console.print(f"[yellow]{escape(line)}")
    grid = Table.grid(padding=(0, 2))
    for name, value in provenance(facts):
        grid.add_row(f"[dim]{escape(name)}", escape(value))
    console.print(grid)
    told = None if facts.origin is None else command(facts.origin)
    console.print(UNTOLD if told is None else escape(told), soft_wrap=True)

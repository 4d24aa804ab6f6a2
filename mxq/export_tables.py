"""What a user reads of an export: after ``mxq export``, and of its folder by ``mxq inspect``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mxq.checkpoint.export.record import ExportRecord
from mxq.counted import counted
from mxq.engines import Finding, Verdict
from mxq.exporting import ExportResult
from mxq.publish import ORIGIN
from mxq.report.export_card import GROUP_HEADS, engine_name, group_rows, how_made
from mxq.report.origin import UNTOLD, Origin
from mxq.report.words import byte_count
from mxq.storage import load_artifact
from mxq.terminal import make_console


def show_export(result: ExportResult) -> None:
    """What an export wrote, and what engines make of it."""
    console = make_console()
    _show_record(console, result.record)
    if result.verdicts:
        console.print(_verdicts(result.verdicts))
        console.print(
            f"Nothing was run in an engine. mxq check {escape(str(result.folder))} --engine NAME "
            "says what each rule is and what to do; README.md there lists them.",
            soft_wrap=True,
        )
    folder = f"[bold]{escape(str(result.folder))}[/]"
    stored = counted(result.tensor_bytes, "byte")
    console.print(f"Written to {folder}: {stored} of tensors", soft_wrap=True)


def show_exported(folder: Path, record: ExportRecord) -> None:
    """Where an exported folder is from."""
    console = make_console()
    origin = load_artifact(folder / ORIGIN, Origin) if (folder / ORIGIN).is_file() else None
    console.print(f"[bold]{escape(record.name)}[/]  {escape(str(folder))}")
    console.print(
        f"Exported by mxq {escape(record.mxq)}, {byte_count(record.tensor_bytes)} of tensors. The "
        f"config.json of its checkpoint has the SHA-256 {escape(record.source_digest)}.",
        soft_wrap=True,
    )
    _show_record(console, record)
    made = how_made(record, origin)
    for line in made:
        console.print(escape(line), soft_wrap=True)
    if len(made) == 1:
        console.print(f"Of the checkpoint OUT: {UNTOLD}")


def _show_record(console: Console, record: ExportRecord) -> None:
    table = Table(title=f"Exported to {record.to}")
    for column in GROUP_HEADS:
        table.add_column(column, justify="right" if column == "modules" else "left")
    for row in group_rows(record):
        table.add_row(*map(escape, row))
    console.print(table)
    for note in record.notes:
        console.print(f"[yellow]warning:[/] {escape(note)}")


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="What engines make of it, by their rules")
    table.add_column("engine")
    table.add_column("errors: it stops, or computes something else", style="red", ratio=3)
    table.add_column("warnings", style="yellow", ratio=2)
    for verdict in verdicts:
        table.add_row(escape(engine_name(verdict)), _ids(verdict.errors), _ids(verdict.warnings))
    return table


def _ids(findings: Sequence[Finding]) -> str:
    return escape(", ".join(finding.rule.id for finding in findings)) or "[green]none[/]"

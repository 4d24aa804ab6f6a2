"""What ``mxq check`` found, as a table for a reader and as JSON for a program."""

import json

from rich.markup import escape
from rich.table import Table

from mxq.checking import CheckReport
from mxq.counted import counted
from mxq.engines import Finding
from mxq.terminal import make_console

FEW = 3
"""Names that are listed of a finding."""


def show_check(report: CheckReport) -> None:
    """The broken rules with what to do, and what the check rests on."""
    console, rules = make_console(), report.rules
    ranks = report.deployment.tensor_parallel
    on = f" on {ranks} ranks" if ranks > 1 else ""
    blocks = len(report.deployment.quantized)
    console.print(
        f"{report.folder}: {report.what}, {counted(blocks, 'quantized weight')}", markup=False
    )
    if report.findings:
        console.print(_table(report, f"{rules.title} {rules.version}{on}"))
    warnings = len(report.findings) - report.errors
    colour = "red" if report.errors else "green"
    console.print(
        f"[{colour}]{counted(report.errors, 'error')}[/], {counted(warnings, 'warning')}."
    )
    if report.unchecked:
        ids = ", ".join(rule.id for rule in report.unchecked)
        console.print(f"Not checked, for want of an exported configuration: {ids}.")
    console.print(
        f"Nothing was run in {rules.title}. The rules are those of {rules.version}, read in "
        f"{rules.source}.",
        markup=False,
    )


def check_json(report: CheckReport) -> str:
    """The same for a program."""
    rules = report.rules
    document = {
        "folder": str(report.folder),
        "what": report.what,
        "engine": rules.engine,
        "rules_version": rules.version,
        "rules_source": rules.source,
        "tensor_parallel": report.deployment.tensor_parallel,
        "was_run_in_the_engine": False,
        "quantized_weights": len(report.deployment.quantized),
        "errors": report.errors,
        "findings": [_as_fields(finding) for finding in report.findings],
        "unchecked": [rule.id for rule in report.unchecked],
    }
    return json.dumps(document, indent=1)


def _table(report: CheckReport, title: str) -> Table:
    table = Table(title=title, show_lines=True)
    table.add_column("rule")
    table.add_column("blocks", justify="right")
    table.add_column("what it says, what was found, what to do", ratio=1, overflow="fold")
    for finding in report.findings:
        rule = finding.rule
        colour = "red" if rule.is_error else "yellow"
        lines = [rule.says, *_found(finding), f"Remedy: {rule.remedy}"]
        table.add_row(
            f"[{colour}]{rule.severity}[/]\n{rule.id}",
            str(len(finding.names) or ""),
            "\n".join(escape(line) for line in lines),
        )
    return table


def _found(finding: Finding) -> list[str]:
    if not finding.names:
        return [f"Found: {finding.detail}"]
    listed = ", ".join(finding.names[:FEW])
    more = ", ..." if len(finding.names) > FEW else ""
    return [f"Found: {finding.detail}", f"In: {listed}{more}"]


def _as_fields(finding: Finding) -> dict[str, object]:
    rule = finding.rule
    return {
        "rule": rule.id,
        "severity": rule.severity,
        "says": rule.says,
        "remedy": rule.remedy,
        "source": rule.source,
        "detail": finding.detail,
        "count": len(finding.names),
        "names": list(finding.names),
    }

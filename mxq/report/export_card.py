"""The model card of an exported folder, and the words that the terminal shares with it.

What was measured was measured on the checkpoint of mxq, and the card says so: an export holds the
same weights, but nobody has run it.
"""

from collections.abc import Sequence

from mxq.checkpoint.export.record import ExportRecord
from mxq.counted import counted
from mxq.engines import Finding, Verdict
from mxq.report.card import hub_fields, plans_table
from mxq.report.facts import Facts
from mxq.report.markdown import fenced, front_matter, listed, plain, table
from mxq.report.origin import UNTOLD, Origin, command
from mxq.report.words import byte_count, provenance

PLAIN = "dequantized"
"""The format that every tool reads."""

GROUP_HEADS = ("scheme of mxq", "modules", "written as")

_SAME = {
    "compressed-tensors": "The codes, scales and zero points here are the same, so a reader that "
    "follows the format decodes the same weights. What it computes with them it rounds in its own "
    "way.",
    "gptq": "The codes, scales and zero points here are the same, so a reader that follows the "
    "format decodes the same weights. What it computes with them it rounds in its own way.",
    PLAIN: "The weights here are those of the checkpoint, decoded in float32 and then rounded once "
    "to their type.",
}
"""How the weights of an export are those that were measured, by its format."""

_START = {
    "vllm": "vllm serve .",
    "sglang": "python -m sglang.launch_server --model-path .",
    "trtllm": "trtllm-serve .",
}
"""Commands that load a folder, by engine."""

_NEEDS = {
    "compressed-tensors": "  # with compressed-tensors installed",
    "gptq": "  # with optimum and gptqmodel installed",
    PLAIN: "",
}
"""What transformers needs beside itself, by format."""


def export_card(
    record: ExportRecord,
    verdicts: Sequence[Verdict],
    *,
    origin: Origin | None,
    facts: Facts | None,
) -> str:
    """The card as Markdown; ``facts`` are those of the checkpoint, None where it has no records."""
    sections = [
        front_matter(hub_fields(origin), ["mxq", "quantized", record.to]),
        f"# {plain(record.name)}, {record.to}",
        _opening(record, facts),
        "## How to load it\n\n" + _loading(record, verdicts, origin),
    ]
    found = warnings(record, verdicts)
    if found:
        sections.append("## Warnings\n\n" + listed(found))
    if facts is not None:
        sections.append("## What was measured\n\n" + _measured(record, facts))
    sections += [
        "## Formats\n\n" + table(GROUP_HEADS, group_rows(record)),
        "## How it was made\n\n" + _made(record, origin, facts),
    ]
    return "\n\n".join(sections) + "\n"


def group_rows(record: ExportRecord) -> list[tuple[str, str, str]]:
    """A row of ``GROUP_HEADS`` for each scheme."""
    return [(group.scheme, f"{group.modules:,}", group.written_as) for group in record.groups]


def warnings(record: ExportRecord, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """All that is known to go wrong: of the format, then of each engine."""
    found = [finding_text(v, finding) for v in verdicts for finding in v.findings]
    return (*record.notes, *found)


def engine_name(verdict: Verdict) -> str:
    """Name and version of an engine."""
    return f"{verdict.rules.title} {verdict.rules.version}"


def finding_text(verdict: Verdict, finding: Finding) -> str:
    """A broken rule of an engine in a sentence, with what was found."""
    rule = finding.rule
    return (
        f"{engine_name(verdict)}, {rule.severity} {rule.id}: {rule.says} Found: {finding.detail}."
    )


def how_made(record: ExportRecord, origin: Origin | None) -> tuple[str, ...]:
    """The commands that make the folder again: that of the checkpoint where it is known."""
    made = None if origin is None else command(origin)
    return (record.command,) if made is None else (made, record.command)


def _opening(record: ExportRecord, facts: Facts | None) -> str:
    bits = "" if facts is None else f" of {facts.plan.bits_per_weight:.3f} bits per weight"
    return (
        f"A checkpoint of mxq{bits}, written for other tools by `mxq export`. All tensors are "
        f"{byte_count(record.tensor_bytes)}. mxq is not needed to load it."
    )


def _loading(record: ExportRecord, verdicts: Sequence[Verdict], origin: Origin | None) -> str:
    auto = "AutoModelForCausalLM" if origin is None else origin.auto_class
    snippet = f"""from transformers import {auto}, AutoTokenizer{_NEEDS[record.to]}

folder = "."  # or this model's name on the hub
model = {auto}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
    if record.to == PLAIN:
        return f"As the original: it is a plain model.\n\n{fenced(snippet, 'python')}"
    lines = {engine: fenced(start) for engine, start in _START.items()}
    lines["transformers"] = fenced(snippet, "python")
    parts = []
    for verdict in verdicts:
        if not verdict.errors:
            mind = ", mind the warnings" if verdict.warnings else ""
            parts.append(f"{engine_name(verdict)}{mind}:\n\n{lines[verdict.rules.engine]}")
    if not parts:
        parts.append(
            "None of the engines below takes it. The checkpoint that it was exported from loads in "
            "transformers, after `import mxq`."
        )
    refused = ", ".join(engine_name(v) for v in verdicts if v.errors)
    if refused:
        parts.append(f"Not with {refused}, whose rules it breaks: see the warnings.")
    parts.append(
        "The rules of each engine were read in its sources, in the version named. This folder was "
        "not run in any of them; `mxq check . --engine NAME` says what to do about each rule."
    )
    return "\n\n".join(parts)


def _measured(record: ExportRecord, facts: Facts) -> str:
    text = (
        "On the checkpoint of mxq, before the export, with "
        f"{counted(facts.written.heldout_tokens, 'held-out token')} of the calibration text; "
        f"nothing was measured on this folder. {_SAME[record.to]}"
    )
    if record.rounds_inputs:
        text += (
            " The numbers include that mxq rounds the inputs of some weights. Here that is done in "
            "another way or not at all, so they are not those of this folder."
        )
    return f"{text} Sizes are those of the checkpoint.\n\n{plans_table(facts)}"


def _made(record: ExportRecord, origin: Origin | None, facts: Facts | None) -> str:
    told = fenced("\n".join(how_made(record, origin)))
    if origin is None or command(origin) is None:
        told = f"{told}\n\nOf the checkpoint OUT: {UNTOLD}"
    rows = () if facts is None else provenance(facts)
    digest = ("SHA-256 of the checkpoint's config.json", record.source_digest)
    return f"{told}\n\n{table(('', ''), [*rows, digest, ('exported with', f'mxq {record.mxq}')])}"

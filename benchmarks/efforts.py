"""The section "What an effort gains and costs" of the results page, from results files alone."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accuracy.goals import Row, at, budget
from speed.page import PROCESSORS, clocked, made_at


@dataclass(frozen=True, slots=True)
class Effort:
    """Where an effort was measured: a method of the accuracy files, a case of the pipeline's."""

    method: str
    case: str


EFFORTS: Mapping[str, Effort] = {
    "fast": Effort("mxq-fast", "small/mxq"),
    "balanced": Effort("mxq", "small/mxq-balanced"),
    "best": Effort("mxq-best", "small/mxq-best"),
}
"""From little time to much; one that no file has yet is left out."""


def effort_sections(
    accuracies: Mapping[str, Mapping[str, Any]], pipelines: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A section for every pair of files of one model."""
    lines = []
    for name, accuracy in accuracies.items():
        for other, pipeline in pipelines.items():
            if accuracy["model"] == pipeline["settings"]["model"]:
                lines += _section((name, accuracy), (other, pipeline))
    return lines


def _section(
    accuracy: tuple[str, Mapping[str, Any]], pipeline: tuple[str, Mapping[str, Any]]
) -> list[str]:
    rows: Sequence[Row] = accuracy[1]["rows"]
    settings = pipeline[1]["settings"]
    costs = {name: clocked(pipeline[1], effort.case) for name, effort in EFFORTS.items()}
    known = [
        name
        for name, effort in EFFORTS.items()
        if costs[name] is not None or any(row["method"] == effort.method for row in rows)
    ]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    runs = dict.fromkeys(made_at(row) for row in costs.values() if row is not None)
    heads = [f"KL, {budget(size)}" for size in sizes]
    return [
        f"## What an effort gains and costs: {accuracy[1]['model']}",
        "",
        f"KL to the original on held-out text, of `{accuracy[0]}`: the mean over the seeds that "
        "all efforts of a budget have. The time is that of the processors for a whole run, of "
        f"`{pipeline[0]}` ({'; '.join(runs)}): {settings['small_samples']} x {settings['seqlen']} "
        f"tokens, {len(settings['mxq_schemes'])} schemes, {settings['bits']:g} bits, every linear "
        "of the decoder layers, the uniform plan packed beside; s per million is of the parameters "
        "that were quantized.",
        "",
        f"| `--effort` | quantizer | target | {' | '.join(heads)} | processors, s | s per million "
        f"| time over {known[0]} |",
        f"| --- | --- | --- |{' ---: |' * (len(sizes) + 3)}",
        *(_line(rows, sizes, known, name, costs) for name in known),
        "",
    ]


def _line(
    rows: Sequence[Row],
    sizes: Sequence[str],
    known: Sequence[str],
    name: str,
    costs: Mapping[str, Row | None],
) -> str:
    method = EFFORTS[name].method
    found = next((row for row in rows if row["method"] == method), {})
    cells = [
        f"`{name}`",
        *(f"`{found[key]}`" if key in found else "-" for key in ("quantizer", "target")),
        *(_kl(rows, size, known, method) for size in sizes),
        *_cost(costs[name], costs[known[0]]),
    ]
    return f"| {' | '.join(cells)} |"


def _kl(rows: Sequence[Row], size: str, known: Sequence[str], method: str) -> str:
    """Mean KL of a method on the seeds that every effort with rows of the size has."""
    kls = {
        name: {row["seed"]: row["kl"] for row in at(rows, size, name)}
        for name in (EFFORTS[effort].method for effort in known)
    }
    if not kls[method]:
        return "-"
    common = set.intersection(*(set(found) for found in kls.values() if found))
    return f"{statistics.mean(kls[method][seed] for seed in common):.5f}" if common else "-"


def _cost(row: Row | None, first: Row | None) -> Iterator[str]:
    """Seconds, per million parameters, and over those of the first effort."""
    if row is None:
        yield from ("-", "-", "-")
        return
    seconds = _seconds(row)
    yield f"{seconds:.0f}"
    yield f"{seconds / row['quantized_weights'] * 1e6:.1f}"
    yield "-" if first is None else f"{seconds / _seconds(first):.2f}"


def _seconds(row: Row) -> float:
    return sum(step[PROCESSORS] for step in row["clock"])

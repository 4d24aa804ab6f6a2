"""What the project set out to reach, judged from rows alone."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """``found`` is how many times faster mxq is than the peer; None if one of them was not run."""

    text: str
    peer: str
    least: float
    found: float | None

    @property
    def verdict(self) -> str:
        """Of the goal."""
        if self.found is None:
            return "not measured"
        return "reached" if self.found >= self.least else "missed"


def median_s(rows: Sequence[Row], case: str) -> float | None:
    """Median of the total seconds of a case, imports left out; None without a finished run."""
    found = [row["total_s"] for row in rows if row["case"] == case and "total_s" in row]
    return statistics.median(found) if found else None


PACKING = ("other", "open", "pack plan", "publish")
"""Stages of mxq that do what a tool does which only quantizes and writes."""


def packing_s(rows: Sequence[Row], case: str) -> float | None:
    """Median of the seconds of a case of mxq that went to quantizing and writing its plan.

    The rest is the profile of the experts, the measurement of sensitivities and that of the loss.
    """
    found = [
        sum(part["wall_s"] for part in row["clock"] if part["stage"] in PACKING)
        for row in rows
        if row["case"] == case and "clock" in row
    ]
    return statistics.median(found) if found else None


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    """All goals, the ones without measurements too."""
    wanted = (
        (
            "whole run 3 times faster than AutoScheme and export",
            "small/autoround",
            3.0,
            median_s(rows, "small/mxq"),
        ),
        (
            "one scheme by GPTQ, quantizing and writing, not slower than the whole run of the peer",
            "small/llmcompressor",
            1.0,
            packing_s(rows, "small/mxq-one-scheme"),
        ),
    )
    goals = []
    for text, peer, least, mine in wanted:
        theirs = median_s(rows, peer)
        known = mine is not None and theirs is not None
        goals.append(Goal(text, peer, least, theirs / mine if known else None))
    return goals

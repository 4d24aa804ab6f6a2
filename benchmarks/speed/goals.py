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


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    """All goals, the ones without measurements too."""
    mine = median_s(rows, "small/mxq")

    def times_faster(peer: str) -> float | None:
        theirs = median_s(rows, peer)
        return None if mine is None or theirs is None else theirs / mine

    wanted = (
        ("3 times faster than AutoScheme and export", "small/autoround", 3.0),
        ("not slower per parameter than GPTQ with one scheme", "small/llmcompressor", 1.0),
    )
    return [Goal(text, peer, least, times_faster(peer)) for text, peer, least in wanted]

"""What the project set out to reach in accuracy, judged from rows alone."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

BASELINE = "gptq-rotated"
"""The row that others are measured by: uniform GPTQ with rotated inputs, the best own baseline."""

WANTED = (
    ("w2a16_g128_asym", 0.5),
    ("w2a16_g64_asym=2.5", 0.25),
)
"""Size, and the most that mxq's KL may be as a share of the baseline's."""


@dataclass(frozen=True, slots=True)
class Goal:
    """``found`` is the share of mxq's KL; None if a row that it needs was not measured."""

    text: str
    most: float
    found: float | None

    @property
    def verdict(self) -> str:
        """Of the goal."""
        if self.found is None:
            return "not measured"
        return "reached" if self.found <= self.most else "missed"


def at(rows: Sequence[Row], size: str, method: str | None = None) -> list[Row]:
    """Rows of a size, of one method or all."""
    return [row for row in rows if row["size"] == size and method in (None, row["method"])]


def share(rows: Sequence[Row], size: str, method: str, other: str) -> float | None:
    """Mean KL of a method over that of another, on the seeds that both have; None without one."""
    kls = {
        name: {row["seed"]: row["kl"] for row in at(rows, size, name)} for name in (method, other)
    }
    seeds = sorted(set(kls[method]) & set(kls[other]))
    if not seeds:
        return None
    mine, theirs = (statistics.mean(kls[name][s] for s in seeds) for name in (method, other))
    return mine / theirs


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    """Every goal, those without measurements too."""
    goals = [
        Goal(f"{budget(size)}: KL at most {most:g} of {BASELINE}", most, _of_baseline(rows, size))
        for size, most in WANTED
    ]
    return [*goals, *_not_worse(rows)]


def budget(size: str) -> str:
    """The budget of a size in words."""
    scheme, _, bits = size.partition("=")
    return f"{bits} bits" if bits else f"that of {scheme}"


def _of_baseline(rows: Sequence[Row], size: str) -> float | None:
    return share(rows, size, "mxq", BASELINE)


def _not_worse(rows: Sequence[Row]) -> Iterator[Goal]:
    """From 3 bits on: mxq against the row that is best beside it, but for its own higher effort."""
    for size in dict.fromkeys(row["size"] for row in rows):
        found = at(rows, size)
        if min(row["bits"] for row in found) < 3:
            continue
        others = sorted({row["method"] for row in found} - {"mxq", "mxq-best"})
        shares = {name: share(rows, size, "mxq", name) for name in others}
        known = {name: value for name, value in shares.items() if value is not None}
        best = max(known, key=lambda name: known[name], default="every other row")
        yield Goal(f"{budget(size)}: KL not above that of {best}", 1.0, known.get(best))

"""Which entry of a list of targets a module meets: names, patterns and classes.

An entry is the exact path of a module, ``re:`` and a regular expression that matches from the
start of the path, or the name of a class. Exact paths and patterns come first, in the order of the
list; then classes, of which only ``Linear`` can be told from files.

Patterns come from files of others, so each match has a time limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import regex

REGEX = "re:"
LINEAR = "Linear"
MATCH_LIMIT_S = 1.0
"""Seconds that one pattern may take for one name."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Entries in their order, patterns compiled."""

    entries: tuple[str, ...]
    exact: dict[str, int]
    patterns: tuple[tuple[int, "regex.Pattern[str]"], ...]

    def find(self, name: str, *, is_linear: bool = True) -> int | None:
        """The place of the entry that a module meets; None if it meets none.

        Raises:
            ValueError: If a pattern takes too long.
        """
        found = [
            place for place in (self.exact.get(name), self._pattern(name)) if place is not None
        ]
        if found:
            return min(found)
        return self.entries.index(LINEAR) if is_linear and LINEAR in self.entries else None

    def _pattern(self, name: str) -> int | None:
        return next((place for place, p in self.patterns if match(p, name)), None)


def targets_of(entries: Sequence[str]) -> Targets:
    """Entries made ready to be searched.

    Raises:
        ValueError: If a pattern does not compile.
    """
    patterns = tuple(
        (place, compiled(entry[len(REGEX) :]))
        for place, entry in enumerate(entries)
        if entry.startswith(REGEX)
    )
    exact: dict[str, int] = {}
    for place, entry in enumerate(entries):
        if not entry.startswith(REGEX):
            exact.setdefault(entry, place)
    return Targets(tuple(entries), exact, patterns)


def unmatched(targets: Targets, names: Sequence[str]) -> tuple[str, ...]:
    """Paths and patterns that no name meets; classes are left out."""
    known = set(names)
    found = [
        entry
        for entry, place in targets.exact.items()
        if entry not in known and "." in entry and targets.entries[place] == entry
    ]
    found += [
        REGEX + pattern.pattern
        for _, pattern in targets.patterns
        if not any(match(pattern, name) for name in names)
    ]
    return tuple(found)


def compiled(pattern: str) -> "regex.Pattern[str]":
    """The compiled pattern.

    Raises:
        ValueError: If it is none.
    """
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def match(pattern: "regex.Pattern[str]", name: str) -> bool:
    """Whether a pattern matches a name from its start.

    Raises:
        ValueError: If that takes longer than ``MATCH_LIMIT_S``.
    """
    try:
        return pattern.match(name, timeout=MATCH_LIMIT_S) is not None
    except TimeoutError as error:
        raise ValueError(
            f"the pattern {pattern.pattern!r} takes over {MATCH_LIMIT_S:g} s for one name; "
            "simplify it"
        ) from error

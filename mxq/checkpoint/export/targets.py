"""Names of modules as few rules: one rule for all names that differ in numbers and the last part.

Engines assign formats by exact names and regular expressions, and each has its own order of trying
them. Rules of different labels never match the same name here, so the order does not matter.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

ANY = "#"
"""Stands for a number in the parts of a rule."""

Numbers = tuple[int, ...]
Label = TypeVar("Label")


@dataclass(frozen=True, slots=True)
class Rule:
    """Names of the form ``parts.leaf``.

    ``numbers`` has the values of each ``#`` of ``parts``; None means all that exist. ``start`` is
    the first part that is written out: what is before it may be anything.
    """

    parts: tuple[str, ...]
    numbers: tuple[Numbers | None, ...]
    leaves: tuple[str, ...]
    start: int = 0

    @property
    def name(self) -> str | None:
        """The only name that the rule stands for, None if there are more."""
        values = [found[0] for found in self.numbers if found is not None and len(found) == 1]
        if len(values) < len(self.numbers) or len(self.leaves) > 1:
            return None
        numbers = iter(values)
        parts = (str(next(numbers)) if part == ANY else part for part in self.parts)
        return ".".join([*parts, *self.leaves])

    @property
    def regex(self) -> str:
        """An expression that matches the rule's names from their first letter to their last."""
        return self._head + r"\.".join([*self._written, _alternatives(self.leaves)]) + "$"

    @property
    def regex_of_parent(self) -> str:
        """An expression for all that is below the last part but one, and for that itself."""
        return self._head + r"\.".join(self._written[:-1]) + r"(\..*)?$"

    @property
    def _head(self) -> str:
        return ".*" if self.start > 0 else "^"

    @property
    def _written(self) -> list[str]:
        """The parts as expressions, from ``start`` on."""
        numbers = iter(self.numbers)
        parts = [_number(next(numbers)) if part == ANY else re.escape(part) for part in self.parts]
        return parts[self.start :]


def describe(labels: Mapping[str, Label]) -> dict[Label, tuple[Rule, ...]]:
    """Rules for each label that match its names and no other name of ``labels``."""
    forms: dict[tuple[str, ...], dict[Numbers, Label]] = defaultdict(dict)
    for name, label in labels.items():
        parts = name.split(".")
        # The last part is a leaf of a rule, written out even where it is a number.
        form = (*(ANY if part.isdecimal() else part for part in parts[:-1]), parts[-1])
        forms[form][tuple(int(part) for part in parts[:-1] if part.isdecimal())] = label
    starts = {form: _start(form, forms) for form in forms}
    merged: dict[Label, dict[Rule, list[str]]] = defaultdict(lambda: defaultdict(list))
    for form, members in forms.items():
        for label, numbers in _by_label(members).items():
            for condition in _conditions(numbers, members):
                key = Rule(form[:-1], condition, (), min(starts[form], len(form) - 1))
                merged[label][key].append(form[-1])
    return {
        label: tuple(replace(rule, leaves=tuple(leaves)) for rule, leaves in rules.items())
        for label, rules in merged.items()
    }


def matches(rules: Iterable[Rule], name: str) -> bool:
    """Whether a rule stands for a name."""
    return any(
        rule.name == name if rule.name is not None else re.match(rule.regex, name) is not None
        for rule in rules
    )


def _start(form: tuple[str, ...], forms: Iterable[tuple[str, ...]]) -> int:
    """The first part that has to be written out: that before the first number, if it is enough."""
    if ANY not in form[1:]:
        return 0
    start = form.index(ANY, 1) - 1
    tail = form[start:]
    clash = any(
        other != form
        and len(other) >= len(tail)
        and other[len(other) - len(tail) + 1 :] == tail[1:]
        and other[len(other) - len(tail)].endswith(tail[0])
        for other in forms
    )
    return 0 if clash else start


def _by_label(members: Mapping[Numbers, Label]) -> dict[Label, list[Numbers]]:
    found: dict[Label, list[Numbers]] = defaultdict(list)
    for numbers in sorted(members):
        found[members[numbers]].append(numbers)
    return found


def _conditions(
    chosen: Sequence[Numbers], existing: Iterable[Numbers]
) -> list[tuple[Numbers | None, ...]]:
    """Products of sets of numbers whose union is ``chosen``, as few as is easy.

    First numbers (of layers) with the same further ones share a product; what holds for all further
    numbers of these layers, or for all layers, is not listed.
    """
    slots = len(chosen[0])
    if slots == 0:
        return [()]
    all_rests, rests = _rests(existing), _rests(chosen)
    firsts: dict[frozenset[Numbers] | None, list[int]] = defaultdict(list)
    for first, rest in rests.items():
        firsts[None if rest == all_rests[first] else frozenset(rest)].append(first)
    found: list[tuple[Numbers | None, ...]] = []
    for shared, layers in firsts.items():
        head = None if len(layers) == len(all_rests) else tuple(layers)
        if shared is None:
            found.append((head, *[None] * (slots - 1)))
        elif slots == 2:
            found.append((head, tuple(sorted(number for (number,) in shared))))
        else:
            found += [(head, *((number,) for number in rest)) for rest in sorted(shared)]
    return found


def _rests(numbers: Iterable[Numbers]) -> dict[int, set[Numbers]]:
    """The further numbers by the first one."""
    rests: dict[int, set[Numbers]] = defaultdict(set)
    for first, *rest in numbers:
        rests[first].add(tuple(rest))
    return rests


def _number(values: Numbers | None) -> str:
    return r"\d+" if values is None else _alternatives([str(value) for value in values])


def _alternatives(texts: Sequence[str]) -> str:
    escaped = [re.escape(text) for text in texts]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

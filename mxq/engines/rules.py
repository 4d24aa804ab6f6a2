"""The rules of engines as data: one JSON file for each, with the version that it was read from.

A rule has a kind, which names a function of ``mxq.engines.check``, and the numbers and names that
the function needs. Nothing about a single engine is written in code.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mxq.json_values import decode

ENGINES = ("vllm", "sglang", "transformers", "trtllm")
PARTS = ("all", "experts", "linears")
SEVERITIES = ("error", "warning")

EXPORTED = "compressed-tensors"
"""What a plan is exported to: rules of this ``method`` are about plans too."""

_FOLDER = Path(__file__).parent / "rules"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Formats of one storage that are taken: every combination of the values listed.

    A group of 0 is one scale for an output row.
    """

    storage: str
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    symmetric: tuple[bool, ...] = (True,)
    a_bits: tuple[int, ...] = (16,)


@dataclass(frozen=True, slots=True)
class Fused:
    """Projections of one parent that an engine loads as one linear, and the name that it has."""

    name: str
    projections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that an engine needs.

    ``says`` is the rule in a sentence, ``remedy`` what to do, ``source`` where it was read. It is
    about a ``part`` of the blocks, and about checkpoints of one ``method`` unless that is empty.
    The other fields are what its kind needs: formats that are taken, linears that are one in the
    engine, projections whose inputs (``row``) or outputs (``column``) are split over the ranks,
    multiples of [inputs, outputs] for each of the two, and words that are refused.
    """

    id: str
    kind: str
    severity: str
    says: str
    remedy: str
    source: str
    part: str = "all"
    method: str = ""
    accepts: tuple[Accepted, ...] = ()
    fused: tuple[Fused, ...] = ()
    row: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    row_multiples: tuple[int, ...] = (1, 1)
    column_multiples: tuple[int, ...] = (1, 1)
    refused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a severity or a part that does not exist."""
        if self.severity not in SEVERITIES or self.part not in PARTS:
            raise ValueError(f"rule {self.id}: severity {self.severity!r}, part {self.part!r}")

    @property
    def is_error(self) -> bool:
        """Whether the engine fails or computes something else, so a plan has to keep it."""
        return self.severity == "error"

    def is_about(self, method: str) -> bool:
        """Whether the rule is about checkpoints of that method."""
        return self.method in ("", method)


@dataclass(frozen=True, slots=True)
class EngineRules:
    """The rules of one engine; ``title`` is its name in print, ``source`` where they were read."""

    engine: str
    title: str
    version: str
    source: str
    rules: tuple[Rule, ...]

    def of_kind(self, kind: str) -> tuple[Rule, ...]:
        """The rules of a kind that a plan has to keep."""
        return tuple(
            rule
            for rule in self.rules
            if rule.kind == kind and rule.is_error and rule.is_about(EXPORTED)
        )


def load_rules(engine: str) -> EngineRules:
    """The rules of an engine by its name.

    Raises:
        ValueError: With the menu, if there is none of that name.
    """
    check_engine(engine)
    text = (_FOLDER / f"{engine}.json").read_text(encoding="utf-8")
    return decode(EngineRules, json.loads(text))


def fused_linears(method: str) -> dict[str, frozenset[str]]:
    """Names under which engines ask an exported configuration of a method for fused linears.

    Each with the projections that it holds.
    """
    return {
        fused.name: frozenset(fused.projections)
        for engine in ENGINES
        for rule in load_rules(engine).rules
        if rule.kind == "fused names" and rule.is_about(method)
        for fused in rule.fused
    }


def check_engine(engine: str) -> None:
    """Raise ValueError with the menu unless there are rules for an engine of that name."""
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")


def check_tensor_parallel(engine: str, ranks: int) -> None:
    """Raise ValueError for a number of ranks that makes no sense for the engine."""
    if ranks < 1:
        raise ValueError(f"--tp is {ranks}; it must be at least 1")
    if ranks > 1 and not any(rule.kind == "divisible" for rule in load_rules(engine).rules):
        raise ValueError(
            f"--tp {ranks}: mxq knows no rule of {engine} about tensor parallelism; leave it out"
        )

"""What the page may ask: the parameters of a request, checked, and the command that asks the same.

Parameters are named as the options of ``mxq allocate`` are.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from mxq.config import AllocateOptions

SOLVER = "lagrangian"

ENGINES: tuple[str, ...] = ()
"""Engines whose rules a plan can keep; the page offers none beside them."""

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,6})?", re.ASCII)
_PARAMETERS = ("bits", "granularity", "tie-gate-up", "floor-bits", "max-latency")


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same while exploring: the work folder, and what latencies are for, if asked.

    ``profiles`` is the folder of measured profiles of devices.
    """

    work: Path
    device: str | None = None
    tokens: int | None = None
    profiles: Path | None = None


def parse_question(query: str, setting: Setting) -> AllocateOptions:
    """The options of the plan that a query string asks for.

    Raises:
        ValueError: If a parameter is unknown, repeated, missing or out of range.
    """
    given = _given(query)
    if "bits" not in given:
        raise ValueError("bits is missing; ask for a number of bits per weight, e.g. bits=3.25")
    latency_ms = _number(given, "max-latency")
    return AllocateOptions(
        bits=_number(given, "bits"),
        granularity=given.get("granularity", "block"),
        tie_gate_up=_flag(given, "tie-gate-up"),
        floor_bits=_number(given, "floor-bits"),
        solver=SOLVER,
        device=setting.device,
        tokens=setting.tokens,
        max_latency_us=None if latency_ms is None else 1000 * latency_ms,
        profiles=setting.profiles,
    )


def allocate_command(options: AllocateOptions, setting: Setting) -> str:
    """The command line that solves the same question, quoted for a shell."""
    words = ["mxq", "allocate", str(setting.work), "--bits", _spelled(options.bits)]
    if options.granularity != "block":
        words += ["--granularity", options.granularity]
    if options.tie_gate_up:
        words += ["--tie-gate-up"]
    if options.floor_bits is not None:
        words += ["--floor-bits", _spelled(options.floor_bits)]
    if options.device is not None:
        words += ["--device", options.device, "--tokens", str(options.tokens)]
    if options.max_latency_us is not None:
        words += ["--max-latency", _spelled(options.max_latency_us / 1000)]
    return shlex.join([*words, "--solver", SOLVER])


def _given(query: str) -> Mapping[str, str]:
    try:
        pairs = parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=20
        )
    except ValueError as error:
        raise ValueError(f"{query[:80]!r} is not of the form name=value&name=value") from error
    names = [name for name, _ in pairs]
    for name in names:
        if name not in _PARAMETERS:
            raise ValueError(f"no parameter {name[:40]!r}; there are {', '.join(_PARAMETERS)}")
        if names.count(name) > 1:
            raise ValueError(f"{name} is given {names.count(name)} times; give it once")
    return dict(pairs)


def _number(given: Mapping[str, str], name: str) -> float | None:
    if name not in given:
        return None
    if _NUMBER.fullmatch(given[name]) is None:
        raise ValueError(
            f"{name} is {given[name][:40]!r}; expected a number with at most 6 decimals, e.g. 3.25"
        )
    return float(given[name])


def _flag(given: Mapping[str, str], name: str) -> bool:
    if given.get(name, "0") not in ("0", "1"):
        raise ValueError(f"{name} is {given[name][:40]!r}; expected 0 or 1")
    return given.get(name) == "1"


def _spelled(number: float | None) -> str:
    """The decimal that was asked for: six decimals or fewer come back to the same float."""
    assert number is not None
    return f"{number:.6f}".rstrip("0").rstrip(".")

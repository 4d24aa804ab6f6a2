"""What a user asks for, checked once: one frozen dataclass for each group of options."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxq.compute import check_compute
from mxq.engines.rules import check_engine, check_tensor_parallel
from mxq.kernels.spec import TILE_PLANS
from mxq.scheme import Scheme, parse_schemes

SCOPES = ("auto", "experts", "all")
ROTATIONS = ("auto", "on", "off")
GRANULARITIES = ("block", "expert", "projection", "layer")
OBJECTIVES = ("loss", "mxmoe")
TARGETS = ("stream", "original", "local")
PINS = ("auto", "off")
EFFORTS: Mapping[str, tuple[str, str]] = {
    "fast": ("gptq", "local"),
    "balanced": ("refined", "stream"),
    "best": ("kronecker", "stream"),
}
"""Quantizer and target by effort: how much time accuracy is worth."""

OWN = "own"
"""Stands for a callable of the caller's in place of a name."""

PLANS = tuple(plan.name for plan in TILE_PLANS)

_SHAPE = re.compile(r"\s*([1-9]\d*)x([1-9]\d*)\s*", re.ASCII)
_SIZE = re.compile(r"\s*([0-9.]+)\s*(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)\s*")
_UNITS: Mapping[str, int] = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))},
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB")) if unit},
}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and which of its weights.

    ``scope`` "experts" is the feed-forward side of a mixture of experts, "all" every linear of
    the decoder layers, "auto" the first where there are experts. ``keep`` are regular expressions
    of parameter names that stay as they are.
    """

    model: str
    revision: str | None = None
    scope: str = "auto"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a scope that does not exist or a pattern that does not compile."""
        check_choice("scope", self.scope, SCOPES)
        for pattern in self.keep:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"--keep {pattern!r} is not a regular expression: {error}"
                ) from error


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Text to observe the model on, and how much of it.

    An expert under ``expert_floor`` tokens is topped up with spare samples.
    """

    spec: str = "wikitext2"
    samples: int = 128
    seqlen: int = 512
    seed: int = 0
    expert_floor: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError for numbers out of range."""
        check_at_least("samples", self.samples, 2)
        check_at_least("seqlen", self.seqlen, 2)
        check_at_least("expert floor", self.expert_floor, 0)


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How blocks are quantized and what their error is said to cost.

    ``schemes`` empty means the default candidates, fitted to the model's dimensions. Projections
    in ``by_projection`` ("down", "q_proj") have candidates of their own instead. ``target`` is what
    blocks are fitted to when they are packed: "local", what their own weights make of the inputs
    that quantized layers give, "original", their outputs in the original model, or "stream", those
    and what the residual stream that they are added to is off.
    """

    schemes: tuple[Scheme, ...] = ()
    sensitivity: str = "fisher"
    quantizer: str = "refined"
    rotation: str = "auto"
    by_projection: Mapping[str, tuple[Scheme, ...]] = field(default_factory=dict)
    target: str = "stream"

    def __post_init__(self) -> None:
        """Raise ValueError for a rotation or a target that does not exist."""
        check_choice("rotation", self.rotation, ROTATIONS)
        check_choice("target", self.target, TARGETS)


@dataclass(frozen=True, slots=True)
class AllocateOptions:
    """The budget and the rules of the plan. Exactly one of bits, size and plan is given.

    ``bits`` counts every stored bit of the quantized blocks per weight; ``size_bytes`` is that
    of all weight files and their index; ``plan`` forces ``uniform:SCHEME``. ``solver`` is a name or
    a ``mxq.search.problem.Solver``. ``profiles`` is the folder of measured profiles of devices.
    ``engine`` names whose rules the plan keeps, None for mxq's own runtime, and
    ``tensor_parallel`` over how many ranks it will be split there. ``pin`` "auto" gives experts
    without which the model would break the widest schemes; "mxmoe" and a forced plan pin none.
    """

    bits: float | None = None
    size_bytes: int | None = None
    plan: str | None = None
    granularity: str = "block"
    tie_gate_up: bool = False
    floor_bits: float | None = None
    objective: str = "loss"
    r: float = 0.75
    solver: str | Callable[..., Any] = "pulp"
    device: str | None = None
    tokens: int | None = None
    max_latency_us: float | None = None
    profiles: Path | None = None
    engine: str | None = None
    tensor_parallel: int = 1
    pin: str = "auto"

    def __post_init__(self) -> None:
        """Raise ValueError for choices that do not exist, contradict or are out of range."""
        self._check_ranges()
        check_choice("pin", self.pin, PINS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("objective", self.objective, OBJECTIVES)
        given = [name for name, v in self._budgets().items() if v is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none of them"
            raise ValueError(f"give one of --bits, --size or --plan; found {found}")
        if self.bits is not None and (self.floor_bits or 0) > self.bits:
            raise ValueError(
                f"--floor-bits {self.floor_bits:g} is above --bits {self.bits:g}; lower the floor"
            )
        limited = self.max_latency_us is not None or self.floor_bits is not None
        if self.plan is not None and limited:
            raise ValueError("--plan forces the plan; leave out --max-latency and --floor-bits")
        if self.max_latency_us is not None and (self.device is None or self.tokens is None):
            raise ValueError("--max-latency needs --device and --tokens: a latency is of both")
        if (
            self.objective == "mxmoe"
            and self.r < 1
            and (self.device is None or self.tokens is None)
        ):
            raise ValueError("--objective mxmoe with r < 1 needs --device and --tokens for T")
        if (self.device is None) != (self.tokens is None):
            raise ValueError("--device and --tokens go together: a latency is of both")
        self._check_engine()
        self.forced_scheme()

    def forced_scheme(self) -> Scheme | None:
        """The scheme of a forced uniform plan, None where the plan is solved for."""
        if self.plan is None:
            return None
        kind, _, scheme = self.plan.partition(":")
        if kind != "uniform" or not scheme:
            raise ValueError(f"--plan {self.plan!r} is not of the form uniform:SCHEME")
        return Scheme.parse(scheme)

    def _check_ranges(self) -> None:
        if self.bits is not None and not 0 < self.bits <= 16:
            raise ValueError(f"--bits {self.bits:g} is not between 0 and 16 bits per weight")
        if self.floor_bits is not None and not 0 <= self.floor_bits <= 16:
            raise ValueError(f"--floor-bits {self.floor_bits:g} is not between 0 and 16 bits")
        for name, number in self._counts().items():
            if number is not None and number <= 0:
                raise ValueError(f"--{name} is {number:g}; it must be above 0")
        if not 0 <= self.r <= 1:
            raise ValueError(f"--r {self.r:g} is not between 0 and 1")

    def _check_engine(self) -> None:
        if self.engine is not None:
            check_engine(self.engine)
            check_tensor_parallel(self.engine, self.tensor_parallel)
        elif self.tensor_parallel != 1:
            raise ValueError("--tp needs --engine: how weights are split is a rule of an engine")

    def _counts(self) -> Mapping[str, float | None]:
        return {
            "size": self.size_bytes,
            "tokens": self.tokens,
            "max-latency": self.max_latency_us,
        }

    def _budgets(self) -> Mapping[str, object]:
        return {"bits": self.bits, "size": self.size_bytes, "plan": self.plan}


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where the result goes. ``work`` None is ``work`` inside the output folder.

    ``guard`` also packs the uniform plan of the same size and writes the better of the two.
    """

    output: Path
    work: Path | None = None
    overwrite: bool = False
    guard: bool = True

    @property
    def work_folder(self) -> Path:
        """The folder of the stages' artifacts."""
        return self.output / "work" if self.work is None else self.work


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What ``mxq tune`` times, and where the profile goes.

    ``schemes`` and ``plans`` empty mean the default ones, ``device`` None the one that the driver
    names, ``output`` None the user's cache.
    """

    schemes: tuple[Scheme, ...] = ()
    plans: tuple[str, ...] = ()
    device: str | None = None
    output: Path | None = None
    replays: int = 20

    def __post_init__(self) -> None:
        """Raise ValueError for a plan that does not exist or too few replays."""
        for name in self.plans:
            check_choice("plan", name, PLANS)
        check_at_least("replays", self.replays, 1)


@dataclass(frozen=True, slots=True)
class ResourceOptions:
    """What a run may take of the machine.

    ``memory_bytes`` is the most that kept activations take in memory; the rest goes to files in
    the work folder. ``force`` starts even where memory or disk look too small. ``compute`` is
    where it computes: "auto", "cpu", "cuda" or "cuda:N".
    """

    memory_bytes: int = 8 * 2**30
    force: bool = False
    compute: str = "auto"

    def __post_init__(self) -> None:
        """Raise ValueError for a negative limit or a device that is not spelled so."""
        check_at_least("memory", self.memory_bytes, 0)
        check_compute(self.compute)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Everything that ``mxq quantize`` takes."""

    model: ModelOptions
    allocate: AllocateOptions
    output: OutputOptions
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    resources: ResourceOptions = field(default_factory=ResourceOptions)


def of_effort(effort: str, quantizer: str | None, target: str | None) -> tuple[str, str]:
    """Quantizer and target: those that are named, the effort's where none is.

    Raises:
        ValueError: If there is no such effort.
    """
    check_choice("effort", effort, tuple(EFFORTS))
    usual_quantizer, usual_target = EFFORTS[effort]
    return quantizer or usual_quantizer, target or usual_target


def parse_size(text: str) -> int:
    """Bytes of a size like ``5.2GiB``.

    Raises:
        ValueError: If it is not a number with a unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"size {text!r} is not a number with a unit, e.g. 5.2GiB or 900MB")
    try:
        return int(float(match[1]) * _UNITS[match[2]])
    except ValueError as error:
        raise ValueError(f"size {text!r} does not start with a number") from error


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Output and input features of products like ``2816x2048,2048x1408``.

    Raises:
        ValueError: If it is not a list of two numbers each.
    """
    shapes = []
    for part in text.split(","):
        match = _SHAPE.fullmatch(part)
        if match is None:
            raise ValueError(f"shape {part!r} is not of the form OUTPUTSxINPUTS, e.g. 2816x2048")
        shapes.append((int(match[1]), int(match[2])))
    return tuple(shapes)


def parse_menu(text: str) -> tuple[tuple[Scheme, ...], dict[str, tuple[Scheme, ...]]]:
    """Candidates of all blocks, and those of some projections: ``w3...,w4...;down=w4...,w8...``.

    Raises:
        ValueError: If a spelling is wrong, or a projection is named twice.
    """
    schemes: tuple[Scheme, ...] = ()
    by_projection: dict[str, tuple[Scheme, ...]] = {}
    for part in text.split(";"):
        name, equals, listed = (piece.strip() for piece in part.rpartition("="))
        taken = name in by_projection if equals else bool(schemes)
        if taken or (equals and not name):
            where = f"the projection {name!r}" if name else "no projection, or all others,"
            raise ValueError(
                f"schemes {text!r}: {where} is listed twice or has no name; write lists like "
                "'w3a16_g128_asym,w4a16_g128_asym;down=w4a16_g128_asym,w8a16_g128_asym'"
            )
        if equals:
            by_projection[name] = parse_schemes(listed)
        else:
            schemes = parse_schemes(listed)
    return schemes, by_projection


def spell_menu(schemes: Sequence[Scheme], by_projection: Mapping[str, Sequence[Scheme]]) -> str:
    """Inverse of ``parse_menu``; empty if nothing is listed."""
    lists = {"": schemes, **by_projection}
    parts = [
        (f"{name}=" if name else "") + ",".join(str(scheme) for scheme in listed)
        for name, listed in lists.items()
        if listed
    ]
    return ";".join(parts)


def default_schemes(widths: set[int]) -> tuple[Scheme, ...]:
    """Weight-only candidates from 2 to 8 bits for blocks with those numbers of input features.

    Groups of 128, or the largest that divides every width, and at 2 to 4 bits whole rows beside
    them: a row's one scale saves bytes that buy more elsewhere.
    """
    group = next((str(g) for g in (128, 64, 32) if all(k % g == 0 for k in widths)), "row")
    names = [f"w{bits}a16_g{group}_asym" for bits in (2, 3, 4, 5, 6, 8)]
    if any(str(width) != group for width in widths):
        names += [f"w{bits}a16_grow_asym" for bits in (2, 3, 4)]
    return parse_schemes(names)


def check_choice(name: str, value: str, menu: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is on the menu."""
    if value not in menu:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(menu)}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError if the value is too small."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")

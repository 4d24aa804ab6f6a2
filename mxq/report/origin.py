"""What a checkpoint was made from, and the command that makes it again.

``mxq_origin.json`` in the output folder holds what the files beside it do not tell: the options,
the size of the original, and what stayed in its type.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mxq.config import (
    OWN,
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    spell_menu,
)
from mxq.models.adapter import ModelAdapter
from mxq.models.skeleton import auto_class
from mxq.workspace import RunSettings

OWN_PARTS = {OWN, "own data"}
"""Names that stand for data or functions of a Python caller: no command has them."""

UNTOLD = "No command makes it again: it was made from Python, or its options are not known."


@dataclass(frozen=True, slots=True)
class Origin:
    """The options of a run, and what it found of the original model.

    ``allocate`` is None where the options of the plan are not known. ``hub_id`` is the model's name
    on the hub, None for a folder. ``auto_class`` loads the checkpoint. ``original_bytes`` are those
    of all tensors of the original, ``kept`` counts tensors by the reason why they stayed.
    """

    model: ModelOptions
    calibration: CalibrationOptions
    measure: MeasureOptions
    allocate: AllocateOptions | None
    guard: bool
    hub_id: str | None
    auto_class: str
    original_bytes: int
    kept: Mapping[str, int]

    @property
    def name(self) -> str:
        """The model's name without the folders that lead to it."""
        return self.hub_id or Path(self.model.model).name or self.model.model


def make_origin(
    adapter: ModelAdapter, settings: RunSettings, allocate: AllocateOptions | None, *, guard: bool
) -> Origin:
    """The origin of what a run writes that packs this model with those options."""
    model = settings.model.model
    if allocate is not None:
        solver = OWN if callable(allocate.solver) else allocate.solver
        allocate = replace(allocate, profiles=None, solver=solver)
    is_folder = model == "demo" or Path(model).expanduser().exists()
    return Origin(
        model=settings.model,
        calibration=settings.calibration,
        measure=settings.measure,
        allocate=allocate,
        guard=guard,
        hub_id=None if is_folder else model,
        auto_class=auto_class(adapter.source.model.config).__name__,
        original_bytes=adapter.source.stored_bytes(),
        kept=dict(sorted(Counter(adapter.coverage.kept.values()).items())),
    )


def command(origin: Origin) -> str | None:
    """The command that makes the checkpoint again, quoted for a shell; None if there is none.

    ``--output`` is the word OUT. Options that change no byte (folders, memory) are left out, and
    so are those that have their default.
    """
    if origin.allocate is None:
        return None
    metric, quantizer = origin.measure.sensitivity, origin.measure.quantizer
    if {origin.calibration.spec, metric, quantizer, origin.allocate.solver} & OWN_PARTS:
        return None
    words = ["mxq", "quantize", origin.model.model]
    for name, value in _options(origin, origin.allocate):
        words += _spelled(name, value)
    return shlex.join([*words, "--output", "OUT"])


def _spelled(name: str, value: str | None) -> list[str]:
    if value is None:
        return [name]
    # A value that starts with a dash would be read as an option of its own.
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def _options(origin: Origin, allocate: AllocateOptions) -> Iterator[tuple[str, str | None]]:
    """Option and value of all that differs from its default, without a value for a switch."""
    rules = (
        "plan",
        "engine",
        "granularity",
        "floor_bits",
        "objective",
        "r",
        "solver",
        "device",
        "tokens",
        "pin",
    )
    if allocate.bits is not None:
        yield "--bits", _text(allocate.bits)
    yield from _changed(allocate, AllocateOptions(bits=16), rules)
    if allocate.tensor_parallel != 1:
        yield "--tp", _text(allocate.tensor_parallel)
    if allocate.size_bytes is not None:
        yield "--size", f"{allocate.size_bytes}B"
    if allocate.tie_gate_up:
        yield "--tie-gate-up", None
    if allocate.max_latency_us is not None:
        yield "--max-latency", _text(_milliseconds(allocate.max_latency_us))
    # A forced plan is measured under its one scheme, whatever else was offered.
    menu = spell_menu(origin.measure.schemes, origin.measure.by_projection)
    if menu and allocate.plan is None:
        yield "--schemes", menu
    yield from _changed(
        origin.measure, MeasureOptions(), ("sensitivity", "quantizer", "rotation", "target")
    )
    yield "--calibration", origin.calibration.spec  # its default depends on the model
    counts = ("samples", "seqlen", "seed", "expert_floor")
    yield from _changed(origin.calibration, CalibrationOptions(), counts)
    yield from _changed(origin.model, ModelOptions(""), ("scope", "revision"))
    yield from (("--keep", pattern) for pattern in origin.model.keep)
    if not origin.guard:
        yield "--no-guard", None


def _changed(
    asked: object, default: object, names: Sequence[str]
) -> Iterator[tuple[str, str | None]]:
    for name in names:
        value = getattr(asked, name)
        if value != getattr(default, name):
            yield _dashed(name), _text(value)


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: float | str) -> str:
    """The shortest text that is read back as the same number; a text as it is."""
    if isinstance(value, float) and value != int(value):
        return repr(value)
    return value if isinstance(value, str) else str(int(value))


def _milliseconds(microseconds: float) -> float:
    """The number of which 1000 times is that many microseconds, to the last bit."""
    near = microseconds / 1000
    found = (near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((value for value in found if 1000 * value == microseconds), near)

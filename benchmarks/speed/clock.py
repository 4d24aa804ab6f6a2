"""A clock inside mxq: every second of a run goes to exactly one stage and one part of it.

Functions of mxq are replaced by wrappers that read two clocks on entry and exit, so a run has some
ten thousand readings of a microsecond each instead of a profiler's millions. The innermost wrapped
function that is running takes the time, so shares add up to the whole by construction.
"""

import functools
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

REST = "other"
"""Stage or part of the time that no named function took."""

STAGES: Mapping[str, str | Callable[..., str]] = {
    "mxq.pipeline:open_adapter": "open",
    "mxq.pipeline:run_profile": "profile",
    "mxq.pipeline:run_measure": "measure",
    "mxq.pipeline:run_allocate": "allocate",
    "mxq.checkpoint.pack:pack": lambda *args, **_: f"pack {args[3].name.removeprefix('packed-')}",
    "mxq.heldout:measure_loss": "measured loss",
    "mxq.publish:publish": "publish",
}
"""Stage by function; a callable makes the name of the arguments."""

PARTS: Mapping[str, str] = {
    "mxq.models.source:ModelSource.load_layer": "load weights",
    "mxq.models.source:ModelSource.free_layer": "load weights",
    "mxq.models.source:file_digest": "digests",
    "mxq.models.lockstep:_Runner.advance": "forward",
    "mxq.models.lockstep:LayerCall.run": "forward",
    "mxq.models.sweep:_backward_layer": "backward",
    "mxq.models.sweep:_loss_gradient": "backward",
    "mxq.models.probes:Captures.join": "inputs of blocks",
    "mxq.models.probes:expert_inputs": "inputs of blocks",
    "mxq.models.probes:ExpertInputs.probe": "inputs of blocks",
    "mxq.models.probes:ExpertInputs.probes": "inputs of blocks",
    "mxq.models.probes:linear_probe": "inputs of blocks",
    "mxq.models.probes:ExpertInputs.inner_of": "inputs of blocks",
    "mxq.models.probes:SiteInputs.rows": "inputs of blocks",
    "mxq.checkpoint.pack:_observe": "pass of the original",
    "mxq.quantizers.target:regress": "target: regression",
    "mxq.quantizers.target:trusted_share": "target: regression",
    "mxq.quantizers.moments:second_moments": "Hessians",
    "mxq.quantizers.choose:make_inputs": "Hessians",
    "mxq.quantizers.choose:make_batch": "Hessians",
    "mxq.numerics:rotate": "rotation",
    "mxq.numerics:search_grid": "quantizer: clip search",
    "mxq.quantizers.gptq:_inverse_factor": "quantizer: Cholesky factors",
    "mxq.quantizers.gptq:gptq_on_grid": "quantizer: GPTQ columns",
    "mxq.quantizers.refine:refine": "quantizer: refinement",
    "mxq.quantizers.kronecker:refine_kronecker": "quantizer: refinement by gradients",
    "mxq.profiling.gradients:curvature_of": "moments of gradients",
    "mxq.checkpoint.outer:outer_of_experts": "moments of gradients",
    "mxq.quantizers.rtn:rtn_on_grid": "quantizer: round to nearest",
    "mxq.quantizers.choose:_pick": "quantizer: choice of the better",
    "mxq.profiling.losses:_losses_of": "sensitivity",
    "mxq.models.adapter:ModelAdapter.install": "install",
    "mxq.checkpoint.writer:CheckpointWriter.add": "write",
}
"""Part by function; a function of the same part inside another changes nothing."""

WHOLE = frozenset({"pass of the original"})
"""Parts that keep the time of the parts inside them: a second forward is no part of the first."""


@dataclass(slots=True)
class Clock:
    """Seconds by (stage, part): of the clock on the wall, and of all threads' processors.

    Only one thread of mxq runs at a time (its others are coroutines), so one stack is enough.
    """

    wall_s: dict[tuple[str, str], float] = field(default_factory=dict)
    processor_s: dict[tuple[str, str], float] = field(default_factory=dict)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    _stack: list[tuple[str, str]] = field(default_factory=lambda: [(REST, REST)])
    _last: tuple[float, float] = field(
        default_factory=lambda: (time.perf_counter(), time.process_time())
    )

    def enter(self, stage: str | None, part: str) -> None:
        """A stage or, with None, a part of the present one begins."""
        self._charge()
        present, outer = self._stack[-1]
        place = (present, outer if outer in WHOLE else part) if stage is None else (stage, part)
        self._stack.append(place)
        self.calls[place] = self.calls.get(place, 0) + 1

    def leave(self) -> None:
        """What began last ends."""
        self._charge()
        self._stack.pop()

    def rows(self) -> list[dict[str, Any]]:
        """One row for each stage and part, in order of appearance; closes the open time."""
        self._charge()
        return [
            {
                "stage": stage,
                "part": part,
                "wall_s": self.wall_s[stage, part],
                "processor_s": self.processor_s[stage, part],
                "calls": self.calls.get((stage, part), 0),
            }
            for stage, part in self.wall_s
        ]

    def _charge(self) -> None:
        now, place = (time.perf_counter(), time.process_time()), self._stack[-1]
        self.wall_s[place] = self.wall_s.get(place, 0.0) + now[0] - self._last[0]
        self.processor_s[place] = self.processor_s.get(place, 0.0) + now[1] - self._last[1]
        self._last = now


def install(clock: Clock) -> None:
    """Wrap the functions of ``STAGES`` and ``PARTS`` wherever mxq holds them.

    Raises:
        ValueError: If mxq no longer has one of them; this file then has to follow.
    """
    for path, stage in STAGES.items():
        _replace(path, lambda function, s=stage: _timed(clock, function, s, REST))
    for path, part in PARTS.items():
        _replace(path, lambda function, p=part: _timed(clock, function, None, p))


def find(path: str) -> tuple[Any, str, Callable[..., Any]]:
    """Owner, name and function of ``module:name`` or ``module:Class.name``.

    Raises:
        ValueError: If there is none.
    """
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for step in classes:
        owner = getattr(owner, step, None)
    function = getattr(owner, last, None)
    if not callable(function):
        raise ValueError(  # noqa: TRY004  (a name that is gone, not a wrong type)
            f"mxq has no {path} now; change benchmarks/speed/clock.py"
        )
    return owner, last, function


def _timed(
    clock: Clock, function: Callable[..., Any], stage: str | Callable[..., str] | None, part: str
) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: object, **kwargs: object) -> object:
        clock.enter(stage(*args, **kwargs) if callable(stage) else stage, part)
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave()

    return timed


def _replace(path: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner, name, function = find(path)
    wrapper = make(function)
    setattr(owner, name, wrapper)
    if isinstance(owner, ModuleType):
        # Others have it by "from module import name", or in a table of choices.
        for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "mxq"]:
            for held in (vars(module), *(v for v in vars(module).values() if type(v) is dict)):
                for key in [key for key, value in held.items() if value is function]:
                    held[key] = wrapper

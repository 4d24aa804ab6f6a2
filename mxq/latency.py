"""Latencies for a user: the cost model of a device, its profile, what it says of plans, and tuning.

Profiles are looked up in one folder, by the GPU's name; the newest one counts, and before it the
one of the Triton version that is installed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from mxq.artifacts import Allocation, KernelTiming, SensitivityTable
from mxq.config import AllocateOptions, TuneOptions
from mxq.kernels.spec import TILE_PLANS
from mxq.kernels.tuning import DEFAULT_SHAPES, Bench, Shape, cuda_bench, time_cases, tuning_cases
from mxq.progress import Report
from mxq.scheme import Scheme, parse_schemes
from mxq.search.cost import CostModel
from mxq.search.device import Device, device_of_gpu, load_device
from mxq.search.figures import CompiledFigures, load_figures
from mxq.search.fit import branch_of, fit_branch, fit_launch, predict_us
from mxq.search.kernel_cost import KernelModel, assumed_constants
from mxq.search.launches import StepTime, kernel_format
from mxq.search.profiles import BranchProfile, DeviceProfile, profile_name
from mxq.storage import load_artifact, save_artifact

TUNED_SCHEMES = (
    "w2a16_g128_asym,w3a16_g128_asym,w4a16_g128_asym,w5a16_g128_asym,w6a16_g128_asym,"
    "w8a16_g128_asym,w2a16_grow_asym,w3a16_grow_asym,w4a16_grow_asym,w4a8_grow_sym,w8a8_grow_sym,"
    "fp8,bf16"
)
"""What ``mxq tune`` times if nothing else is asked for: the default candidates and 8-bit inputs."""

LEAST_WIDTHS = 3
"""Numbers of inputs that a tuning needs to tell a tile's loop from what is outside of it."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """A cost model and what is behind it: compiled figures and a profile, where there are any."""

    cost: CostModel
    figures: CompiledFigures | None
    profile: DeviceProfile | None


def load_pricing(device: str, profiles: Path | None = None) -> Pricing:
    """The cost model for a device name, a device file or a profile.

    A name is looked up among the ``profiles`` too.

    Raises:
        ValueError: If there is no such device, or a file is damaged.
    """
    if device.endswith(".json") and _is_artifact(Path(device)):
        return _of_profile(load_artifact(Path(device), DeviceProfile))
    loaded = load_device(device)
    found = None if profiles is None else find_profile(profiles, loaded.gpu_names)
    if found is not None:
        return _of_profile(found)
    figures = _figures_of(loaded)
    if figures is None:
        return Pricing(CostModel(loaded), None, None)
    source = f"compiled figures ({figures.source}) + device file of {loaded.name}, not measured"
    return Pricing(CostModel(loaded, KernelModel(loaded, figures.branches), source), figures, None)


def find_profile(folder: Path, gpu_names: Sequence[str]) -> DeviceProfile | None:
    """The profile in a folder for one of these GPUs.

    Raises:
        ValueError: If a profile there is damaged or of another version.
    """
    if not folder.is_dir():
        return None
    read = [load_artifact(path, DeviceProfile) for path in sorted(folder.glob("*-triton*.json"))]
    fitting = [profile for profile in read if profile.gpu in gpu_names]
    installed = _installed_triton()
    return max(
        fitting,
        key=lambda profile: (profile.versions["triton"] == installed, profile.date),
        default=None,
    )


def profile_folder(cache_home: str | None) -> Path:
    """Where profiles are kept: ``mxq/profiles`` in the user's cache (``$XDG_CACHE_HOME``)."""
    home = Path(cache_home) if cache_home else Path.home() / ".cache"
    return home / "mxq" / "profiles"


def _is_artifact(path: Path) -> bool:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return False  # load_device says what is wrong with it
    return isinstance(fields, dict) and "kind" in fields


def _of_profile(profile: DeviceProfile) -> Pricing:
    figures = _figures_of(profile.device)
    cost = CostModel(profile.device, profile.kernel_model(figures), profile.describe())
    return Pricing(cost, figures, profile)


def _figures_of(device: Device) -> CompiledFigures | None:
    return None if device.multiprocessor is None else load_figures(device.multiprocessor.arch)


def _installed_triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class MeasuredBranch:
    """A branch's timings against predictions: in the median, and those of its largest case.

    ``predicted_us`` comes from constants fitted to the other timings, ``compiled_us`` from compiled
    figures and the device file alone.
    """

    branch: str
    timing: KernelTiming
    predicted_us: float
    compiled_us: float
    timings: int
    median_error: float
    median_compiled_error: float


def measured_branch(name: str, branch: BranchProfile, device: Device) -> MeasuredBranch:
    """Predicted against measured for one branch of a profile."""
    constants, launch_us = assumed_constants(device), device.launch_us
    compiled = [
        predict_us(timing.case, device, branch.figures, constants, launch_us)
        for timing in branch.timings
    ]
    errors = [
        abs(guess / timing.median_us - 1)
        for guess, timing in zip(compiled, branch.timings, strict=True)
    ]
    largest = max(range(len(compiled)), key=lambda place: branch.timings[place].median_us)
    return MeasuredBranch(
        branch=name,
        timing=branch.timings[largest],
        predicted_us=branch.predicted_us[largest],
        compiled_us=compiled[largest],
        timings=len(branch.timings),
        median_error=median(branch.errors),
        median_compiled_error=median(errors),
    )


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """What is known of the time of plans: by plan name, with what was assumed on the way."""

    source: str
    tokens: int
    additive_us: Mapping[str, float]
    steps: Mapping[str, StepTime]
    measured: tuple[MeasuredBranch, ...]
    notes: tuple[str, ...]


def latency_report(
    table: SensitivityTable, plans: Mapping[str, Allocation], pricing: Pricing, tokens: int
) -> LatencyReport:
    """The time of each plan in one step, and the measurements that stand behind it."""
    steps: dict[str, StepTime] = {}
    used: set[str] = set()
    for name, plan in plans.items():
        schemes = [plan.schemes[block.name] for block in table.blocks]
        counts = {"tokens": tokens, "calibration_tokens": table.calibration_tokens}
        step = pricing.cost.step(table.blocks, schemes, **counts)
        if step is not None:
            steps[name] = step
            used.update(step.branches)
    profile = pricing.profile
    timed = {} if profile is None else profile.branches
    return LatencyReport(
        source=pricing.cost.describe(),
        tokens=tokens,
        additive_us={name: plan.predicted_latency_us or 0.0 for name, plan in plans.items()},
        steps=steps,
        measured=tuple(
            measured_branch(name, timed[name], pricing.cost.device)
            for name in sorted(used)
            if name in timed
        ),
        notes=_notes(pricing, used, {s for plan in plans.values() for s in plan.schemes.values()}),
    )


def _notes(pricing: Pricing, used: set[str], schemes: set[Scheme]) -> tuple[str, ...]:
    """What a reader of the latencies has to know: where they are not those of a kernel."""
    device, kernels = pricing.cost.device, pricing.cost.kernels
    if kernels is None:
        return (
            f"No compiled figures of the kernels for {device.name}: these latencies are its "
            "roofline, bytes and arithmetic without kernels.",
        )
    notes = []
    without_kernel = sorted(scheme for scheme in schemes if kernel_format(scheme) is None)
    if without_kernel:
        notes.append(
            f"No kernel computes {_listed(without_kernel)}: priced as decoded to bf16 in memory "
            "and multiplied as bf16."
        )
    blind = sorted(used - set(kernels.figures))
    if blind:
        notes.append(
            f"No compiled figures of {_listed(blind)}: priced by bytes and matrix rate, without "
            "instructions."
        )
    untimed = sorted(used - set(kernels.constants))
    if kernels.constants and untimed:
        notes.append(
            f"Not timed: {_listed(untimed)}; the device file's assumed constants count for them."
        )
    return tuple(notes)


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return ", ".join(str(item) for item in items[:6]) + more


@dataclass(frozen=True, slots=True)
class TuneResult:
    """A profile, where it was written, and its branches against the measurements."""

    path: Path
    profile: DeviceProfile
    measured: tuple[MeasuredBranch, ...]


def run_tune(
    options: TuneOptions,
    *,
    bench: Bench | None = None,
    shapes: Sequence[Shape] = (),
    report: Report | None = None,
) -> TuneResult:
    """Time the kernels of this machine's GPU, fit the constants of their tile times and save both.

    ``bench`` replaces the GPU, ``shapes`` the default products if they are of enough widths, and
    else come beside them.

    Raises:
        RuntimeError: If there is no GPU.
        ValueError: If no device file describes it, or no kernel computes a scheme.
    """
    schemes = options.schemes or parse_schemes(TUNED_SCHEMES)
    plans = [plan for plan in TILE_PLANS if not options.plans or plan.name in options.plans]
    cases = tuning_cases(schemes, _enough(shapes), plans)
    machine = cuda_bench() if bench is None else bench
    device = device_of_gpu(machine.gpu) if options.device is None else load_device(options.device)
    timings = time_cases(cases, machine, replays=options.replays, progress=_tuning_progress(report))
    profile = make_profile(timings, machine, device, _figures_of(device))
    folder = profile_folder(None) if options.output is None else options.output
    path = folder / profile_name(machine.gpu, machine.versions["triton"])
    save_artifact(path, profile)
    measured = [measured_branch(name, branch, device) for name, branch in profile.branches.items()]
    return TuneResult(path, profile, tuple(measured))


def _enough(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes, with the default ones where theirs are too few to tell constants apart."""
    widths = {in_features for _, in_features in shapes}
    more = () if len(widths) >= LEAST_WIDTHS else DEFAULT_SHAPES
    return tuple(dict.fromkeys((*shapes, *more)))


def make_profile(
    timings: Sequence[KernelTiming],
    bench: Bench,
    device: Device,
    figures: CompiledFigures | None,
) -> DeviceProfile:
    """The profile that explains these timings.

    Raises:
        ValueError: If a branch has too few timings, or no constants explain them.
    """
    launch_us = fit_launch(timings, device)
    by_branch: dict[str, list[KernelTiming]] = {}
    for timing in timings:
        if timing.case.tokens > 0:
            by_branch.setdefault(branch_of(timing.case), []).append(timing)
    known = {} if figures is None else figures.branches
    return DeviceProfile(
        gpu=bench.gpu,
        device=device,
        launch_us=launch_us,
        branches={
            name: fit_branch(of_branch, device, known.get(name), launch_us)
            for name, of_branch in by_branch.items()
        },
        date=datetime.now(UTC).date().isoformat(),
        clocks_mhz=dict(bench.clocks_mhz()),
        versions=dict(bench.versions),
    )


def _tuning_progress(report: Report | None) -> Callable[[str, int, int], None] | None:
    if report is None:
        return None
    return lambda step, done, total: report("tune", step, done, total)


def latency_of(
    table: SensitivityTable, plans: Mapping[str, Allocation], options: AllocateOptions
) -> LatencyReport | None:
    """What is known of the time of these plans; None if no device was named."""
    if options.device is None or options.tokens is None:
        return None
    pricing = load_pricing(options.device, options.profiles)
    return latency_report(table, plans, pricing, options.tokens)

"""The command line: options in, the pipeline, tables out. No logic of its own."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mxq import latency, latency_tables, pipeline, tables
from mxq.cli_checkpoint import commands
from mxq.cli_options import (
    LATENCY,
    Bits,
    Calibration,
    Compute,
    Device,
    Effort,
    Engine,
    Floor,
    FloorBits,
    Force,
    Granularity,
    Guard,
    Keep,
    MaxLatency,
    Memory,
    Model,
    Objective,
    Output,
    Overwrite,
    Pin,
    Plan,
    Quantizer,
    R,
    Revision,
    Rotation,
    Samples,
    Schemes,
    Scope,
    Seed,
    Sensitivity,
    Seqlen,
    Size,
    Solver,
    Target,
    TensorParallel,
    TieGateUp,
    Tokens,
    TuneDevice,
    TuneOutput,
    TunePlans,
    TuneReplays,
    TuneSchemes,
    TuneShapes,
    TuneSource,
    Work,
    WorkOption,
)
from mxq.cli_runs import guarded, profiles_folder, shared
from mxq.config import (
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    QuantizeOptions,
    ResourceOptions,
    TuneOptions,
    of_effort,
    parse_menu,
    parse_shapes,
    parse_size,
)
from mxq.distributed import Team
from mxq.profile_stage import run_profile
from mxq.progress import Report, progress_display
from mxq.resources import Announce, check_measure, check_pack, check_profile
from mxq.scheme import Scheme, parse_schemes
from mxq.workspace import Workspace, open_workspace

app = typer.Typer(
    help="Mixed-precision quantization of Mixture-of-Experts and dense language models.\n\n"
    "A block is one weight matrix, a scheme its number format; a plan gives every block a scheme.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(commands)

STAGES = "Its stages, one by one"


@app.command()
def quantize(
    model: Model,
    output: Output,
    bits: Bits = None,
    size: Size = None,
    plan: Plan = None,
    scope: Scope = "auto",
    keep: Keep = None,
    revision: Revision = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    expert_floor: Floor = 64,
    schemes: Schemes = None,
    sensitivity: Sensitivity = "fisher",
    effort: Effort = "balanced",
    quantizer: Quantizer = None,
    target: Target = None,
    rotation: Rotation = "auto",
    granularity: Granularity = "block",
    tie_gate_up: TieGateUp = False,
    floor_bits: FloorBits = None,
    objective: Objective = "loss",
    r: R = 0.75,
    solver: Solver = "pulp",
    device: Device = None,
    tokens: Tokens = None,
    max_latency: MaxLatency = None,
    engine: Engine = None,
    tp: TensorParallel = 1,
    pin: Pin = "auto",
    work: WorkOption = None,
    overwrite: Overwrite = False,
    guard: Guard = True,
    memory: Memory = "8GiB",
    force: Force = False,
    compute: Compute = "auto",
) -> None:
    """Quantize a model to a budget, and measure the result on held-out text.

    Runs profile, measure, allocate and pack. Give one of --bits, --size and --plan.
    """

    def run(team: Team) -> None:
        options = QuantizeOptions(
            ModelOptions(model, revision, scope, tuple(keep or ())),
            AllocateOptions(
                bits,
                None if size is None else parse_size(size),
                plan,
                granularity,
                tie_gate_up,
                floor_bits,
                objective,
                r,
                solver,
                device,
                tokens,
                None if max_latency is None else 1000 * max_latency,
                profiles_folder(),
                engine,
                tp,
                pin,
            ),
            OutputOptions(output, work, overwrite, guard),
            _calibration(model, calibration, samples, seqlen, seed, expert_floor),
            _measured(schemes, sensitivity, rotation, *of_effort(effort, quantizer, target)),
            ResourceOptions(parse_size(memory), force, compute),
        )
        with _progress(team) as report:
            result = pipeline.run_quantize(
                options, report=report, team=team, announce=tables.show_needs
            )
        if team.leads:
            tables.show_result(result)

    shared(run)


@app.command(rich_help_panel=STAGES)
def profile(
    model: Model,
    work: Annotated[Path, typer.Option("--work", metavar="WORK", help="Folder for the profile.")],
    scope: Scope = "auto",
    keep: Keep = None,
    revision: Revision = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    expert_floor: Floor = 64,
    memory: Memory = "8GiB",
    force: Force = False,
    compute: Compute = "auto",
) -> None:
    """Count which tokens of the calibration text reach which expert."""

    def run(team: Team) -> None:
        options = ModelOptions(model, revision, scope, tuple(keep or ()))
        text = _calibration(model, calibration, samples, seqlen, seed, expert_floor)
        resources = ResourceOptions(parse_size(memory), force, compute)
        space = open_workspace(work, resources, team)
        adapter = pipeline.open_adapter(options, space.device)
        check_profile(adapter, text, resources, work, _announcing(team))
        with space.locked(), _progress(team) as report:
            _, stats = run_profile(space, adapter, options, text, MeasureOptions(), report=report)
        if team.leads:
            tables.show_profile(stats)

    shared(run)


@app.command(rich_help_panel=STAGES)
def measure(
    model: Model,
    work: Annotated[
        Path, typer.Option("--work", metavar="WORK", help="Folder for the table of losses.")
    ],
    scope: Scope = "auto",
    keep: Keep = None,
    revision: Revision = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    expert_floor: Floor = 64,
    schemes: Schemes = None,
    sensitivity: Sensitivity = "fisher",
    effort: Effort = "balanced",
    quantizer: Quantizer = None,
    target: Target = None,
    rotation: Rotation = "auto",
    memory: Memory = "8GiB",
    force: Force = False,
    compute: Compute = "auto",
) -> None:
    """Measure what every block loses under every scheme; profiles first."""

    def run(team: Team) -> None:
        options = ModelOptions(model, revision, scope, tuple(keep or ()))
        text = _calibration(model, calibration, samples, seqlen, seed, expert_floor)
        measured = _measured(schemes, sensitivity, rotation, *of_effort(effort, quantizer, target))
        resources = ResourceOptions(parse_size(memory), force, compute)
        space = open_workspace(work, resources, team)
        adapter = pipeline.open_adapter(options, space.device)
        check_measure(adapter, text, measured, resources, work, _announcing(team))
        with space.locked(), _progress(team) as report:
            tokens, _ = run_profile(space, adapter, options, text, measured, report=report)
            table = pipeline.run_measure(space, adapter, tokens, measured, report=report)
        if team.leads:
            tables.show_sensitivity(table)

    shared(run)


@app.command(rich_help_panel=STAGES)
def allocate(
    work: Work,
    bits: Bits = None,
    size: Size = None,
    plan: Plan = None,
    granularity: Granularity = "block",
    tie_gate_up: TieGateUp = False,
    floor_bits: FloorBits = None,
    objective: Objective = "loss",
    r: R = 0.75,
    solver: Solver = "pulp",
    device: Device = None,
    tokens: Tokens = None,
    max_latency: MaxLatency = None,
    engine: Engine = None,
    tp: TensorParallel = 1,
    pin: Pin = "auto",
) -> None:
    """Plan another budget from what was measured: seconds, no layer of the model is read.

    Give one of --bits, --size and --plan. The plan is kept in the work folder, for pack.
    """

    def run() -> None:
        options = AllocateOptions(
            bits,
            None if size is None else parse_size(size),
            plan,
            granularity,
            tie_gate_up,
            floor_bits,
            objective,
            r,
            solver,
            device,
            tokens,
            None if max_latency is None else 1000 * max_latency,
            profiles_folder(),
            engine,
            tp,
            pin,
        )
        space = Workspace(work)
        plans = pipeline.plan_again(space, options)
        table = space.sensitivity()
        tables.show_plans(plans, table)
        report = latency.latency_of(table, plans, options)
        if report is not None:
            latency_tables.show_latency(report, plans)

    guarded(run)


@app.command(rich_help_panel=LATENCY)
def tune(
    source: TuneSource = None,
    schemes: TuneSchemes = None,
    shapes: TuneShapes = None,
    plans: TunePlans = None,
    device: TuneDevice = None,
    replays: TuneReplays = 20,
    output: TuneOutput = None,
) -> None:
    """Time the kernels on this machine's GPU, for the times that --device predicts."""

    def run() -> None:
        if source is not None and shapes is not None:
            raise ValueError("give a folder with shapes or --shapes, not both")
        options = TuneOptions(
            _schemes(schemes),
            tuple(plans.split(",")) if plans else (),
            device,
            output or profiles_folder(),
            replays,
        )
        wanted = parse_shapes(shapes) if shapes is not None else ()
        if source is not None:
            wanted = pipeline.shapes_of(source)
        with progress_display() as report:
            result = latency.run_tune(options, shapes=wanted, report=report)
        latency_tables.show_tuning(result)

    guarded(run)


@app.command(rich_help_panel=STAGES)
def pack(
    work: Work,
    output: Output,
    overwrite: Overwrite = False,
    memory: Memory = "8GiB",
    force: Force = False,
    compute: Compute = "auto",
) -> None:
    """Write the checkpoint of the plan in a work folder, and measure it on held-out text."""

    def run(team: Team) -> None:
        with _progress(team) as report:
            resources = ResourceOptions(parse_size(memory), force, compute)
            space = open_workspace(work, resources, team)
            target = OutputOptions(output, work, overwrite)
            check = partial(check_pack, resources=resources, announce=_announcing(team))
            result = pipeline.pack_again(space, target, report=report, check=check)
        if team.leads:
            tables.show_result(result)

    shared(run)


def main() -> None:
    """Entry point of the ``mxq`` command."""
    app()


def _announcing(team: Team) -> Announce | None:
    return tables.show_needs if team.leads else None


def _progress(team: Team) -> AbstractContextManager[Report | None]:
    return progress_display() if team.leads else nullcontext()


def _measured(
    schemes: str | None, sensitivity: str, rotation: str, quantizer: str, target: str
) -> MeasureOptions:
    others, by_projection = ((), {}) if schemes is None else parse_menu(schemes)
    return MeasureOptions(others, sensitivity, quantizer, rotation, by_projection, target)


def _schemes(text: str | None) -> tuple[Scheme, ...]:
    return () if text is None else parse_schemes(text)


def _calibration(
    model: str, spec: str | None, samples: int, seqlen: int, seed: int, floor: int
) -> CalibrationOptions:
    """Options with the default text: the embedded set for the embedded model, else WikiText-2."""
    default = "demo" if model == "demo" else "wikitext2"
    return CalibrationOptions(spec or default, samples, seqlen, seed, floor)

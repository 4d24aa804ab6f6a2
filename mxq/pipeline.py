"""The five stages in order: profile, measure, price, allocate, pack; then measure what was packed.

``run_quantize`` is the whole of it; the functions below it are its stages and can be called alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mxq.artifacts import Allocation, BlockInfo, Provenance, SensitivityTable
from mxq.blocks import LinearBlock
from mxq.choices import Choices, measure_settings
from mxq.compute import CPU, describe
from mxq.config import (
    AllocateOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    QuantizeOptions,
)
from mxq.curvature_stage import complete, curvature_files, keeper
from mxq.demo import model_path
from mxq.distributed import Team
from mxq.finish import Finish, QuantizeResult, pack_and_choose
from mxq.for_engine import measured_for, notes_for
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.pinning import pins_for, pins_of
from mxq.planning import keep_plans, options_of, plan, run_allocate
from mxq.preflight import check_pinned, check_request, check_writable
from mxq.profile_stage import CalibrationData, run_profile
from mxq.profiling.activation import ActivationStats
from mxq.profiling.losses import LayerLosses, MeasureSettings
from mxq.profiling.measure import Sharing, measure
from mxq.progress import Report, stage
from mxq.publish import check_apart, check_known, check_output, engine_settings, find_record
from mxq.report.card import write_card
from mxq.report.origin import make_origin
from mxq.resources import Announce, check_quantize
from mxq.search.allocate import check_solved_on
from mxq.workspace import (
    CalibrationTokens,
    RunSettings,
    Workspace,
    make_provenance,
    open_workspace,
    share_calibration,
)

CheckPack = Callable[[ModelAdapter, CalibrationTokens, float, Path], None]
"""``(adapter, tokens, bits per weight, work folder)``; raises ValueError where room is lacking."""


def run_quantize(
    options: QuantizeOptions,
    *,
    data: CalibrationData | None = None,
    choices: Choices | None = None,
    report: Report | None = None,
    team: Team | None = None,
    announce: Announce | None = None,
) -> QuantizeResult:
    """Quantize a model and write a checkpoint that ``from_pretrained`` loads.

    ``data`` replaces the calibration named in the options, ``announce`` is told what the run will
    need. A run that was stopped goes on with what is in its work folder, one that has ended
    returns at once.

    Raises:
        ValueError: For anything that the user can mend; nothing is left half-written.
    """
    forced = options.allocate.forced_scheme()
    measured = options.measure
    if forced is not None:
        measured = replace(measured, schemes=(forced,), by_projection={})
    work = open_workspace(options.output.work_folder, options.resources, team)
    if work.team.leads:
        check_output(options.output, may_go_on=choices is None)
    adapter = open_adapter(options.model, work.device)
    measured = measured_for(adapter, options.allocate, measured)
    if work.team.leads:
        _check(adapter, options, measured, choices, announce)
    with work.locked():
        finished = find_record(options.output.output) if choices is None else None
        tokens, profile = run_profile(
            work,
            adapter,
            options.model,
            options.calibration,
            measured,
            data=data,
            report=report,
            kept_for=None if finished is None or options.output.overwrite else options.output,
        )
        check_pinned(
            adapter, options.allocate, measured, choices, pins_for(options.allocate, profile)
        )
        if work.team.leads and choices is None:
            digests = adapter.source.digest(), tokens.digest
            check_known(options.output, model_digest=digests[0], calibration_digest=digests[1])
        table = run_measure(work, adapter, tokens, measured, choices=choices, report=report)
        plans = run_allocate(work, adapter, table, options.allocate)
        if not options.output.guard:
            plans = {"plan": plans["plan"]}
        finish = Finish(work, adapter, tokens, profile, table, measured, options.output, choices)
        return _pack(finish, plans, options.allocate, report, guard=options.output.guard)


def _pack(
    finish: Finish,
    plans: Mapping[str, Allocation],
    asked: AllocateOptions | None,
    report: Report | None,
    *,
    guard: bool,
) -> QuantizeResult:
    """Stage 5, and the model card, with the options that the plans answer if they are known."""
    result = pack_and_choose(finish, plans, report)
    if finish.work.team.leads:
        origin = make_origin(finish.adapter, finish.work.settings(), asked, guard=guard)
        write_card(result.folder, finish.work.folder, origin)
    return result


def _check(
    adapter: ModelAdapter,
    options: QuantizeOptions,
    measured: MeasureOptions,
    choices: Choices | None,
    announce: Announce | None,
) -> None:
    """Raise ValueError for what is wrong or lacking, before anything is computed."""
    check_request(adapter, options.allocate, measured, options.output, choices)
    if choices is None:
        known = _recorded(adapter, measure_settings(adapter, measured, None))
        if options.allocate.bits is not None:
            # The record has them as a plan does: of a limit for all weights.
            weights = sum(block.weights for block in adapter.blocks())
            known["bits"] = options.allocate.bits * weights / weights
        known["target"] = measured.target
        known |= engine_settings(options.allocate.engine, options.allocate.tensor_parallel)
        check_known(options.output, model_digest=adapter.source.digest(), settings=known)
    if find_record(options.output.output) is None or options.output.overwrite:
        notes = notes_for(options.allocate, measured)
        check_quantize(adapter, options, measured, choices, _with_notes(announce, notes))


def _with_notes(announce: Announce | None, notes: tuple[str, ...]) -> Announce | None:
    if announce is None or not notes:
        return announce
    return lambda needs, found: announce(replace(needs, notes=notes), found)


def plan_again(work: Workspace, options: AllocateOptions) -> dict[str, Allocation]:
    """Solve the plan anew from a work folder; only ``--size`` opens the model's headers.

    Raises:
        ValueError: If the folder holds no measurement, or no plan fits.
    """
    table = work.sensitivity()
    if work.path("profile").is_file():
        check_measured_on(work, table)
    adapter = None if options.size_bytes is None else open_adapter(work.settings().model)
    plans = plan(table, options, adapter, pins=pins_of(work, table, options))
    with work.locked():
        keep_plans(work, table, options, plans)
    return plans


def pack_again(
    work: Workspace,
    output: OutputOptions,
    *,
    choices: Choices | None = None,
    report: Report | None = None,
    check: CheckPack | None = None,
) -> QuantizeResult:
    """Pack the plan that a work folder holds, from its own calibration tokens.

    ``check`` is called with what will be packed before the first long step.

    Raises:
        ValueError: If a stage before is missing, or the model has changed since.
    """
    team = work.team
    if team.leads:
        check_output(output, may_go_on=choices is None)
        check_writable(output.output)
    found = team.from_lead(_Planned, lambda: _planned(work))
    adapter = open_adapter(found.settings.model, work.device)
    check_apart(output, adapter.source.folder)
    with work.locked():
        tokens, profile = share_calibration(
            team, lambda: _calibration_of(work, adapter, found.settings, found.table)
        )
        check_solved_on(found.allocation, found.table)
        if check is not None and team.leads:
            check(adapter, tokens, found.allocation.bits_per_weight, work.folder)
        measured = found.settings.measure
        finish = Finish(work, adapter, tokens, profile, found.table, measured, output, choices)
        asked = options_of(work, found.allocation) if team.leads else None
        return _pack(finish, {"plan": found.allocation}, asked, report, guard=False)


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a work folder holds once a plan is solved."""

    settings: RunSettings
    table: SensitivityTable
    allocation: Allocation


def _planned(work: Workspace) -> _Planned:
    return _Planned(work.settings(), work.sensitivity(), work.allocation())


def _calibration_of(
    work: Workspace, adapter: ModelAdapter, settings: RunSettings, table: SensitivityTable
) -> tuple[CalibrationTokens, ActivationStats]:
    """The tokens and the profile of a work folder, once they are seen to fit its plan."""
    if adapter.source.digest() != settings.model_digest:
        raise ValueError(
            f"{settings.model.model} is not the model that {work.folder} was measured on; "
            "run mxq measure again"
        )
    tokens, profile = work.tokens(), work.profile()
    check_measured_on(work, table)
    if table.provenance.settings["quantizer"] != settings.measure.quantizer:
        raise ValueError(
            f"the plan in {work.folder} was measured with the quantizer "
            f"{table.provenance.settings['quantizer']}, the folder is now set to "
            f"{settings.measure.quantizer}; run mxq measure and mxq allocate again"
        )
    return tokens, profile


def check_measured_on(work: Workspace, table: SensitivityTable) -> None:
    """Raise ValueError if the model or the text of a work folder changed since it was measured."""
    made_from = table.provenance.model_digest, table.provenance.calibration_digest
    if made_from != (work.settings().model_digest, work.tokens().digest):
        raise ValueError(
            f"the losses in {work.folder} were measured on another model or other calibration text "
            "than the folder holds now; give the command that measured them again, or run mxq "
            "measure"
        )


def open_adapter(options: ModelOptions, device: torch.device = CPU) -> ModelAdapter:
    """The model's blocks, to compute on a device, without reading any decoder layer."""
    model = model_location(options.model)
    source = open_source(model, revision=options.revision, device=device)
    return ModelAdapter(source, scope=options.scope, keep=options.keep)


def model_location(model: str) -> str | Path:
    """The embedded model for the word ``demo``, else what was given."""
    return model_path() if model == "demo" else model


def run_measure(
    work: Workspace,
    adapter: ModelAdapter,
    tokens: CalibrationTokens,
    options: MeasureOptions,
    *,
    choices: Choices | None = None,
    report: Report | None = None,
) -> SensitivityTable:
    """Stage 2: the loss of every block under every scheme.

    With callables of the caller's own nothing of another run is taken up: no file tells whether it
    had the same.
    """
    settings, team = measure_settings(adapter, options, choices), work.team
    recorded = _recorded(adapter, settings)
    provenance = team.from_lead(
        Provenance, lambda: make_provenance(adapter.source.digest(), tokens.digest, recorded)
    )
    records = work.records("measure", LayerLosses, provenance)
    gradients = curvature_files(work, adapter, tokens, settings.method)
    table = None
    if choices is None:
        table = team.from_lead(
            _Table, lambda: _Table(work.cached("sensitivity", SensitivityTable, provenance))
        ).table
    if table is None:
        table = measure(
            adapter,
            tokens.batches(adapter.source.device, work.store),
            settings,
            provenance,
            generator=torch.Generator().manual_seed(0),
            keep=keeper(work, gradients),
            progress=stage(report, "measure"),
            sharing=Sharing(team, records if choices is None else None),
        )
        if team.leads:
            work.save("sensitivity", table)
    if team.leads:
        records.clear()  # also those of a run that was killed once the table was saved
    complete(work, adapter, tokens, gradients, report)
    return table


@dataclass(frozen=True, slots=True)
class _Table:
    """The table of an earlier run, if there is one."""

    table: SensitivityTable | None


def _recorded(adapter: ModelAdapter, settings: MeasureSettings) -> dict[str, object]:
    """The settings that a table depends on."""
    offered = {name: [str(s) for s in menu] for name, menu in settings.offered.items()}
    return {
        **({"offered": offered} if offered else {}),
        "schemes": [str(scheme) for scheme in settings.schemes],
        "sensitivity": settings.metric_name,
        "quantizer": settings.method.name,
        "rotation": settings.rotation,
        "scope": adapter.scope,
        "keep": list(adapter.keep),
        "compute": describe(adapter.source.device),
    }


def shapes_of(source: str) -> tuple[tuple[int, int], ...]:
    """Output and input features of the blocks of a work folder or a model, each pair once.

    Raises:
        ValueError: If it is neither.
    """
    work = Workspace(Path(source))
    blocks: Sequence[BlockInfo | LinearBlock]
    if work.path("sensitivity").is_file():
        blocks = work.sensitivity().blocks
    else:
        blocks = open_adapter(ModelOptions(source)).blocks()
    return tuple(sorted({(block.out_features, block.in_features) for block in blocks}))

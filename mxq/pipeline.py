"""The five stages in order: profile, measure, price, allocate, pack; then measure what was packed.

``run_quantize`` is the whole of it; the functions below it are its stages and can be called alone.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mxq.artifacts import Allocation, BlockInfo, SensitivityTable
from mxq.blocks import LinearBlock
from mxq.checkpoint.pack import PackReport, pack
from mxq.checkpoint.size import block_budget
from mxq.choices import Choices, measure_settings
from mxq.config import (
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    QuantizeOptions,
)
from mxq.demo import model_path
from mxq.heldout import MeasuredLoss, measure_loss
from mxq.latency import LatencyReport, latency_report, load_pricing
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.profiling.activation import (
    ActivationStats,
    choose_top_up,
    profile_routing,
    under_floor,
)
from mxq.profiling.draw import draw_calibration
from mxq.profiling.measure import measure
from mxq.progress import Report
from mxq.publish import check_apart, check_output, publish
from mxq.search.allocate import allocate, best_uniform, check_solved_on, next_uniform, uniform
from mxq.workspace import (
    CalibrationTokens,
    RunSettings,
    Workspace,
    make_provenance,
    make_tokens,
    open_workspace,
)

CalibrationData = object
"""A spelling, texts, token ids, or anything else that ``load_calibration`` takes."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a run wrote, and what it found.

    ``losses`` are measured on held-out text, by plan name; ``written`` names the plan whose
    checkpoint is in ``folder``. ``above`` is the smallest uniform plan that the budget leaves
    out, unpacked, for comparison.
    """

    folder: Path
    written: str
    plans: Mapping[str, Allocation]
    packs: Mapping[str, PackReport]
    losses: Mapping[str, MeasuredLoss]
    profile: ActivationStats
    above: Allocation | None
    blocks: tuple[BlockInfo, ...]
    kept: Mapping[str, int]
    unit: str


def run_quantize(
    options: QuantizeOptions,
    *,
    data: CalibrationData | None = None,
    choices: Choices | None = None,
    report: Report | None = None,
) -> QuantizeResult:
    """Quantize a model and write a checkpoint that ``from_pretrained`` loads.

    ``data`` replaces the calibration named in the options.

    Raises:
        ValueError: For anything that the user can mend; nothing is left half-written.
    """
    check_output(options.output)
    adapter = open_adapter(options.model)
    check_apart(options.output, adapter.source.folder)
    forced = options.allocate.forced_scheme()
    measured = options.measure if forced is None else replace(options.measure, schemes=(forced,))
    work = open_workspace(options.output.work_folder, options.resources)
    tokens, profile = run_profile(
        work, adapter, options.model, options.calibration, measured, data=data, report=report
    )
    table = run_measure(work, adapter, tokens, measured, choices=choices, report=report)
    plans = plan(table, options.allocate, adapter)
    work.save("allocation", plans["plan"])
    if not options.output.guard:
        plans = {"plan": plans["plan"]}
    return _pack_and_choose(
        _Finish(work, adapter, tokens, profile, table, measured, options.output, choices),
        plans,
        report,
    )


def plan_again(work: Workspace, options: AllocateOptions) -> dict[str, Allocation]:
    """Solve the plan anew from a work folder; only ``--size`` opens the model's headers.

    Raises:
        ValueError: If the folder holds no measurement, or no plan fits.
    """
    table = work.sensitivity()
    adapter = None if options.size_bytes is None else open_adapter(work.settings().model)
    plans = plan(table, options, adapter)
    work.save("allocation", plans["plan"])
    return plans


def pack_again(
    work: Workspace,
    output: OutputOptions,
    *,
    choices: Choices | None = None,
    report: Report | None = None,
) -> QuantizeResult:
    """Pack the plan that a work folder holds, from its own calibration tokens.

    Raises:
        ValueError: If a stage before is missing, or the model has changed since.
    """
    check_output(output)
    settings, table, allocation = work.settings(), work.sensitivity(), work.allocation()
    adapter = open_adapter(settings.model)
    if adapter.source.digest() != settings.model_digest:
        raise ValueError(
            f"{settings.model.model} is not the model that {work.folder} was measured on; "
            "run mxq measure again"
        )
    check_apart(output, adapter.source.folder)
    tokens, profile = work.tokens(), work.profile()
    made_from = table.provenance.model_digest, table.provenance.calibration_digest
    if made_from != (settings.model_digest, tokens.digest):
        raise ValueError(
            f"the plan in {work.folder} was measured on another model or other calibration text "
            "than the folder holds now; run mxq measure and mxq allocate again"
        )
    if table.provenance.settings["quantizer"] != settings.measure.quantizer:
        raise ValueError(
            f"the plan in {work.folder} was measured with the quantizer "
            f"{table.provenance.settings['quantizer']}, the folder is now set to "
            f"{settings.measure.quantizer}; run mxq measure and mxq allocate again"
        )
    check_solved_on(allocation, table)
    finish = _Finish(work, adapter, tokens, profile, table, settings.measure, output, choices)
    return _pack_and_choose(finish, {"plan": allocation}, report)


@dataclass(frozen=True, slots=True)
class _Finish:
    """Everything that the last stage needs beside the plans."""

    work: Workspace
    adapter: ModelAdapter
    tokens: CalibrationTokens
    profile: ActivationStats
    table: SensitivityTable
    measured: MeasureOptions
    output: OutputOptions
    choices: Choices | None


def _pack_and_choose(
    finish: _Finish, plans: Mapping[str, Allocation], report: Report | None
) -> QuantizeResult:
    """Pack every plan, measure each on held-out text, and publish the best."""
    folders = {name: finish.work.folder / f"packed-{name}" for name in plans}
    try:
        packs = {name: _pack(finish, plan, folders[name], report) for name, plan in plans.items()}
        heldout = finish.tokens.batches().heldout
        tell, store = _stage(report, "measure loss"), finish.work.store
        losses = measure_loss(finish.adapter, heldout, folders, tell, store=store)
        written = min(losses, key=lambda name: losses[name].kl)
        publish(finish.output, folders[written], written, plans, losses)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    return QuantizeResult(
        folder=finish.output.output,
        written=written,
        plans=plans,
        packs=packs,
        losses=losses,
        profile=finish.profile,
        above=next_uniform(finish.table, bits=plans["plan"].asked_bits),
        blocks=finish.table.blocks,
        kept=dict(Counter(finish.adapter.coverage.kept.values())),
        unit=finish.table.unit,
    )


def open_adapter(options: ModelOptions) -> ModelAdapter:
    """The model's blocks, without reading any decoder layer."""
    source = open_source(model_location(options.model), revision=options.revision)
    return ModelAdapter(source, scope=options.scope, keep=options.keep)


def model_location(model: str) -> str | Path:
    """The embedded model for the word ``demo``, else what was given."""
    return model_path() if model == "demo" else model


def run_profile(  # noqa: PLR0913  (what is recorded in the work folder, and the callbacks)
    work: Workspace,
    adapter: ModelAdapter,
    model: ModelOptions,
    calibration: CalibrationOptions,
    measured: MeasureOptions,
    *,
    data: CalibrationData | None = None,
    report: Report | None = None,
) -> tuple[CalibrationTokens, ActivationStats]:
    """Stage 1: calibration tokens, topped up for cold experts, and the activation statistics."""
    report_step = _stage(report, "profile")
    base, spare, heldout = draw_calibration(adapter, calibration, data)
    seen = base.input_ids if spare is None else torch.cat([base.input_ids, spare.input_ids])
    domains = base.domains if spare is None else (*base.domains, *spare.domains)
    digest = adapter.source.digest()
    drawn = make_tokens(seen, heldout.input_ids)
    keep = list(adapter.keep)
    settings = {
        "floor": calibration.expert_floor,
        "scope": adapter.scope,
        "keep": keep,
        "domains": dict(Counter(domains)),
    }
    provenance = make_provenance(digest, drawn.digest, settings)
    work.save("settings", RunSettings(model, calibration, measured, digest))
    cached = work.cached("profile", ActivationStats, provenance)
    if cached is not None and work.has_tokens(cached.tokens_digest):
        return work.tokens(), cached
    batches = make_batches(seen, None, store=work.store)
    sites, routing = profile_routing(adapter, batches, domains, report_step)
    samples = range(len(base.input_ids))
    extra = range(len(base.input_ids), len(seen))
    added = choose_top_up(routing, samples, extra, calibration.expert_floor)
    before = under_floor(routing, samples, calibration.expert_floor)
    cold = under_floor(routing, (*samples, *added), calibration.expert_floor)
    tokens = make_tokens(seen[[*samples, *added]], heldout.input_ids)
    profile = ActivationStats(
        domains=tuple(sorted(set(domains))),
        total_tokens=seen.numel(),
        sites=sites,
        floor=calibration.expert_floor,
        topped_up=tuple(name for name in before if name not in cold),
        cold=cold,
        added_samples=len(added),
        tokens_digest=tokens.digest,
        provenance=provenance,
    )
    work.save_tokens(tokens)
    work.save("profile", profile)
    return tokens, profile


def run_measure(
    work: Workspace,
    adapter: ModelAdapter,
    tokens: CalibrationTokens,
    options: MeasureOptions,
    *,
    choices: Choices | None = None,
    report: Report | None = None,
) -> SensitivityTable:
    """Stage 2: the loss of every block under every scheme."""
    settings = measure_settings(adapter, options, choices)
    recorded = {
        "schemes": [str(scheme) for scheme in settings.schemes],
        "sensitivity": settings.metric_name,
        "quantizer": settings.method.name,
        "rotation": settings.rotation,
        "scope": adapter.scope,
        "keep": list(adapter.keep),
    }
    settings_digest = make_provenance(adapter.source.digest(), tokens.digest, recorded)
    if choices is None:
        cached = work.cached("sensitivity", SensitivityTable, settings_digest)
        if cached is not None:
            return cached
    table = measure(
        adapter,
        tokens.batches(work.store),
        settings,
        settings_digest,
        generator=torch.Generator().manual_seed(0),
        progress=_stage(report, "measure"),
    )
    work.save("sensitivity", table)
    return table


def plan(
    table: SensitivityTable, options: AllocateOptions, adapter: ModelAdapter | None = None
) -> dict[str, Allocation]:
    """Stages 3 and 4: prices and the plan, with the uniform plan of the same size beside it.

    ``adapter`` is needed for a budget of the whole checkpoint only.
    """
    cost = None
    if options.device is not None:
        cost = load_pricing(options.device, options.profiles).cost
    forced = options.forced_scheme()
    if forced is not None:
        return {"plan": uniform(table, forced, cost_model=cost, tokens=options.tokens)}
    limit = None
    if options.size_bytes is not None:
        assert adapter is not None
        limit = block_budget(adapter, options.size_bytes)
    chosen = allocate(
        table,
        bits=options.bits,
        storage_bits=limit,
        granularity=options.granularity,
        tie_gate_up=options.tie_gate_up,
        floor_bits=options.floor_bits,
        cost_model=cost,
        tokens=options.tokens,
        max_latency_us=options.max_latency_us,
        solver=options.solver,
        objective=options.objective,
        r=options.r,
    )
    if options.floor_bits is not None:
        return {"plan": chosen}  # a uniform plan keeps the floor only by chance
    asked = limit if limit is not None else int((options.bits or 0) * chosen.weights)
    beside = best_uniform(
        table,
        storage_bits=asked,
        cost_model=cost,
        tokens=options.tokens,
        max_latency_us=options.max_latency_us,
    )
    return {"plan": chosen} if beside is None else {"plan": chosen, "uniform": beside}


def latency_of(
    table: SensitivityTable, plans: Mapping[str, Allocation], options: AllocateOptions
) -> LatencyReport | None:
    """What is known of the time of these plans; None if no device was named."""
    if options.device is None or options.tokens is None:
        return None
    pricing = load_pricing(options.device, options.profiles)
    return latency_report(table, plans, pricing, options.tokens)


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


def _pack(
    finish: _Finish, allocation: Allocation, folder: Path, report: Report | None
) -> PackReport:
    """Stage 5: quantize on the chosen mix and write the checkpoint into a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = measure_settings(finish.adapter, finish.measured, finish.choices)
    return pack(
        finish.adapter,
        finish.tokens.batches(finish.work.store),
        allocation,
        folder,
        method=settings.method,
        progress=_stage(report, f"pack {folder.name.removeprefix('packed-')}"),
    )


def _stage(report: Report | None, stage: str) -> Callable[[str, int, int], None]:
    def tell(step: str, done: int, total: int) -> None:
        if report is not None:
            report(stage, step, done, total)

    return tell

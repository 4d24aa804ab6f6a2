"""The end of a run: pack the plans, measure each on held-out text, publish the better one.

What is finished of this is in the work folder until the output folder has it all, so a run that
was stopped anywhere goes on; one that has ended finds its result in the output folder.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mxq.artifacts import Allocation, BlockInfo, Provenance, SensitivityTable
from mxq.checkpoint.pack import PackedLayer, PackReport, PackSharing, pack, plan_digest
from mxq.choices import Choices, measure_settings
from mxq.compute import describe
from mxq.config import AllocateOptions, MeasureOptions, OutputOptions
from mxq.curvature_stage import curvature_files, giver
from mxq.for_engine import inside
from mxq.heldout import MeasuredLoss, measure_loss
from mxq.models.adapter import ModelAdapter
from mxq.models.source import file_digest
from mxq.profiling.activation import ActivationStats
from mxq.progress import Report, stage
from mxq.publish import (
    RunRecord,
    UnpackedPlan,
    check_same_run,
    engine_settings,
    files_left,
    publish,
    record_files,
)
from mxq.search.allocate import next_uniform
from mxq.workspace import CalibrationTokens, Workspace, make_provenance


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


@dataclass(frozen=True, slots=True)
class Finish:
    """Everything that the end of a run needs beside the plans.

    ``choices`` are the caller's own callables: no file can tell whether another run had the same,
    so nothing is kept for one that goes on.
    """

    work: Workspace
    adapter: ModelAdapter
    tokens: CalibrationTokens
    profile: ActivationStats
    table: SensitivityTable
    measured: MeasureOptions
    output: OutputOptions
    choices: Choices | None

    @property
    def is_kept(self) -> bool:
        """Whether what is finished can be used by another run."""
        return self.choices is None


@dataclass(frozen=True, slots=True)
class _Losses:
    """Losses of checkpoints that are not published yet."""

    losses: Mapping[str, MeasuredLoss]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class _Finished:
    """The record of a finished run, if there is one."""

    record: RunRecord | None


def pack_and_choose(
    finish: Finish, plans: Mapping[str, Allocation], report: Report | None
) -> QuantizeResult:
    """Pack every plan, measure each on held-out text, and publish the best.

    Raises:
        ValueError: If the output folder holds the result of another run.
    """
    team = finish.work.team
    made_from = _made_from(finish, plans)
    found = team.from_lead(_Finished, lambda: _Finished(_go_on(finish, plans, made_from)))
    record = found.record
    if record is None:
        packs = {name: _pack(finish, name, plan, report) for name, plan in plans.items()}
        record = team.from_lead(
            RunRecord, lambda: _conclude(finish, plans, packs, made_from, report)
        )
    return QuantizeResult(
        folder=finish.output.output,
        written=record.written,
        plans=plans,
        packs=record.packs,
        losses=record.losses,
        profile=finish.profile,
        above=_above(finish.table, plans["plan"]),
        blocks=finish.table.blocks,
        kept=dict(Counter(finish.adapter.coverage.kept.values())),
        unit=finish.table.unit,
    )


def _above(table: SensitivityTable, plan: Allocation) -> Allocation | None:
    """The smallest uniform plan over the budget, of those that the plan's engine takes."""
    asked, tables = plan.asked_bits, [table]
    if plan.engine is not None:
        ranks = plan.tensor_parallel
        options = AllocateOptions(asked, engine=plan.engine, tensor_parallel=ranks)
        found = inside(table, options)
        assert found is not None
        tables = list(found.tables)
    plans = [next_uniform(allowed, bits=asked) for allowed in tables]
    return min(
        (found for found in plans if found is not None),
        key=lambda found: found.bits_per_weight,
        default=None,
    )


def _made_from(finish: Finish, plans: Mapping[str, Allocation]) -> Provenance:
    names = {name: _plan_name(plan) for name, plan in plans.items()}
    first = next(iter(plans.values()))
    asked = first.asked_bits
    return make_provenance(
        finish.table.provenance.model_digest,
        finish.tokens.digest,
        {
            **finish.table.provenance.settings,
            "compute": describe(finish.adapter.source.device),
            "target": finish.measured.target,
            "bits": asked,
            "plans": names,
            **engine_settings(first.engine, first.tensor_parallel),
        },
    )


def _plan_name(plan: Allocation) -> str:
    return f"{plan.bits_per_weight:.4f} bits per weight ({plan_digest(plan)[:16]})"


def _go_on(
    finish: Finish, plans: Mapping[str, Allocation], made_from: Provenance
) -> RunRecord | None:
    """The record of this very run, its files moved where that was left; None if it has to pack."""
    record = check_same_run(finish.output, made_from) if finish.is_kept else None
    if record is None:
        return None
    folder = finish.work.packed(record.written)
    left = files_left(finish.output.output, folder, record)
    if left is None:
        return None
    if left:
        publish(finish.output.output, folder, record, plans, left)
    finish.work.remove_packed()
    return record


def _pack(finish: Finish, name: str, allocation: Allocation, report: Report | None) -> PackReport:
    """Stage 5: quantize on the chosen mix and write the checkpoint into the work folder."""
    settings = measure_settings(finish.adapter, finish.measured, finish.choices)
    work, made_from = finish.work, _made_from(finish, {name: allocation})
    records = work.records(f"packed-{name}-layers", PackedLayer, made_from)
    gradients = curvature_files(work, finish.adapter, finish.tokens, settings.method)
    return pack(
        finish.adapter,
        finish.tokens.batches(finish.adapter.source.device, work.store),
        allocation,
        work.packed(name),
        method=settings.method,
        target=finish.measured.target,
        curvature=giver(work, gradients),
        progress=stage(report, f"pack {name}"),
        sharing=PackSharing(work.team, records if finish.is_kept else None),
    )


def _conclude(
    finish: Finish,
    plans: Mapping[str, Allocation],
    packs: Mapping[str, PackReport],
    made_from: Provenance,
    report: Report | None,
) -> RunRecord:
    """Measure the checkpoints, publish the best, and leave the work folder without them."""
    losses = _measured(finish, plans, made_from, report)
    written = min(losses, key=lambda name: losses[name].kl)
    folder = finish.work.packed(written)
    above = _unpacked(_above(finish.table, plans["plan"]))
    record = RunRecord(written, packs, losses, record_files(folder), made_from, above)
    publish(finish.output.output, folder, record, plans, list(record.files))
    finish.work.remove_packed()
    return record


def _unpacked(plan: Allocation | None) -> UnpackedPlan | None:
    if plan is None:
        return None
    return UnpackedPlan(plan.description, plan.bits_per_weight, plan.predicted_loss)


def _measured(
    finish: Finish,
    plans: Mapping[str, Allocation],
    made_from: Provenance,
    report: Report | None,
) -> Mapping[str, MeasuredLoss]:
    """The loss of every packed plan, from the work folder if the very same files were measured."""
    work = finish.work
    folders = {name: work.packed(name) for name in plans}
    # A config.json holds the digests of its shards.
    configs = {name: file_digest(folder / "config.json") for name, folder in folders.items()}
    settings = {**made_from.settings, "checkpoints": configs}
    provenance = make_provenance(made_from.model_digest, made_from.calibration_digest, settings)
    cached = work.cached("losses", _Losses, provenance) if finish.is_kept else None
    if cached is not None:
        return cached.losses
    heldout = finish.tokens.batches(finish.adapter.source.device).heldout
    tell = stage(report, "measure loss")
    losses = measure_loss(finish.adapter, heldout, folders, tell, store=work.store)
    if finish.is_kept:
        work.save("losses", _Losses(losses, provenance))
    return losses

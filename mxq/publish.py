"""The last step of a run: the chosen checkpoint moves into the output folder, config.json last.

``mxq_run.json`` goes first: it says what the files to come were made from and their digests. A run
that finds it goes on moving, or is finished already; a folder without it, or of another run, is
not touched unless the user allows it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mxq.artifacts import Allocation, Provenance
from mxq.checkpoint.pack import PackReport
from mxq.config import OutputOptions
from mxq.heldout import MeasuredLoss
from mxq.models.source import file_digest
from mxq.records import differences
from mxq.storage import (
    load_artifact,
    move_whole,
    remove_temporaries,
    save_artifact,
    write_atomically,
)

RECORD = "mxq_run.json"
PLAN = "mxq_plan.json"
RESULTS = "mxq_report.json"
ORIGIN = "mxq_origin.json"
CARD = "README.md"
PAGE = "report.html"


@dataclass(frozen=True, slots=True)
class UnpackedPlan:
    """A plan that was predicted and not packed."""

    description: str
    bits_per_weight: float
    predicted_loss: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What an output folder holds, and all that a finished run has found.

    ``files`` are SHA-256 digests by name, config.json last. ``above`` is the smallest uniform plan
    that the budget leaves out, None where there is none or an older mxq did not record it.
    """

    written: str
    packs: Mapping[str, PackReport]
    losses: Mapping[str, MeasuredLoss]
    files: Mapping[str, str]
    provenance: Provenance
    above: UnpackedPlan | None = None


def check_output(options: OutputOptions, *, may_go_on: bool) -> None:
    """Raise ValueError if the output folder holds something that a run would spoil.

    The result of a run passes for one that may go on: whether it is the same run is known once
    there is a plan.
    """
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for --output")
    if options.overwrite or not folder.is_dir():
        return
    if may_go_on and find_record(folder) is not None:
        return
    remove_temporaries(folder)
    taken = sorted(path.name for path in folder.iterdir() if path.name != "work")
    if taken:
        raise ValueError(
            f"{folder} is not empty (it holds {taken[0]}); choose another --output, or allow "
            "--overwrite"
        )


def check_apart(options: OutputOptions, source: Path) -> None:
    """Raise ValueError if the model, the output and the work folder are in each other's way."""
    model, output, work = source.resolve(), options.output.resolve(), options.work_folder.resolve()
    for name, folder in (("--output", output), ("--work", work)):
        if folder == model:
            raise ValueError(f"{name} is {source}, the model's own folder; give another")
        if folder.is_relative_to(model):
            raise ValueError(f"{name} {folder} is inside the model's folder; give another")
    if output.is_relative_to(work):
        raise ValueError(
            f"--output {output} is inside the --work folder or the same; give one outside of it"
        )


def engine_settings(engine: str | None, tensor_parallel: int) -> dict[str, object]:
    """What a run records of the engine that it was for; nothing where there was none."""
    if engine is None:
        return {"engine": None}
    return {"engine": engine, "tensor_parallel": tensor_parallel}


def find_record(folder: Path) -> RunRecord | None:
    """The record of an output folder, None if there is none that is whole."""
    try:
        return load_artifact(folder / RECORD, RunRecord)
    except ValueError:
        return None


def check_known(
    options: OutputOptions,
    *,
    model_digest: str,
    calibration_digest: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> None:
    """Refuse the result of another run early, by what is known before more is computed.

    Raises:
        ValueError: If the output folder is of another run, and --overwrite is not given.
    """
    record = find_record(options.output)
    if record is None:
        return
    old = record.provenance
    known = replace(
        old,
        model_digest=model_digest,
        calibration_digest=calibration_digest or old.calibration_digest,
        settings={**old.settings, **(settings or {})},
    )
    check_same_run(options, known)


def check_same_run(options: OutputOptions, provenance: Provenance) -> RunRecord | None:
    """The record of the output folder if it is of the same run.

    Raises:
        ValueError: If it is of another one, and --overwrite is not given.
    """
    record = find_record(options.output)
    if record is None:
        return None
    changed = differences(record.provenance, provenance)
    if not changed:
        return record
    if not options.overwrite:
        raise ValueError(
            f"{options.output} holds the result of another run, made from {changed}; choose "
            "another --output, or allow --overwrite"
        )
    return None


def files_left(output: Path, folder: Path, record: RunRecord) -> list[str] | None:
    """Files of a record that are yet to be moved from ``folder``; None if one is nowhere."""
    left = [name for name, digest in record.files.items() if not _has(output / name, digest)]
    is_whole = all(_has(folder / name, record.files[name]) for name in left)
    return left if is_whole else None


def record_files(folder: Path) -> dict[str, str]:
    """Digests of the files of a checkpoint, config.json last."""
    paths = sorted(folder.iterdir(), key=lambda path: (path.name == "config.json", path.name))
    return {path.name: file_digest(path) for path in paths if not path.name.startswith(".")}


def publish(
    output: Path,
    folder: Path,
    record: RunRecord,
    plans: Mapping[str, Allocation],
    left: Sequence[str],
) -> None:
    """Move the files that are left into the output folder, config.json last.

    Weights and their index that the folder held before go, and so does what describes them; other
    files stay.
    """
    output.mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)
    if find_record(output) != record:
        for name in (ORIGIN, CARD, PAGE):
            (output / name).unlink(missing_ok=True)
    if left:
        (output / "config.json").unlink(missing_ok=True)
        save_artifact(output / RECORD, record)
        for pattern in ("*.safetensors", "*.safetensors.index.json"):
            for stale in output.glob(pattern):
                if stale.name not in record.files:
                    stale.unlink()
    _write_results(output, record, plans)
    for name in left:
        move_whole(folder / name, output / name)


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _write_results(output: Path, record: RunRecord, plans: Mapping[str, Allocation]) -> None:
    save_artifact(output / PLAN, plans[record.written])
    facts = {
        name: _facts(plans[name], record.losses[name], name == record.written) for name in plans
    }
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    write_atomically(output / RESULTS, text)


def _facts(plan: Allocation, loss: MeasuredLoss, written: bool) -> dict[str, object]:
    return {
        "written": written,
        "description": plan.description,
        "bits_asked": plan.asked_bits,
        "bits_per_weight": plan.bits_per_weight,
        "predicted_loss": plan.predicted_loss,
        "unit": plan.unit,
        **_engine_facts(plan),
        "heldout_tokens": loss.tokens,
        "kl": loss.kl,
        "nll": loss.nll,
        "original_nll": loss.original_nll,
        "top1_agreement": loss.top1_agreement,
    }


def _engine_facts(plan: Allocation) -> dict[str, object]:
    """What the engine's rules cost, where the plan was solved for one."""
    if plan.engine is None:
        return {}
    return {
        "engine": plan.engine,
        "tensor_parallel": plan.tensor_parallel,
        "predicted_loss_without_engine": plan.unrestricted_loss,
        "engine_cost": plan.engine_cost,
    }

"""``mxq export``: a checkpoint in another format, with its card, record and engines' verdicts.

The rules of engines are asked of the folder that was written, as ``mxq check`` asks them.
"""

from dataclasses import dataclass
from pathlib import Path

from mxq.checking import check_export
from mxq.checkpoint.export import EXPORTS, needed_bytes, write_model
from mxq.checkpoint.export.folder import check_destination, check_disk, whole_folder
from mxq.checkpoint.export.packed import PackedCheckpoint, open_checkpoint
from mxq.checkpoint.export.plan import ExportOptions, ExportPlan
from mxq.checkpoint.export.record import RECORD, ExportRecord
from mxq.engines import Verdict
from mxq.models.source import file_digest
from mxq.progress import Report
from mxq.publish import CARD, ORIGIN, PLAN, RESULTS
from mxq.publish import RECORD as RUN
from mxq.report.export_card import export_card, warnings
from mxq.report.facts import Facts, gather
from mxq.report.origin import Origin
from mxq.storage import load_artifact, save_artifact, write_atomically
from mxq.workspace import library_versions


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written, and what the rules of each engine say of it.

    ``verdicts`` are empty for a plain model, which no rule is about.
    """

    folder: Path
    record: ExportRecord
    verdicts: tuple[Verdict, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.record.tensor_bytes

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that is known to go wrong, each in a sentence."""
        return warnings(self.record, self.verdicts)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the checkpoint tells of itself; None where it has no such file."""

    origin: Origin | None
    facts: Facts | None


def run_export(
    folder: Path,
    destination: Path,
    to: str,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    report: Report | None = None,
) -> ExportResult:
    """Write a checkpoint of mxq in another format, a decoder layer at a time.

    Raises:
        ValueError: If the format cannot hold the checkpoint, a file was changed, or the destination
            is not free.
    """
    if to not in EXPORTS:
        raise ValueError(f"--to is {to!r}; choose one of {', '.join(EXPORTS)}")
    check_destination(folder, destination, overwrite=overwrite)
    checkpoint, known = open_checkpoint(folder), _known(folder)
    plan = EXPORTS[to](checkpoint, options)
    check_disk(destination, needed_bytes(checkpoint, plan))
    with whole_folder(destination) as part:
        # Another export may have ended here since.
        check_destination(folder, destination, overwrite=overwrite)
        total = write_model(checkpoint, plan, part, report)
        record = _record(checkpoint, plan, known, to, options, total)
        return ExportResult(destination, record, _explain(part, record, plan, known))


def _known(folder: Path) -> _Known:
    has_facts = all((folder / name).is_file() for name in (PLAN, RUN, RESULTS))
    has_origin = (folder / ORIGIN).is_file()
    return _Known(
        load_artifact(folder / ORIGIN, Origin) if has_origin else None,
        gather(folder) if has_facts else None,
    )


def _record(
    checkpoint: PackedCheckpoint,
    plan: ExportPlan,
    known: _Known,
    to: str,
    options: ExportOptions,
    tensor_bytes: int,
) -> ExportRecord:
    model_type = str(checkpoint.model.config.model_type)
    return ExportRecord(
        name=model_type if known.origin is None else known.origin.name,
        to=to,
        options=options,
        groups=plan.groups,
        notes=plan.notes,
        renamed=plan.renamed,
        tensor_bytes=tensor_bytes,
        source_digest=file_digest(checkpoint.folder / "config.json"),
        mxq=library_versions()["mxq"],
    )


def _explain(
    part: Path, record: ExportRecord, plan: ExportPlan, known: _Known
) -> tuple[Verdict, ...]:
    """Write record, origin and card beside the model; what engines make of it."""
    save_artifact(part / RECORD, record)
    if known.origin is not None:
        save_artifact(part / ORIGIN, known.origin)
    verdicts = () if plan.quantization_config is None else check_export(part)
    card = export_card(record, verdicts, origin=known.origin, facts=known.facts)
    write_atomically(part / CARD, card)
    return verdicts

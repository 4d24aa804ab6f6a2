"""Finished checkpoints in the formats of other tools: one function for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mxq.checkpoint.export.compressed_tensors import plan_compressed_tensors
from mxq.checkpoint.export.dequantized import plan_dequantized
from mxq.checkpoint.export.folder import (
    FolderWriter,
    check_destination,
    check_disk,
    whole_folder,
)
from mxq.checkpoint.export.gptq import plan_gptq
from mxq.checkpoint.export.packed import PackedCheckpoint, open_checkpoint
from mxq.checkpoint.export.plan import Exporter, ExportOptions, ExportPlan, Group
from mxq.progress import Report

EXPORTS: Mapping[str, Exporter] = {
    "compressed-tensors": plan_compressed_tensors,
    "gptq": plan_gptq,
    "dequantized": plan_dequantized,
}


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written: its groups, the bytes of all tensors, and where it is known to go wrong."""

    folder: Path
    to: str
    groups: tuple[Group, ...]
    tensor_bytes: int
    warnings: tuple[str, ...]


def export_checkpoint(
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
    checkpoint = open_checkpoint(folder)
    plan = EXPORTS[to](checkpoint, options)
    check_disk(destination, _needed_bytes(checkpoint, plan))
    total = _write(checkpoint, plan, destination, report)
    return ExportResult(destination, to, plan.groups, total, plan.warnings)


def _needed_bytes(checkpoint: PackedCheckpoint, plan: ExportPlan) -> int:
    blocks = sum(plan.block_bytes(block) for block in checkpoint.blocks.values())
    return blocks + sum(checkpoint.kept.values())


def _write(
    checkpoint: PackedCheckpoint, plan: ExportPlan, destination: Path, report: Report | None
) -> int:
    files = len(checkpoint.plan.files)
    with whole_folder(destination) as part:
        writer = FolderWriter(part, files)
        for number, shard in enumerate(checkpoint.shards()):
            writer.add(number, plan.convert(shard))
            if report is not None:
                report("export", "files", number + 1, files)
        writer.finish(checkpoint.folder, plan.quantization_config)
    return writer.total_bytes

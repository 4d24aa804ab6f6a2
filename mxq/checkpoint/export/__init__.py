"""Finished checkpoints in the formats of other tools: one function for each."""

from collections.abc import Mapping
from pathlib import Path

from mxq.checkpoint.export.compressed_tensors import plan_compressed_tensors
from mxq.checkpoint.export.dequantized import plan_dequantized
from mxq.checkpoint.export.folder import FolderWriter
from mxq.checkpoint.export.gptq import plan_gptq
from mxq.checkpoint.export.packed import PackedCheckpoint
from mxq.checkpoint.export.plan import Exporter, ExportPlan
from mxq.progress import Report

EXPORTS: Mapping[str, Exporter] = {
    "compressed-tensors": plan_compressed_tensors,
    "gptq": plan_gptq,
    "dequantized": plan_dequantized,
}


def needed_bytes(checkpoint: PackedCheckpoint, plan: ExportPlan) -> int:
    """Bytes of all tensors that an export will have."""
    blocks = sum(plan.block_bytes(block) for block in checkpoint.blocks.values())
    return blocks + sum(checkpoint.kept.values())


def write_model(
    checkpoint: PackedCheckpoint, plan: ExportPlan, folder: Path, report: Report | None = None
) -> int:
    """Write weights, configuration and tokenizer, a decoder layer at a time; bytes of all tensors.

    Raises:
        ValueError: If the format cannot hold a weight.
    """
    files = len(checkpoint.plan.files)
    writer = FolderWriter(folder, files)
    for number, shard in enumerate(checkpoint.shards()):
        writer.add(number, plan.convert(shard))
        if report is not None:
            report("export", "files", number + 1, files)
    writer.finish(checkpoint.folder, plan.quantization_config)
    return writer.total_bytes

"""What an export makes of a checkpoint: decided before anything is read or written."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mxq.checkpoint.export.packed import PackedBlock, PackedCheckpoint, Shard


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a format leaves to choose.

    ``dtype`` is the type of dequantized weights, None for bfloat16. ``checkpoint_format`` is
    the version of the gptq layout, None for the oldest that holds the plan.
    """

    dtype: str | None = None
    checkpoint_format: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that are written in one way; ``written_as`` says how, for a reader."""

    scheme: str
    modules: int
    written_as: str


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """How each file is converted, and what is said of the result.

    ``convert`` gives the tensors of a file by the names that they get, ``block_bytes`` the bytes of
    a block there. ``quantization_config`` is None where the result is a plain model.
    ``notes`` are what becomes of weights and inputs in this format, each a sentence; what engines
    make of it is not among them. ``renamed`` are the paths of experts whose weights the original
    stores in one tensor and the export one by one.
    """

    convert: Callable[[Shard], Mapping[str, Tensor]]
    block_bytes: Callable[[PackedBlock], int]
    quantization_config: Mapping[str, Any] | None
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()


def check_quantized(blocks: Iterable[PackedBlock]) -> None:
    """Raise ValueError if there is nothing to say in a quantized format."""
    if all(block.scheme.kind == "bf16" for block in blocks):
        raise ValueError("no weight of this checkpoint is quantized; export --to dequantized")


Exporter = Callable[[PackedCheckpoint, ExportOptions], ExportPlan]
"""Plans an export; ValueError where the format cannot hold the checkpoint."""

"""A checkpoint of mxq read file by file: a decoder layer at a time, and no model is built.

Only the module tree without weights is made. It says which tensors there should be, and how
transformers names and arranges them in the files of the original model.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mxq.checkpoint.format import CheckpointPlan
from mxq.checkpoint.load import check_depth
from mxq.checkpoint.stream import checked_model, read_plan
from mxq.checkpoint.tensors import from_tensors, tensor_shapes
from mxq.models.claims import check_folder
from mxq.models.experts import expert_count, projection_shapes
from mxq.models.files import tensor_lengths
from mxq.models.skeleton import build_skeleton
from mxq.numerics import QuantizedWeight
from mxq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """One weight of a checkpoint.

    ``path`` is the module under which its tensors are stored. ``experts`` is the path of the
    experts that it belongs to, with its number and projection there; None for a plain linear.
    """

    path: str
    scheme: Scheme
    out_features: int
    in_features: int
    is_rotated: bool
    experts: str | None = None
    expert: int = -1
    projection: str = ""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Shard:
    """What one file holds: the tensors of blocks by suffix, and the kept tensors by name."""

    blocks: tuple[PackedBlock, ...]
    tensors: Mapping[str, Mapping[str, Tensor]]
    kept: Mapping[str, Tensor]

    def quantized(self, block: PackedBlock) -> QuantizedWeight:
        """Codes, scales and zeros of a block."""
        return from_tensors(
            self.tensors[block.path], block.scheme, block.out_features, block.in_features
        )


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """A checkpoint whose files have been checked.

    ``model`` is the module tree of the original on the meta device; ``kept`` are the bytes of each
    tensor that is no part of a block's weight.
    """

    folder: Path
    plan: CheckpointPlan
    model: PreTrainedModel
    blocks: Mapping[str, PackedBlock]
    kept: Mapping[str, int]

    def shards(self) -> Iterator[Shard]:
        """The files one after the other."""
        for name in sorted(self.plan.files):
            yield self._read(self.folder / name)

    def _read(self, path: Path) -> Shard:
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        kept = {}
        for key, tensor in load_file(path).items():
            if key in self.kept:
                kept[key] = tensor
            else:
                module, _, suffix = key.rpartition(".")
                tensors[module][suffix] = tensor
        return Shard(tuple(self.blocks[path] for path in tensors), tensors, kept)


def open_checkpoint(folder: Path) -> PackedCheckpoint:
    """A checkpoint with all its files checked against its plan, and no weight in memory.

    Raises:
        ValueError: If the folder is not a checkpoint of mxq, or a file is absent or was changed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give what mxq quantize wrote")
    check_folder(folder)
    config, plan = read_plan(folder)
    check_depth(plan, config)
    checked_model(folder, config, plan, torch.bfloat16)
    model = build_skeleton(config, torch.bfloat16)
    blocks = {block.path: block for block in _blocks(plan, model)}
    weights = {
        f"{block.path}.{suffix}"
        for block in blocks.values()
        for suffix in tensor_shapes(block.scheme, block.out_features, block.in_features)
    }
    kept = {
        key: length
        for name in plan.files
        for key, length in tensor_lengths(folder / name).items()
        if key not in weights
    }
    return PackedCheckpoint(folder, plan, model, blocks, kept)


def _blocks(plan: CheckpointPlan, model: PreTrainedModel) -> Iterator[PackedBlock]:
    for path, scheme in plan.linears.items():
        n, k = model.get_submodule(path).get_parameter("weight").shape
        yield PackedBlock(path, scheme, n, k, _is_rotated(path, scheme, plan))
    for path, table in plan.experts.items():
        shapes = projection_shapes(model.get_submodule(path))
        for expert in range(expert_count(model.get_submodule(path))):
            for projection, (n, k) in shapes.items():
                scheme = table[f"{projection}_proj"][expert]
                yield PackedBlock(
                    f"{path}.{expert}.{projection}_proj",
                    scheme,
                    n,
                    k,
                    _is_rotated(path, scheme, plan),
                    path,
                    expert,
                    projection,
                )


def _is_rotated(path: str, scheme: Scheme, plan: CheckpointPlan) -> bool:
    """Whether the stored weight meets a rotated input; bf16 weights never do."""
    return path in plan.rotated and scheme.kind != "bf16"

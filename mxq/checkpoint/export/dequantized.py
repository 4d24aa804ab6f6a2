"""The plain model: every weight decoded, in the names and the arrangement of the original's files.

Any tool reads it. It is as large as the original.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mxq.checkpoint.export.names import Stored
from mxq.checkpoint.export.packed import PackedBlock, PackedCheckpoint, Shard
from mxq.checkpoint.export.plan import ExportOptions, ExportPlan, Group
from mxq.models.experts import expert_bias, expert_weight
from mxq.numerics import dequantize, unrotate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def plan_dequantized(checkpoint: PackedCheckpoint, options: ExportOptions) -> ExportPlan:
    """Decode every block; a rotation of its inputs is multiplied into the weight.

    Raises:
        ValueError: If an option of another format is given.
    """
    if options.checkpoint_format is not None:
        raise ValueError("--checkpoint-format is a choice of --to gptq; leave it out")
    name = options.dtype or "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    stored = Stored.of(checkpoint.model)

    def convert(shard: Shard) -> Mapping[str, Tensor]:
        return stored.restore(_module_tree(checkpoint, shard, dtype))

    schemes = Counter(block.scheme for block in checkpoint.blocks.values())
    return ExportPlan(
        convert=convert,
        block_bytes=lambda block: block.weights * dtype.itemsize,
        quantization_config=None,
        groups=tuple(Group(str(scheme), schemes[scheme], name) for scheme in sorted(schemes)),
        notes=_notes(checkpoint.blocks.values()),
    )


def decode(shard: Shard, block: PackedBlock, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that acts on a plain input; computed in float32, rounded once."""
    w_NK = dequantize(shard.quantized(block))
    return (unrotate(w_NK) if block.is_rotated else w_NK).to(dtype)


def _module_tree(
    checkpoint: PackedCheckpoint, shard: Shard, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file as the original has them in memory."""
    tensors = dict(shard.kept)
    experts: dict[str, list[PackedBlock]] = defaultdict(list)
    for block in shard.blocks:
        if block.experts is None:
            tensors[f"{block.path}.weight"] = decode(shard, block, dtype)
        else:
            experts[block.experts].append(block)
    for path, blocks in experts.items():
        fused = _fused(checkpoint.model.get_submodule(path), shard, blocks, dtype)
        tensors |= {f"{path}.{name}": tensor for name, tensor in fused.items()}
        for block in blocks:
            tensors.pop(f"{block.path}.bias", None)
    return tensors


def _fused(
    module: nn.Module, shard: Shard, blocks: Iterable[PackedBlock], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The fused parameters of experts, filled with the weights and biases of each."""
    # The flags of the module say where each part goes; its own parameters have no memory.
    filled = copy.copy(module)
    filled._parameters = {}
    for block in blocks:
        w_NK = decode(shard, block, dtype)
        bias_N = shard.kept.get(f"{block.path}.bias")
        if not filled._parameters:
            filled._parameters = _empty(module, dtype, None if bias_N is None else bias_N.dtype)
        expert_weight(filled, block.expert, block.projection).detach().copy_(w_NK)
        target_N = expert_bias(filled, block.expert, block.projection)
        if target_N is not None and bias_N is not None:
            target_N.detach().copy_(bias_N)
    return {name: p.detach() for name, p in filled._parameters.items() if p is not None}


def _empty(
    module: nn.Module, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> dict[str, nn.Parameter | None]:
    """Room for the fused parameters of experts, on the host."""
    made: dict[str, nn.Parameter | None] = {}
    for name, parameter in module.named_parameters(recurse=False):
        is_bias = name.endswith("_bias")
        kind = cast(torch.dtype, bias_dtype) if is_bias else dtype
        made[name] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=False)
    return made


def _notes(blocks: Iterable[PackedBlock]) -> tuple[str, ...]:
    rounding = sorted({str(b.scheme) for b in blocks if b.scheme.a_bits < 16})
    if not rounding:
        return ()
    return (
        f"{', '.join(rounding)} also round the inputs; a plain model does not, so its outputs are "
        "not exactly those of the checkpoint",
    )

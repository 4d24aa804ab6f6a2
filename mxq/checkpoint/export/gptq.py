"""The format of GPTQ, versions 1 and 2, with ``dynamic`` for layers that differ.

``qweight`` int32 [K*bits/32, N] packs codes along the inputs and ``qzeros`` int32 [G, N*bits/32]
zeros along the outputs, lowest bit first, in an unbroken stream (3 bits straddle words); ``scales``
float16 [G, N]; ``g_idx`` int32 [K] is the group of each input. Version 1 stores ``zero - 1``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxq.checkpoint.export.labels import Naming, name_blocks, plain_tensors
from mxq.checkpoint.export.packed import PackedBlock, PackedCheckpoint, Shard
from mxq.checkpoint.export.plan import ExportOptions, ExportPlan, Group, check_quantized
from mxq.checkpoint.export.targets import ANY, Rule
from mxq.engines import fused_linears
from mxq.packing import pack
from mxq.scheme import Scheme

VERSIONS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
MULTIPLE = 32


def plan_gptq(checkpoint: PackedCheckpoint, options: ExportOptions) -> ExportPlan:
    """The scheme of most weights for the whole, the others in ``dynamic``.

    Raises:
        ValueError: If an option of another format is given, or the format cannot hold the model.
    """
    if options.dtype is not None:
        raise ValueError("--dtype is a choice of --to dequantized; leave it out")
    blocks = list(checkpoint.blocks.values())
    check_quantized(blocks)
    _check(blocks)
    naming = name_blocks(checkpoint)
    if naming.unnamed:
        raise ValueError(
            "the original of this model stores all experts of a layer in one tensor "
            f"({naming.unnamed[0]}), for which gptq has no names; export --to compressed-tensors "
            "or --to dequantized"
        )
    version = _version(options.checkpoint_format, blocks)

    def convert(shard: Shard) -> Mapping[str, Tensor]:
        tensors = plain_tensors(naming, shard)
        for block in shard.blocks:
            if block.scheme.kind != "bf16":
                module = naming.modules[block.path]
                parts = _tensors(shard, block, version)
                tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
        return tensors

    counts = Counter(block.scheme for block in blocks)
    return ExportPlan(
        convert=convert,
        block_bytes=_block_bytes,
        quantization_config=_config(naming, blocks, version),
        groups=tuple(Group(str(s), counts[s], _written_as(s, version)) for s in sorted(counts)),
    )


def _check(blocks: Iterable[PackedBlock]) -> None:
    """Raise ValueError if a block has no form in this format."""
    for block in blocks:
        scheme = block.scheme
        if scheme.kind == "bf16":
            continue
        if scheme.kind == "fp8" or scheme.a_bits < 16 or scheme.w_bits not in BITS:
            raise ValueError(
                f"{block.path} is {scheme}, and gptq holds integer weights of 2, 3, 4 or 8 bits "
                "with plain inputs; export --to compressed-tensors, or quantize with --schemes "
                "of these"
            )
        if block.out_features % MULTIPLE or block.in_features % MULTIPLE:
            raise ValueError(
                f"{block.path} has {block.out_features} x {block.in_features} weights, and gptq "
                f"needs multiples of {MULTIPLE}; export --to compressed-tensors"
            )


def _version(wanted: str | None, blocks: Iterable[PackedBlock]) -> str:
    if wanted is not None and wanted not in VERSIONS:
        raise ValueError(f"--checkpoint-format is {wanted!r}; choose one of {', '.join(VERSIONS)}")
    is_symmetric = all(b.scheme.symmetric or b.scheme.kind == "bf16" for b in blocks)
    return wanted or ("gptq" if is_symmetric else "gptq_v2")


def _tensors(shard: Shard, block: PackedBlock, version: str) -> dict[str, Tensor]:
    """The tensors of a weight by suffix."""
    scheme, stored = block.scheme, shard.tensors[block.path]
    zero_GN = _zeros(shard, block)
    if version == "gptq":
        if int(zero_GN.min()) == 0:
            raise ValueError(
                f"{block.path} has a zero point of 0, and version 1 of gptq stores one less; "
                "give --checkpoint-format gptq_v2"
            )
        zero_GN = zero_GN - 1
    group = block.in_features // scheme.groups(block.in_features)
    return {
        # The words of both formats hold the same codes in the same order.
        "qweight": stored["weight_packed"].T,
        "qzeros": pack(zero_GN, scheme.w_bits),
        "scales": stored["weight_scale"].T,
        "g_idx": torch.arange(block.in_features, dtype=torch.int32) // group,
    }


def _zeros(shard: Shard, block: PackedBlock) -> Tensor:
    """Zero points uint8 [G, N]."""
    found = shard.quantized(block).zero_NG
    if found is not None:
        return found.T
    groups = block.scheme.groups(block.in_features)
    middle = 2 ** (block.scheme.w_bits - 1)
    return torch.full((groups, block.out_features), middle, dtype=torch.uint8)


def _block_bytes(block: PackedBlock) -> int:
    n, k, scheme = block.out_features, block.in_features, block.scheme
    if scheme.kind == "bf16":
        return 2 * n * k
    return (n * k * scheme.w_bits + scheme.groups(k) * n * (16 + scheme.w_bits)) // 8 + 4 * k


def _config(naming: Naming, blocks: Iterable[PackedBlock], version: str) -> dict[str, Any]:
    weights: Counter[Scheme] = Counter()
    for block in blocks:
        if block.scheme.kind != "bf16":
            weights[block.scheme] += block.weights
    usual = max(sorted(weights), key=lambda scheme: weights[scheme])
    every = [rule for rules in naming.rules.values() for rule in rules]
    # Readers take the first expression that matches, and some put those of skipped modules first.
    dynamic: dict[str, Any] = {
        f"-:{_regex(rule, every)}": {} for rule in naming.rules.get(None, ())
    }
    for scheme in sorted(weights.keys() - {usual}):
        for rule in naming.rules[scheme]:
            dynamic[f"+:{_regex(rule, every)}"] = _fields(scheme)
    return {
        "quant_method": "gptq",
        **_fields(usual),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _fields(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.w_bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
    }


def _regex(rule: Rule, every: Iterable[Rule]) -> str:
    """The expression of a rule, which also matches what engines make of its modules.

    That are linears held as one, and experts as a whole where all of a layer have the rule.
    """
    leaves = {leaf for other in every if other.parts == rule.parts for leaf in other.leaves}
    is_experts = rule.parts[-1:] == (ANY,) and rule.numbers[-1] is None
    if is_experts and leaves == set(rule.leaves) and len(rule.numbers) > 1:
        return rule.regex_of_parent
    fused = [name for name, parts in fused_linears("gptq").items() if parts <= set(rule.leaves)]
    return replace(rule, leaves=(*rule.leaves, *fused)).regex


def _written_as(scheme: Scheme, version: str) -> str:
    return "bfloat16 (skipped)" if scheme.kind == "bf16" else version

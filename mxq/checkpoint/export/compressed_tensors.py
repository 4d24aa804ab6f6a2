"""The format of compressed-tensors, which vLLM, SGLang and transformers read.

Integer weights are ``pack-quantized``, whose layout mxq's own files have; where inputs are rounded
too, compressed-tensors wants a byte for each (``int-quantized``). fp8 is ``float-quantized``.
Scales become float32: compressed-tensors multiplies in the type of the scale, and in float16 its
products would be rounded once more than mxq's.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mxq.checkpoint.export.labels import Naming, name_blocks, plain_tensors
from mxq.checkpoint.export.packed import PackedBlock, PackedCheckpoint, Shard
from mxq.checkpoint.export.plan import ExportOptions, ExportPlan, Group, check_quantized
from mxq.checkpoint.export.targets import Rule
from mxq.numerics import QuantizedWeight
from mxq.packing import packed_words
from mxq.scheme import Scheme

PACKED, BYTES, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
MIXED = "mixed-precision"


def plan_compressed_tensors(checkpoint: PackedCheckpoint, options: ExportOptions) -> ExportPlan:
    """One group for each scheme; codes stay what they are.

    Raises:
        ValueError: If an option of another format is given, or the format cannot hold the model.
    """
    if options.dtype is not None or options.checkpoint_format is not None:
        raise ValueError("--to compressed-tensors takes no --dtype and no --checkpoint-format")
    blocks = checkpoint.blocks.values()
    check_quantized(blocks)
    naming = name_blocks(checkpoint)

    def convert(shard: Shard) -> Mapping[str, Tensor]:
        tensors = plain_tensors(naming, shard)
        for block in shard.blocks:
            if block.scheme.kind != "bf16":
                module = naming.modules[block.path]
                parts = _tensors(shard, block)
                tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
        return tensors

    counts = Counter(block.scheme for block in blocks)
    return ExportPlan(
        convert=convert,
        block_bytes=_block_bytes,
        quantization_config=_config(naming, blocks),
        groups=tuple(Group(str(s), counts[s], _format(s)) for s in sorted(counts)),
        notes=tuple(_notes(counts)),
        renamed=naming.unnamed,
    )


def _format(scheme: Scheme) -> str:
    if scheme.kind == "bf16":
        return "bfloat16 (ignored)"
    if scheme.kind == "fp8":
        return FLOATS
    return PACKED if scheme.a_bits == 16 else BYTES


def _tensors(shard: Shard, block: PackedBlock) -> dict[str, Tensor]:
    """The tensors of a quantized weight by suffix."""
    stored = dict(shard.tensors[block.path])
    stored["weight_scale"] = stored["weight_scale"].float()
    if block.scheme.kind == "fp8":
        return {"weight": stored["weight_fp8"], "weight_scale": stored["weight_scale"]}
    if block.scheme.a_bits == 16:
        return stored
    return {**_bytes(shard.quantized(block)), "weight_scale": stored["weight_scale"]}


def _bytes(q: QuantizedWeight) -> dict[str, Tensor]:
    """Signed codes and zeros in a byte each: both are less by the middle of the grid."""
    middle = 2 ** (q.scheme.w_bits - 1)
    tensors = {"weight": (q.codes_NK.to(torch.int16) - middle).to(torch.int8)}
    if q.zero_NG is not None:
        tensors["weight_zero_point"] = (q.zero_NG.to(torch.int16) - middle).to(torch.int8)
    return tensors


def _block_bytes(block: PackedBlock) -> int:
    n, k, scheme = block.out_features, block.in_features, block.scheme
    if scheme.kind == "bf16":
        return 2 * n * k
    groups = scheme.groups(k)
    if _format(scheme) != PACKED:
        return n * k + n * groups * (4 if scheme.symmetric else 5)
    zeros = 0 if scheme.symmetric else 4 * packed_words(n, scheme.w_bits) * groups
    return 4 * n * packed_words(k, scheme.w_bits) + 4 * n * groups + zeros + 16


def _config(naming: Naming, blocks: Iterable[PackedBlock]) -> dict[str, Any]:
    """The ``quantization_config``. The group of the experts comes first.

    transformers takes the first group with an expression that names experts for all of them.
    """
    routed = {block.scheme for block in blocks if block.experts is not None}
    schemes = [label for label in naming.rules if label is not None]
    schemes.sort(key=lambda scheme: (scheme not in routed, scheme))
    formats = {_format(scheme) for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _targets(naming.rules.get(None, ())),
        "config_groups": {
            f"group_{place}": {
                "targets": _targets(naming.rules[scheme]),
                "weights": _weights(scheme),
                "input_activations": _inputs(scheme),
                "output_activations": None,
                "format": _format(scheme),
            }
            for place, scheme in enumerate(schemes)
        },
    }


def _targets(rules: Sequence[Rule]) -> list[str]:
    return sorted(rule.name or f"re:{rule.regex}" for rule in rules)


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.w_bits,
        "type": "float" if scheme.kind == "fp8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.a_bits == 16:
        return None
    return {
        **_weights(scheme),
        "num_bits": scheme.a_bits,
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "observer": None,
    }


def _notes(schemes: Collection[Scheme]) -> Iterable[str]:
    narrow = sorted(str(s) for s in schemes if _format(s) == BYTES and s.w_bits < 8)
    if narrow:
        yield f"{', '.join(narrow)}: weights take 8 bits, because the inputs are rounded too"
    if any(scheme.a_bits < 16 for scheme in schemes):
        yield "inputs are rounded by the engine in its own way, which is not quite that of mxq"

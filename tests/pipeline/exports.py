"""Checkpoints with plans that are written out, and what an export of them should hold."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import make_allocation, tensors_of
from oracle import decode
from safetensors.torch import save_file
from tiny import save_tiny, token_ids

from mxq.checkpoint.pack import pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import Method, quantize_rtn
from mxq.scheme import Scheme

PLANS = {
    "uniform": lambda block: "w4a16_g32_sym",
    "layers": lambda block: ("w3a16_g32_asym", "w8a16_grow_sym")[block.layer],
    "dense mix": lambda block: {
        "gate": "w4a16_g32_sym", "up": "w4a16_g32_sym", "down": "w4a16_g32_sym",
        "q_proj": "w5a16_g32_sym", "o_proj": "w3a16_grow_sym", "down_proj": "w8a16_grow_sym",
    }.get(block.projection, "w6a16_g32_sym"),
    "projections": lambda block: {
        "gate": "w2a16_g32_asym", "up": "w5a16_g32_sym", "down": "w6a16_g32_asym",
        "o_proj": "bf16", "up_proj": "w5a16_grow_asym",
    }.get(block.projection, "w4a16_g32_sym"),
    "experts": lambda block: (
        "w6a16_g32_sym"
        if block.expert is None
        else ("w8a16_grow_asym", "w3a16_g32_sym", "bf16", "w4a16_grow_asym")[block.expert]
    ),
    "inputs": lambda block: (
        "fp8" if block.expert is None
        else ("w8a8_grow_sym", "w8a8_g32_asym", "w4a8_g32_asym", "w4a4_grow_sym")[block.expert]
    ),
    "fp8": lambda block: "fp8",
    "wide experts": lambda block: (
        "w4a16_g32_sym" if block.expert is None else "w8a16_grow_sym"
    ),
    "plain": lambda block: "bf16",
    "rows": lambda block: "w4a16_grow_sym",
    "bytes": lambda block: "w8a8_grow_sym",
    "zeros": lambda block: "w4a16_g32_asym",
    "four and eight": lambda block: ("w4a16_g32_sym", "w8a16_grow_sym")[block.layer],
    "widths": lambda block: {
        "gate": "w2a16_g32_asym", "up": "w3a16_grow_asym", "down": "w8a16_g32_sym", "o_proj": "bf16"
    }.get(block.projection, "w3a16_g32_sym"),
}  # fmt: skip
"""Scheme of each block by the name of a plan."""

STORED = {
    "mixtral": [
        (r"\.mlp\.experts\.(\d+)\.gate_proj", r".block_sparse_moe.experts.\1.w1"),
        (r"\.mlp\.experts\.(\d+)\.up_proj", r".block_sparse_moe.experts.\1.w3"),
        (r"\.mlp\.experts\.(\d+)\.down_proj", r".block_sparse_moe.experts.\1.w2"),
    ],
    "nemotron_h": [(r"^model\.", "backbone.")],
}
"""How files of a family name what has another path in the module tree, written out by hand."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A model, its checkpoint and the scheme of each block by its path."""

    family: str
    original: Path
    folder: Path
    schemes: dict[str, Scheme]
    rotated: frozenset[str]

    def weights(self):
        """``{stored module: weight float64}``, decoded without mxq."""
        tensors, _ = tensors_of(self.folder)
        return {
            stored_module(self.family, path): decode(
                tensors, path, scheme, rotated=path in self.rotated
            )
            for path, scheme in self.schemes.items()
        }


def make_packed(
    folder, family, plan, *, scope="all", rotated_layers=(), is_positive=False, **changes
):
    """Pack a tiny model with a plan of ``PLANS``."""
    original = save_tiny(folder / "original", family, **changes)
    if is_positive:
        tensors, _ = tensors_of(original)
        magnitudes = {name: tensor.abs() for name, tensor in tensors.items()}
        save_file(magnitudes, original / "model.safetensors", {"format": "pt"})
    adapter = ModelAdapter(open_source(original), scope=scope)
    schemes = {b.name: Scheme.parse(PLANS[plan](b)) for b in adapter.blocks()}
    allocation = make_allocation(adapter, schemes, rotated_layers=rotated_layers)
    batches = make_batches(token_ids(2, 16, seed=2), token_ids(1, 16, seed=3))
    out = folder / "packed"
    pack(adapter, batches, allocation, out, method=Method("rtn", quantize_rtn))
    paths = {b.module: schemes[b.name] for b in adapter.blocks()}
    rotated = {
        b.module
        for b in adapter.blocks()
        if b.layer in rotated_layers and schemes[b.name].kind != "bf16"
    }
    return Packed(family, original, out, paths, frozenset(rotated))


def stored_module(family, path):
    """The module of a path of the module tree in the files of the original."""
    for pattern, replacement in STORED.get(family, ()):
        path = re.sub(pattern, replacement, path)
    return path


def rules_broken(result, engine):
    """Identifiers of the rules that an export breaks: of errors, and of warnings."""
    (verdict,) = (v for v in result.verdicts if v.rules.engine == engine)
    return {f.rule.id for f in verdict.errors}, {f.rule.id for f in verdict.warnings}


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def expected_tensors(packed):
    """The tensors of the original's files with decoded weights in place, float64 where decoded."""
    tensors, _ = tensors_of(packed.original)
    decoded = {f"{module}.weight": w_NK for module, w_NK in packed.weights().items()}
    assert decoded.keys() <= tensors.keys()
    return {**tensors, **decoded}


def largest_difference(found, expected):
    return float((found.double() - expected.double()).abs().max())


def is_equal(found, expected):
    return found.shape == expected.shape and torch.equal(found.double(), expected.double())

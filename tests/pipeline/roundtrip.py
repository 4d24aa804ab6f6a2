"""One architecture from a tiny random model to its packed checkpoint and back.

The same function is run by the tests and by ``scripts/list_architectures.py``.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import auto_class_of, tiny_model
from checkpoints import make_allocation, random_schemes, tensors_of
from oracle import decode
from tiny import logits_of, token_ids

from mxq.checkpoint.pack import pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import Method, quantize_rtn
from mxq.scheme import parse_schemes

MENU = parse_schemes(
    "w2a16_g32_asym,w3a16_g32_sym,w4a16_grow_asym,w5a16_g32_asym,w8a16_grow_sym,bf16"
)
"""Weights only: what a format does to inputs is the same in every architecture."""


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What happened to one type.

    ``difference`` is the largest between the logits of the loaded checkpoint and of the original
    model with the decoded weights in place, ``effect`` that between the latter and the original.
    """

    quantized: Mapping[str, int]
    kept: Mapping[str, int]
    experts: int
    difference: float
    effect: float
    towers_unchanged: bool


def round_trip(model_type: str, folder: Path) -> RoundTrip:
    """Save, pack with a mix of schemes, load and compare."""
    original, packed = folder / "original", folder / "packed"
    model = tiny_model(model_type)
    model.save_pretrained(original)
    adapter = ModelAdapter(open_source(original), scope="all")
    schemes = random_schemes(adapter, MENU, seed=1)
    plan = make_allocation(adapter, schemes, rotated_layers=(1,))
    pack(adapter, _batches(), plan, packed, method=Method("rtn", quantize_rtn))
    loaded = auto_class_of(model_type).from_pretrained(packed, dtype=torch.float32).eval()
    ids = token_ids(2, 16, seed=5) % 200
    before = logits_of(model, ids)
    tensors, _ = tensors_of(packed)
    towers = _towers_unchanged(model, adapter, tensors)
    for block in adapter.blocks():
        scheme = schemes[block.name]
        rotated = block.layer == 1 and scheme.kind != "bf16"
        w_NK = decode(tensors, block.module, scheme, rotated=rotated)
        weight_view(model, block.module).copy_(w_NK)
    expected = logits_of(model, ids)
    return RoundTrip(
        quantized=Counter(
            "experts" if b.expert is not None else "linears" for b in adapter.blocks()
        ),
        kept=Counter(adapter.coverage.kept.values()),
        experts=len({adapter.site_of(b) for b in adapter.blocks() if b.expert is not None}),
        difference=float((logits_of(loaded, ids) - expected).abs().max()),
        effect=float((expected - before).abs().max()),
        towers_unchanged=towers,
    )


def _batches() -> Any:
    return make_batches(token_ids(3, 12, seed=2) % 200, token_ids(1, 12, seed=3) % 200)


def _towers_unchanged(model: Any, adapter: ModelAdapter, tensors: Mapping[str, Any]) -> bool:
    """Whether the file holds everything outside the decoder layers as the model had it."""
    layers = adapter.source.layers_name + "."
    tied = set(model.all_tied_weights_keys or ())
    outside = {n: t for n, t in model.state_dict().items() if not n.startswith(layers)}
    return all(torch.equal(tensors[n], t) for n, t in outside.items() if n not in tied)


def weight_view(model: Any, path: str) -> torch.Tensor:
    """The weight [N, K] of a module path in a model of transformers, by the experts' flags."""
    parent, _, projection = path.rpartition(".")
    site, _, expert = parent.rpartition(".")
    experts = model.get_submodule(site) if expert.isdigit() else None
    if not hasattr(experts, "is_concatenated"):
        return model.get_parameter(f"{path}.weight").detach()
    fused_in = "gate_up_proj" if experts.has_gate and projection != "down_proj" else projection
    w_NK = getattr(experts, fused_in).detach()[int(expert)]
    w_NK = w_NK.T if experts.is_transposed else w_NK
    if fused_in != "gate_up_proj":
        return w_NK
    is_up = int(projection == "up_proj")
    return w_NK.chunk(2)[is_up] if experts.is_concatenated else w_NK[is_up::2]

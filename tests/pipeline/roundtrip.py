"""One architecture from a tiny random model to its packed checkpoint and back.

The tests and ``scripts/list_architectures.py``, which writes docs/architectures.md, run this code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import AUTO_CLASSES, KEEP, auto_class_of, tiny_model
from checkpoints import make_allocation, random_schemes, tensors_of
from oracle import decode
from tiny import VOCABULARY, logits_of, token_ids

from mxq.api import export
from mxq.blocks import LinearBlock
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

EVERYWHERE = {"vector (norm, bias)", "outside the decoder layers (embedding, head)", "router"}
"""Reasons to keep a parameter that every model has; a row of the page does not repeat them."""


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What happened to one type.

    ``refusal`` is the first line that mxq stops with, None if it does not; all that follows is of a
    type that passes. Counts of blocks are those of ``--scope all``, or of the default where the
    name says so; branches are children of a layer, those whose linears the default takes and those
    whose linears it leaves out.
    ``difference`` is the largest between the logits of the loaded checkpoint and those of the
    original with the decoded weights in place, ``effect`` that between the latter and the untouched
    original. ``outside_unchanged`` says that embeddings, head and the towers for images and sound
    are in the file bit for bit. ``export_difference`` is the largest between a tensor of the plain
    export and what transformers saves of the original with the decoded weights, infinite if names
    or shapes differ.
    """

    model_type: str
    refusal: str | None = None
    experts: int = 0
    experts_by_default: int = 0
    branches_by_default: frozenset[str] = frozenset()
    branches_left_out: frozenset[str] = frozenset()
    linears: int = 0
    layout: str = ""
    kept: tuple[str, ...] = ()
    difference: float = float("nan")
    effect: float = float("nan")
    outside_unchanged: bool = False
    export_difference: float = float("inf")

    @property
    def is_right(self) -> bool:
        """Whether the loaded checkpoint computes what its decoded weights say.

        Both sides are the same float32 operations but for the order of experts and the rotation of
        inputs; a wrong weight, gate or bias moves the logits by far more, as ``effect`` shows.
        """
        is_near = self.difference < 1e-4 < 0.05 < self.effect
        # Float32 products of up to 128 terms undo a rotation, of weights that are about 0.15.
        return is_near and self.outside_unchanged and self.export_difference < 1e-6

    @property
    def row(self) -> str:
        """The line of this type in docs/architectures.md."""
        if self.refusal is not None:
            return f"| {self.model_type} | {self.refusal} |"
        notes = [*self.kept]
        if self.model_type in KEEP:
            notes.append(f"`--scope all` needs `--keep {KEEP[self.model_type]}`")
        loaded_with = ", ".join(n for n, types in AUTO_CLASSES.items() if self.model_type in types)
        return f"| {self.model_type} | {loaded_with} | {self.layout} | {'; '.join(notes) or '-'} |"


def round_trip(model_type: str, folder: Path) -> RoundTrip:
    """Save, pack every linear with a mix of schemes, load and compare."""
    original, packed = folder / "original", folder / "packed"
    model = tiny_model(model_type)
    model.save_pretrained(original)
    keep = (KEEP[model_type],) if model_type in KEEP else ()
    try:
        adapter = ModelAdapter(open_source(original), scope="all", keep=keep)
    except ValueError as error:
        first = " ".join(str(error).split("\n")[:2])
        return RoundTrip(model_type, refusal=" ".join(first.split()))
    by_default = ModelAdapter(adapter.source, keep=keep).blocks()
    schemes = random_schemes(adapter, MENU, seed=1)
    plan = make_allocation(adapter, schemes, rotated_layers=(1,))
    batches = make_batches(_ids(3, seed=2), _ids(1, seed=3))
    pack(adapter, batches, plan, packed, method=Method("rtn", quantize_rtn))
    loaded = auto_class_of(model_type).from_pretrained(packed, dtype=torch.float32).eval()
    tensors, _ = tensors_of(packed)
    unchanged = outside_unchanged(model, adapter, tensors)
    before = logits_of(model, _ids(2, seed=5))
    for block in adapter.blocks():
        scheme = schemes[block.name]
        rotated = block.layer == 1 and scheme.kind != "bf16"
        weight_view(model, block).copy_(decode(tensors, block.module, scheme, rotated=rotated))
    expected = logits_of(model, _ids(2, seed=5))
    model.save_pretrained(folder / "expected")
    export(packed, folder / "plain", to="dequantized", dtype="float32")
    experts = sum(block.expert is not None for block in adapter.blocks())
    return RoundTrip(
        model_type=model_type,
        experts=experts,
        experts_by_default=sum(block.expert is not None for block in by_default),
        branches_by_default=branches(by_default),
        branches_left_out=branches([b for b in adapter.blocks() if b not in by_default]),
        linears=len(adapter.blocks()) - experts,
        layout=layout_of(model),
        kept=tuple(sorted(set(adapter.coverage.kept.values()) - EVERYWHERE)),
        difference=float((logits_of(loaded, _ids(2, seed=5)) - expected).abs().max()),
        effect=float((expected - before).abs().max()),
        outside_unchanged=unchanged,
        export_difference=files_difference(folder / "plain", folder / "expected"),
    )


def files_difference(folder: Path, other: Path) -> float:
    """The largest difference of two models' tensors, infinite if names or shapes differ."""
    found, expected = tensors_of(folder)[0], tensors_of(other)[0]
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in expected.items()}:
        return float("inf")
    return max(float((found[n].double() - expected[n].double()).abs().max()) for n in found)


def branches(blocks: Sequence[LinearBlock]) -> frozenset[str]:
    """The children of decoder layers that linears are in."""
    return frozenset(block.name.split(".")[2] for block in blocks if block.expert is None)


def _ids(samples: int, *, seed: int) -> torch.Tensor:
    """Random token ids, none of them special to any model."""
    return token_ids(samples, 12, seed=seed) % (VOCABULARY - 50)


def outside_unchanged(
    model: torch.nn.Module, adapter: ModelAdapter, tensors: Mapping[str, torch.Tensor]
) -> bool:
    """Whether a file holds everything outside the decoder layers as the model has it."""
    layers = adapter.source.layers_name + "."
    tied = set(adapter.source.model.all_tied_weights_keys or ())
    outside = {n: t for n, t in model.state_dict().items() if not n.startswith(layers)}
    return all(torch.equal(tensors[n], t) for n, t in outside.items() if n not in tied)


def layout_of(model: torch.nn.Module) -> str:
    """How the experts of a model differ from gate over up, stored [out, in], without biases."""
    experts = next((m for m in model.modules() if hasattr(m, "is_concatenated")), None)
    if experts is None:
        return "dense"
    words = {
        "transposed": experts.is_transposed,
        "gate and up interleaved": experts.has_gate and not experts.is_concatenated,
        "biases": experts.has_bias,
        "no gate": not experts.has_gate,
        "norm after each expert": experts.has_post_expert_norm,
        "own gate function": "default" not in type(experts)._apply_gate.__name__,
    }
    return ", ".join(word for word, holds in words.items() if holds) or "-"


def weight_view(model: torch.nn.Module, block: LinearBlock) -> torch.Tensor:
    """The weight [N, K] of a block in a model of transformers, by the flags of its experts."""
    if block.expert is None:
        return model.get_parameter(f"{block.module}.weight").detach()
    site, _, projection = block.module.rpartition(f".{block.expert}.")
    experts = model.get_submodule(site)
    is_fused = experts.has_gate and projection != "down_proj"
    w_NK = experts.get_parameter("gate_up_proj" if is_fused else projection).detach()[block.expert]
    w_NK = w_NK.T if experts.is_transposed else w_NK
    if not is_fused:
        return w_NK
    is_up = int(projection == "up_proj")
    return w_NK.chunk(2)[is_up] if experts.is_concatenated else w_NK[is_up::2]

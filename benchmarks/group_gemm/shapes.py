"""What is timed: models, numbers of tokens, plans of schemes, routings. Nothing here needs a GPU.

``allocations.json`` and ``routing.json`` beside this file come from a real run of ``mxq measure``
and ``mxq allocate`` on a trained model of 16 experts (they say which); ``from_work.py`` wrote them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from mxq.kernels.spec import WeightFormat, format_of
from mxq.scheme import Scheme

FOLDER = Path(__file__).resolve().parent

Routing = Literal["uniform", "zipf", "traced"]


@dataclass(frozen=True, slots=True)
class Model:
    """The routed experts of a model: ``hidden`` H, ``inner`` I, each expert 3 x H x I weights."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def is_small(self) -> bool:
        """Whether the experts of one token are too few bytes to fill a large GPU."""
        return self.hidden * self.inner < 2**23


MODELS = (
    Model("Qwen1.5-MoE", 2048, 1408, 60, 4),
    Model("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Model("Mixtral-8x7B", 4096, 14336, 8, 2),
    Model("Qwen3-30B-A3B", 2048, 768, 128, 8),
)

TINY = Model("tiny", 256, 128, 5, 2)
"""For runs without a GPU."""

TOKENS = (1, 4, 16, 64, 256, 1024, 8192)

UNIFORM = (
    "bf16",
    "w4a16_g128_asym",
    "w8a16_g128_sym",
    "w3a16_g128_asym",
    "w2a16_g128_asym",
    "w8a8_grow_sym",
    "fp8",
    "w4a8_grow_sym",
    "w4a16_grow_asym",
    "w6a16_g128_asym",
    "w5a16_g128_asym",
    "w2a8_grow_sym",
    "w4a8_g128_sym",
)
"""Uniform plans, those that the goals name first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A scheme for each projection of each expert of a model."""

    name: str
    gate: tuple[Scheme, ...]
    up: tuple[Scheme, ...]
    down: tuple[Scheme, ...]

    @property
    def first(self) -> tuple[Scheme, ...]:
        """Schemes of the first product's problems: gate and up of each expert in turn."""
        return tuple(scheme for pair in zip(self.gate, self.up, strict=True) for scheme in pair)

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """All formats of the layer, each once, sorted."""
        return tuple(sorted({format_of(scheme) for scheme in (*self.first, *self.down)}))

    def stored_bits(self, model: Model) -> float:
        """Bits of a weight as a checkpoint stores it."""
        h, i = model.hidden, model.inner
        bits = sum(scheme.storage_bits(i, h) for scheme in self.first)
        bits += sum(scheme.storage_bits(h, i) for scheme in self.down)
        return bits / (3 * model.experts * h * i)


def plan_named(name: str, model: Model) -> Plan:
    """A uniform plan by its scheme, or a mix of ``allocations.json`` by its name."""
    if name not in mixes():
        same = (Scheme.parse(name),) * model.experts
        return Plan(name, same, same, same)
    counts = mixes()[name]
    shuffler = torch.Generator().manual_seed(len(name) + model.experts)
    gate, up, down = (
        _spread(counts[projection], model.experts, shuffler)
        for projection in ("gate", "up", "down")
    )
    return Plan(name, gate, up, down)


@lru_cache(maxsize=1)
def mixes() -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """``name -> projection -> scheme -> experts`` of one layer of each allocation.

    A launch sees one layer, so the layer is taken whose bits are nearest to those of the plan.
    """
    found = {}
    for name, mix in _data("allocations.json")["mixes"].items():
        distances = [abs(_layer_bits(layer) - mix["bits"]) for layer in mix["layers"]]
        found[name] = mix["layers"][distances.index(min(distances))]
    return found


def _layer_bits(layer: Mapping[str, Mapping[str, int]]) -> float:
    """Bits of a weight of a layer of the trained model: inputs are 256 wide, those of down 128."""
    width = {"gate": 256, "up": 256, "down": 128}
    bits = [
        Scheme.parse(name).storage_bits(1, width[projection]) / width[projection]
        for projection, counts in layer.items()
        for name, count in counts.items()
        for _ in range(count)
    ]
    return sum(bits) / len(bits)


def _spread(
    counts: Mapping[str, int], experts: int, shuffler: torch.Generator
) -> tuple[Scheme, ...]:
    """Schemes for ``experts`` experts in the proportions of ``counts``, in a seeded order."""
    total = sum(counts.values())
    shares = {name: experts * count / total for name, count in counts.items()}
    whole = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (whole[name] - shares[name], name))
    for name in by_remainder[: experts - sum(whole.values())]:
        whole[name] += 1
    schemes = [Scheme.parse(name) for name in sorted(whole) for _ in range(whole[name])]
    return tuple(schemes[i] for i in torch.randperm(experts, generator=shuffler).tolist())


def choose_experts(model: Model, tokens: int, routing: Routing, seed: int = 0) -> Tensor:
    """A router's choice, int32 [T, R], on the CPU: different experts for each token.

    Experts are drawn without replacement in proportion to shares (``expert_shares``), which
    flattens the counts a little, as a router that never takes an expert twice does too.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, model.experts, generator=generator).clamp(min=1e-9)
    keys = torch.tensor(expert_shares(model.experts, routing)).log() - (-noise.log()).log()
    order = torch.randperm(model.experts, generator=generator)
    return order[keys.topk(model.top_k, dim=1).indices].to(torch.int32)


def expert_shares(experts: int, routing: Routing) -> list[float]:
    """Share of the tokens of each expert, largest first, summing to 1.

    "zipf" is proportional to 1 / rank. "traced" is the share of each expert in a profile of a
    trained model, the mean over its layers of the sorted shares; for another number of experts the
    sorted curve is read at as many evenly spaced points, linearly between two experts.
    """
    if routing == "uniform":
        return [1 / experts] * experts
    if routing == "zipf":
        weights = [1 / rank for rank in range(1, experts + 1)]
    else:
        curve = _traced_curve()
        points = [(e + 0.5) / experts * len(curve) - 0.5 for e in range(experts)]
        weights = [_between(curve, point) for point in points]
    return [weight / sum(weights) for weight in weights]


def _traced_curve() -> list[float]:
    layers: Sequence[Sequence[int]] = _data("routing.json")["layers"]
    ordered = [[c / sum(layer) for c in sorted(layer, reverse=True)] for layer in layers]
    return [sum(shares) / len(shares) for shares in zip(*ordered, strict=True)]


def _between(curve: Sequence[float], point: float) -> float:
    point = min(max(point, 0.0), len(curve) - 1.0)
    low = min(int(point), len(curve) - 2)
    return curve[low] + (curve[low + 1] - curve[low]) * (point - low)


def expert_counts(index_TR: Tensor, experts: int) -> list[int]:
    """Tokens of each expert."""
    return torch.bincount(index_TR.flatten().long().cpu(), minlength=experts).tolist()


def skew(counts: Sequence[int]) -> float:
    """Tokens of the busiest expert over the median of those reached."""
    return max(counts) / median(count for count in counts if count > 0)


@lru_cache(maxsize=2)
def _data(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return content

"""Our side of a case: both products of a layer, or the whole layer, ready to be launched.

A *pair* is both products of a layer on inputs that are there: routing, tile tables and rounding of
inputs are made before. A *layer* is everything from the router's choice to the weighted sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from group_gemm.shapes import Model, Plan, expert_counts
from group_gemm.weights import copies_of, random_group, touched_bytes
from mxq.kernels.arena import GroupedWeights
from mxq.kernels.group_gemm import GroupGemm, Launches, Product
from mxq.kernels.layer import ExpertLayer, Gate
from mxq.kernels.reference import (
    SUM_ROUNDOFF,
    Inputs,
    error_bounds,
    group_gemm_torch,
    make_inputs_torch,
)
from mxq.kernels.routing import Routing, TileTables, route
from mxq.kernels.spec import WeightFormat

COLD_BYTES = 240 * 10**6
"""Weights that the copies of a case hold at least, counting experts that have tokens: four times
the cache of an H200."""

LEAST_COPIES = 4

FP8_SUM_ROUNDOFF = 2.0**-13
"""A Hopper tensor core keeps about 14 bits of a running sum of fp8 products."""


@dataclass(frozen=True, slots=True)
class Half:
    """One of the two products: a GroupGemm for each copy of the weights, and what it reads."""

    gemms: tuple[GroupGemm, ...]
    inputs: Inputs
    routing: Routing
    tables: TileTables

    def launch(self, copy: int, tokens: int) -> Product:
        """The product with one copy of the weights."""
        return self.gemms[copy].launch(self.inputs, self.routing, self.tables, tokens)


@dataclass(frozen=True, slots=True)
class Pair:
    """Both products of a case; the second one's inputs are random, not the first one's results."""

    first: Half
    second: Half
    tokens: int

    @property
    def copies(self) -> int:
        """Copies of the weights."""
        return len(self.first.gemms)

    def launch(self, copy: int) -> None:
        """Launch both with one copy of the weights."""
        self.first.launch(copy, self.tokens)
        self.second.launch(copy, self.tokens)


def make_groups(plan: Plan, model: Model, device: str) -> tuple[GroupedWeights, GroupedWeights]:
    """Random weights of both products."""
    first = random_group(plan.first, model.inner, model.hidden, parts=2, device=device)
    second = random_group(plan.down, model.hidden, model.inner, parts=1, device=device)
    return first, second


def copies_needed(weight_bytes: int) -> int:
    """Copies of a layer of which each launch reads ``weight_bytes``."""
    return max(LEAST_COPIES, -(-COLD_BYTES // weight_bytes))


def make_pair(
    groups: tuple[GroupedWeights, GroupedWeights],
    model: Model,
    index_TR: Tensor,
    *,
    launches: Launches,
    copies: int,
) -> Pair:
    """Both products for a router's choice, their tables and inputs made."""
    tokens, device = len(index_TR), groups[0].words.device
    routing = route(index_TR.to(device), model.experts)
    slots = routing.rows.numel()
    by_slot = replace(routing, rows=torch.arange(slots, dtype=torch.int32, device=device))
    halves = []
    for group, width, its_routing, rows in (
        (groups[0], model.hidden, routing, tokens),
        (groups[1], model.inner, by_slot, slots),
    ):
        gemms = tuple(
            GroupGemm(copy, top_k=model.top_k, launches=launches)
            for copy in copies_of(group, copies)
        )
        generator = torch.Generator(device).manual_seed(width)
        x_TK = torch.randn(rows, width, generator=generator, device=device)
        inputs = make_inputs_torch(x_TK, False, gemms[0].inputs)
        halves.append(Half(gemms, inputs, its_routing, gemms[0].tables(its_routing, tokens)))
    return Pair(*halves, tokens)


def finished(product: Product, group: GroupedWeights, routing: Routing) -> Tensor:
    """Outputs [S, N] with the slices of split problems added up, in float32 where there are any."""
    y_SN = product.y_SN.float()
    starts, counts = routing.starts.tolist(), routing.counts.tolist()
    for row, slices in zip(group.problems.tolist(), product.splits_P.tolist(), strict=True):
        if slices > 1 and counts[row[6]] > 0:
            slots = slice(starts[row[6]], starts[row[6]] + counts[row[6]])
            columns = slice(row[5], row[5] + row[2])
            assert product.partial_LSN is not None
            y_SN[slots, columns] = product.partial_LSN[:slices, slots, columns].sum(0)
    return y_SN


def error_over_bound(half: Half, tokens: int, experts: Sequence[int] | None = None) -> float:
    """Largest difference from the float32 definition, over what rounding can explain.

    More than 1, or not a number, is wrong. ``experts`` restricts the comparison.
    """
    group, routing = half.gemms[0].weights, half.routing
    poison = torch.full_like(half.launch(0, tokens).y_SN, torch.nan)
    del poison  # the next result is likely written here, so what is not written shows
    y_SN = finished(half.launch(0, tokens), group, routing)
    counts = routing.counts
    if experts is not None:
        kept = torch.zeros_like(counts)
        kept[list(experts)] = 1
        counts = counts * kept
    arguments = half.inputs, group, routing.rows, routing.starts, counts
    expected_SN = group_gemm_torch(*arguments, dtype=torch.bfloat16).float()
    roundoff = _sum_roundoff(group.formats)
    bound_SN = error_bounds(*arguments, dtype=torch.bfloat16, sum_roundoff=roundoff).kernel_SN
    judged = _judged(routing, counts, y_SN)
    ratio = (y_SN - expected_SN)[judged].abs() / bound_SN[judged].clamp(min=1e-30)
    return float(ratio.max()) if bool(torch.isfinite(ratio).all()) else float("inf")


def is_reproducible(half: Half, tokens: int) -> bool:
    """Whether two launches give the same bits."""
    group, routing = half.gemms[0].weights, half.routing
    first = finished(half.launch(0, tokens), group, routing)
    second = finished(half.launch(0, tokens), group, routing)
    return torch.equal(first, second)


def make_layers(
    groups: tuple[GroupedWeights, GroupedWeights], launches: Launches, copies: int
) -> list[ExpertLayer]:
    """Whole layers with rotated inputs, as mxq packs them, one for each copy of the weights."""
    pairs = zip(copies_of(groups[0], copies), copies_of(groups[1], copies), strict=True)
    return [
        ExpertLayer(first, second, Gate("silu"), is_rotated=True, launches=launches)
        for first, second in pairs
    ]


def weight_bytes(groups: tuple[GroupedWeights, GroupedWeights], index_TR: Tensor) -> int:
    """Bytes of the weights that a launch of the pair has to read."""
    experts = groups[1].problems.shape[0]
    counts = expert_counts(index_TR, experts)
    return sum(touched_bytes(group, counts) for group in groups)


def _judged(routing: Routing, counts_E: Tensor, y_SN: Tensor) -> Tensor:
    """Whether a slot belongs to an expert with a count, bool [S]."""
    slots = torch.arange(len(y_SN), device=y_SN.device)
    inside = (slots[:, None] >= routing.starts) & (slots[:, None] < routing.starts + counts_E)
    return inside.any(1)


def _sum_roundoff(formats: Sequence[WeightFormat]) -> float:
    return FP8_SUM_ROUNDOFF if any(form.input == "fp8" for form in formats) else SUM_ROUNDOFF

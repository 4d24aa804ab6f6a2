"""Blocks of a model as launches of the kernels: the additive price of a block, the time of a plan.

The experts of a site run in two launches, gate and up in one and down in the other; every other
linear is a launch. A launch has one tile plan, by the tokens of the experts that it reaches.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mxq.artifacts import BlockInfo
from mxq.kernels.spec import (
    ROW_TILE,
    UNIT,
    TilePlan,
    WeightFormat,
    format_of,
    tile_plan,
)
from mxq.scheme import Scheme
from mxq.search.granularity import GATE_UP
from mxq.search.kernel_cost import (
    KernelModel,
    LaunchTime,
    Products,
    branch_key,
    launch_time,
    multiprocessor_of,
)
from mxq.search.problem import Matrix
from mxq.search.tiles import Counts, expected_tiles, max_split, split_factor

DRAWS = 16
"""Token counts that ``step_time`` draws and averages over."""

_PLAIN = WeightFormat(16, "bf16")


def kernel_latency(
    kernels: KernelModel,
    blocks: Sequence[BlockInfo],
    schemes: Sequence[Scheme],
    share_B: Matrix,
    tokens: float,
) -> Matrix:
    """Expected microseconds of each block under each scheme, [B, S], as if all work were shared.

    The overhead of a launch is divided among its blocks, and the loops of all tiles among all
    multiprocessors.
    """
    price_BS = np.zeros((len(blocks), len(schemes)))
    for members in launches(blocks).values():
        mates = [blocks[member] for member in members]
        price_BS[members] = _launch_prices(kernels, mates, schemes, share_B[members], tokens)
    return price_BS


def _launch_prices(
    kernels: KernelModel,
    blocks: Sequence[BlockInfo],
    schemes: Sequence[Scheme],
    share_B: Matrix,
    tokens: float,
) -> Matrix:
    plan = plan_of(blocks, share_B, tokens)
    sm_count = kernels.device.sm_count
    columns_B = np.array([-(-block.out_features // ROW_TILE) for block in blocks])
    units_B = np.array([-(-block.in_features // UNIT) for block in blocks])
    read_B = 1 - (1 - share_B) ** tokens
    tiles_B = expected_tiles(tokens, share_B, plan.tokens)
    split = split_factor(
        float((columns_B * tiles_B).sum()),
        sm_count * plan.ctas_per_sm,
        max_split(plan, tokens * routed(blocks, share_B)[1]),
    )
    outside_B = tiles_B * np.minimum(split, units_B) / plan.ctas_per_sm
    price_BS = np.zeros((len(blocks), len(schemes)))
    for column, scheme in enumerate(schemes):
        time = kernels.tile_time(_format_or_bf16(scheme), plan)
        loops_B = units_B * (read_B * time.first + (tiles_B - read_B) * time.repeat)
        cycles_B = columns_B * (outside_B * time.tile_cycles + loops_B)
        price_BS[:, column] = cycles_B / sm_count / multiprocessor_of(kernels.device).clock_mhz
        price_BS[:, column] += read_B * _decode_us(kernels, blocks, scheme)
    return price_BS + kernels.launch_time_us / len(blocks)


def launches(blocks: Sequence[BlockInfo]) -> Mapping[tuple[str, str], list[int]]:
    """Which blocks run in one launch, by site and by what the launch computes."""
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, block in enumerate(blocks):
        what = "gate and up" if block.projection in GATE_UP else block.projection
        members[block.site, what].append(place)
    return members


def plan_of(blocks: Sequence[BlockInfo], share_B: Matrix, tokens: float) -> TilePlan:
    """The tile plan that the kernels take for a launch: by the tokens of an expert that gets any.

    As ``mxq.kernels.group_gemm`` does, which knows no shares: every expert is as likely.
    """
    experts, top_k = routed(blocks, share_B)
    reached = experts * (1 - (1 - min(top_k / experts, 1.0)) ** max(tokens, 1.0))
    return tile_plan(tokens * top_k / max(reached, 1.0))


def routed(blocks: Sequence[BlockInfo], share_B: Matrix) -> tuple[int, float]:
    """How many experts the blocks of a launch belong to, and how many of them a token goes to."""
    shares = {block.expert: share for block, share in zip(blocks, share_B, strict=True)}
    return len(shares), float(sum(shares.values()))


def kernel_format(scheme: Scheme) -> WeightFormat | None:
    """The format in which kernels compute a scheme; None if none does."""
    try:
        return format_of(scheme)
    except ValueError:
        return None


def _format_or_bf16(scheme: Scheme) -> WeightFormat:
    """The scheme's, or that of the bf16 kernel, which then reads the decoded weight."""
    return kernel_format(scheme) or _PLAIN


def _decode_us(kernels: KernelModel, blocks: Sequence[BlockInfo], scheme: Scheme) -> Matrix:
    """Reading each weight and writing it as bf16, where no kernel computes the scheme."""
    if kernel_format(scheme) is not None:
        return np.zeros(len(blocks))
    shapes = [(block.out_features, block.in_features) for block in blocks]
    bytes_B = np.array([scheme.storage_bits(n, k) / 8 + 2 * n * k for n, k in shapes])
    return bytes_B / (kernels.device.bandwidth_gb_s * 1e3) + kernels.launch_time_us


@dataclass(frozen=True, slots=True)
class StepTime:
    """Expected time of one step of a plan.

    ``additive_us`` is the sum of the block prices. ``total_us`` adds launches, each of which lasts
    until its last tile ends; ``work_us`` is their time if all work were shared evenly, of
    which ``launch_us`` is overhead, and ``decode_us`` that of weights that no kernel computes.
    ``rounds`` is how many tiles of a launch run one after the other, in the mean, and ``branches``
    names the branches that ran.
    """

    additive_us: float
    total_us: float
    work_us: float
    launch_us: float
    decode_us: float
    launches: int
    rounds: float
    branches: frozenset[str]


def step_time(
    kernels: KernelModel,
    blocks: Sequence[BlockInfo],
    schemes: Sequence[Scheme],
    share_B: Matrix,
    tokens: int,
) -> StepTime:
    """A plan, ``schemes[b]`` for ``blocks[b]``, averaged over ``DRAWS`` draws of token counts."""
    generator = np.random.default_rng(0)  # the same plan always gets the same time
    menu = sorted(set(schemes))
    place = {scheme: column for column, scheme in enumerate(menu)}
    chosen_B = np.array([place[scheme] for scheme in schemes])
    price_BS = kernel_latency(kernels, blocks, menu, share_B, tokens)
    times: list[LaunchTime] = []
    used: set[str] = set()
    decode_us, groups = 0.0, launches(blocks)
    for members in groups.values():
        mates = [blocks[member] for member in members]
        chosen = [schemes[member] for member in members]
        plan = plan_of(mates, share_B[members], tokens)
        used.update(branch_key(_format_or_bf16(scheme), plan) for scheme in set(chosen))
        slices = max_split(plan, tokens * routed(mates, share_B[members])[1])
        products = _products(kernels, mates, chosen, plan, slices)
        decode_B = _chosen_decode_us(kernels, mates, chosen)
        for _ in range(DRAWS):
            tokens_P = _draw(generator, mates, share_B[members], tokens)
            times.append(launch_time(replace(products, tokens_P=tokens_P), plan, kernels))
            decode_us += float(decode_B[tokens_P > 0].sum())
    return StepTime(
        additive_us=float(price_BS[np.arange(len(blocks)), chosen_B].sum()),
        total_us=(sum(time.total_us for time in times) + decode_us) / DRAWS,
        work_us=(sum(time.work_us + time.launch_us for time in times) + decode_us) / DRAWS,
        launch_us=sum(time.launch_us for time in times) / DRAWS,
        decode_us=decode_us / DRAWS,
        launches=len(groups),
        rounds=float(np.mean([time.rounds for time in times])),
        branches=frozenset(used),
    )


def _draw(
    generator: np.random.Generator, blocks: Sequence[BlockInfo], share_B: Matrix, tokens: int
) -> Counts:
    """Tokens of each block; the blocks of an expert get the same."""
    shares = {block.expert: share for block, share in zip(blocks, share_B, strict=True)}
    drawn = {expert: generator.binomial(tokens, share) for expert, share in shares.items()}
    return np.array([drawn[block.expert] for block in blocks], dtype=np.int64)


def _products(
    kernels: KernelModel,
    blocks: Sequence[BlockInfo],
    schemes: Sequence[Scheme],
    plan: TilePlan,
    slices: int,
) -> Products:
    """The products of a launch, without tokens yet."""
    by_scheme = {
        scheme: kernels.tile_time(_format_or_bf16(scheme), plan) for scheme in set(schemes)
    }
    times = [by_scheme[scheme] for scheme in schemes]
    return Products(
        tile_cycles_P=np.array([time.tile_cycles for time in times]),
        first_P=np.array([time.first for time in times]),
        repeat_P=np.array([time.repeat for time in times]),
        tokens_P=np.zeros(len(blocks), dtype=np.int64),
        out_features_P=np.array([block.out_features for block in blocks], dtype=np.int64),
        units=-(-blocks[0].in_features // UNIT),
        max_split=slices,
    )


def _chosen_decode_us(
    kernels: KernelModel, blocks: Sequence[BlockInfo], schemes: Sequence[Scheme]
) -> Matrix:
    decode_B = np.zeros(len(blocks))
    for place, (block, scheme) in enumerate(zip(blocks, schemes, strict=True)):
        if kernel_format(scheme) is None:
            decode_B[place] = _decode_us(kernels, [block], scheme)[0]
    return decode_B

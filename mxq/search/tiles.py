"""How many tiles a launch has, and how long its programs run: arithmetic without a device.

A program of a kernel computes one tile. The device runs as many of them at a time as it has slots,
in the order of the tile table: longest first.
"""

from collections.abc import Sequence
from math import ceil, floor, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from mxq.kernels.spec import TilePlan
from mxq.search.problem import Matrix

Counts = NDArray[np.int64]

SPLIT_ROWS = 256
"""Most assignments of tokens to experts whose products are cut into slices."""

MAX_SPLIT = 4
"""Most slices that one product is cut into along its inputs."""


def expected_tiles(tokens: float, share_B: Matrix, tile_tokens: int) -> Matrix:
    """E[ceil(m / tile_tokens)] for m ~ Binomial(tokens, share), for each share.

    It is the sum over j = 0, 1, ... of P(m > j tile_tokens). Tokens of a step go to an expert
    independently of each other here, as they do if a step mixes unrelated sequences. The tail
    probability is the regularized beta function, which also has a value between whole ``tokens``.
    """
    shares, place_B = np.unique(share_B, return_inverse=True)
    tiles = np.array([_expected_tiles(tokens, float(share), tile_tokens) for share in shares])
    return tiles[place_B]


def _expected_tiles(tokens: float, share: float, tile_tokens: int) -> float:
    if share <= 0:
        return 0.0
    if share >= 1:
        return float(ceil(tokens / tile_tokens))
    # Outside this window P(m > k) is 1 or 0 to far below 1e-9; the 40 is for the small means, whose
    # upper tail is longer than that of a normal distribution.
    mean, spread = tokens * share, sqrt(tokens * share * (1 - share))
    first = max(0, floor((mean - 10 * spread) / tile_tokens))
    last = ceil(min(tokens, mean + 10 * spread + 40) / tile_tokens)
    k = np.arange(first, last, dtype=np.float64) * tile_tokens
    k = k[k < tokens]
    return first + float(betainc(k + 1, tokens - k, share).sum())


def split_factor(tiles: float, slots: int, max_split: int = MAX_SPLIT) -> int:
    """In how many slices a launch cuts its inputs: 1, 2 or 4, the least that fills the slots.

    A product of fewer than that many units of 128 inputs has a slice for each unit.
    """
    split = 1
    while tiles * split < slots and split < max_split:
        split *= 2
    return split


def max_split(plan: TilePlan, assignments: float) -> int:
    """Most slices of a product with that many tokens over all experts: few, under small tiles.

    As ``mxq.kernels.group_gemm`` has it; partial sums take memory for each assignment.
    """
    return MAX_SPLIT if assignments <= SPLIT_ROWS and plan.ctas_per_sm > 2 else 1


def makespan(durations: Sequence[float], counts: Sequence[int], slots: int) -> float:
    """Time until all tiles are done; ``counts[i]`` tiles take ``durations[i]`` each.

    The longest tiles start first, and a program that ends makes room for the next tile: list
    scheduling, the longest processing time first (Graham 1969).
    """
    tiles: dict[float, int] = {}
    for duration, count in zip(durations, counts, strict=True):
        tiles[duration] = tiles.get(duration, 0) + count
    free_at = np.zeros(slots)
    for duration in sorted(tiles, reverse=True):
        free_at = _run(free_at, duration, tiles[duration])
    return float(free_at.max())


def _run(free_at: Matrix, duration: float, count: int) -> Matrix:
    """When each slot is free again after it took its part of ``count`` equal tiles.

    They start at the ``count`` least of the times free_at + 0, 1, 2, ... durations.
    """
    if count == 0 or duration == 0:
        return free_at
    slots = len(free_at)
    # No slot gets fewer than the mean by more than the rounds between the first free and the last.
    apart = ceil(float(np.ptp(free_at)) / duration)
    sure = max(0, count // slots - apart - 2)
    left = count - sure * slots
    begun = free_at + sure * duration
    rounds = np.arange(ceil(left / slots) + apart + 2)
    starts = begun[:, None] + duration * rounds
    chosen = np.argsort(starts, axis=None, kind="stable")[:left]
    return begun + duration * np.bincount(chosen // len(rounds), minlength=slots)

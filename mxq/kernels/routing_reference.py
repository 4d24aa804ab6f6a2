"""What routing and tile tables are, written with plain torch and loops: the kernels' definition."""

import torch
from torch import Tensor

from mxq.kernels.spec import ROW_TILE, UNIT

Tile = tuple[int, int, int, int, int, int, int, int]
"""(branch, problem, row0, nrows, n0, unit0, units, slice | slices << 8)."""


def route_reference(
    index_TR: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts, starts, rows, slots and experts as ``routing.Routing`` has them, all int32."""
    index_S = index_TR.flatten().to(torch.int64)
    index_S = torch.where((index_S >= 0) & (index_S < experts), index_S, experts)
    order = torch.argsort(index_S, stable=True)
    counts = torch.bincount(index_S, minlength=experts + 1)[:experts]
    starts = counts.cumsum(0) - counts
    used_S = index_S[order] < experts
    rows = torch.where(used_S, order // index_TR.shape[1], 0)
    experts_S = torch.where(used_S, index_S[order], -1)
    slots = torch.empty_like(index_S)
    slots[order] = torch.where(used_S, torch.arange(len(order), device=order.device), -1)
    results = counts, starts, rows, slots.reshape(index_TR.shape), experts_S
    counts, starts, rows, slots, experts_S = (result.to(torch.int32) for result in results)
    return counts, starts, rows, slots, experts_S


def tile_tables_reference(
    counts: Tensor,
    starts: Tensor,
    problems: Tensor,
    format_index: Tensor,
    shapes: Tensor,
    *,
    launches: int,
    target_tiles: int,
    max_split: int,
) -> tuple[list[list[Tile]], list[int]]:
    """Tiles of each launch, in order, and the slices of each problem.

    Tiles of a launch go by problem, the dearest first (cost of a unit times units of a slice),
    ties by number; within a problem by output columns, then slices of K, then tokens. The split
    is that of all launches together.
    """
    rows = problems.tolist()
    tokens = [int(counts[row[6]]) for row in rows]
    shape = [
        shapes[form, min(max(m - 1, 0).bit_length(), 15)].tolist()
        for form, m in zip(format_index.tolist(), tokens, strict=True)
    ]
    whole = sum(
        -(-m // tile) * (row[3] // ROW_TILE)
        for m, row, (_, tile, _, _) in zip(tokens, rows, shape, strict=True)
    )
    wanted = next((split for split in (1, 2) if whole * split >= target_tiles), 4)
    slice_units = [-(-(row[4] // UNIT) // min(wanted, max_split, row[4] // UNIT)) for row in rows]
    splits = [-(-(row[4] // UNIT) // own) for row, own in zip(rows, slice_units, strict=True)]
    tiles: list[list[Tile]] = [[] for _ in range(launches)]
    for p in sorted(range(len(rows)), key=lambda p: (-shape[p][3] * slice_units[p], p)):
        branch, tile_tokens, launch, _ = shape[p]
        start, units = int(starts[rows[p][6]]), rows[p][4] // UNIT
        for n0 in range(0, rows[p][3], ROW_TILE):
            for number in range(splits[p]):
                unit0 = number * slice_units[p]
                last = min(slice_units[p], units - unit0), number | splits[p] << 8
                for row in range(0, tokens[p], tile_tokens):
                    nrows = min(tile_tokens, tokens[p] - row)
                    tiles[launch].append((branch, p, start + row, nrows, n0, unit0, *last))
    return tiles, splits

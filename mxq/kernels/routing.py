"""Routing on the device: assignments sorted by expert, and the tile table of each GEMM.

Nothing here waits for the device or depends on values that are there, so a CUDA graph can record
all of it. ``tile_bound`` says beforehand how many tiles any routing of so many tokens can make.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
from torch import Tensor

from mxq.counted import counted
from mxq.kernels.routing_kernels import (
    count_kernel,
    route_small_kernel,
    scan_kernel,
    scatter_kernel,
    tile_table_kernel,
)
from mxq.kernels.spec import ROW_TILE, TILE_FIELDS

SMALL_LIMIT = 4096
"""Assignments up to which one launch that compares all pairs is used; more take three launches."""

EXPERTS_LIMIT = 65536
"""Most experts: an expert and an assignment number are compared as one 32-bit integer."""

PROBLEMS_LIMIT = 2048
"""Most problems of a GEMM: every program of the tile table looks at all of them at once."""

TILE_WORDS = len(TILE_FIELDS)
"""Words of a tile."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Assignments (token, choice) sorted by expert, stable; all int32.

    ``counts`` [E] and ``starts`` [E]: slots of each expert and the first of them. ``rows`` [S] and
    ``experts`` [S]: token and expert of each slot (0 and -1 in the unused slots at the end).
    ``slots`` [T, R]: slot of each assignment, -1 if it names no expert.
    """

    counts: Tensor
    starts: Tensor
    rows: Tensor
    slots: Tensor
    experts: Tensor


@dataclass(frozen=True, slots=True)
class TileTables:
    """What the launches of one GEMM work through; all int32.

    ``tiles`` [L, bound, 8], of which the first ``counts`` [L] of each launch are written;
    ``splits`` [P]: slices of K of each problem (1: the result is not split).
    """

    tiles: Tensor
    counts: Tensor
    splits: Tensor


def route(
    index_TR: Tensor, experts: int, *, small_limit: int = SMALL_LIMIT, chunk: int = 256
) -> Routing:
    """Sort the assignments of ``index_TR`` (int32 or int64 [T, R]) by expert.

    A number outside of 0..experts-1 means "no expert". ``chunk`` (a power of two) is what a
    program takes if there are more than ``small_limit`` assignments.

    Raises:
        ValueError: If the tensor is not a table of integers, or there are too many experts.
    """
    _check_index(index_TR, experts)
    index_TR = index_TR.contiguous()
    total, top_k = index_TR.numel(), index_TR.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=index_TR.device)

    routing = Routing(
        empty(experts), empty(experts), empty(total), empty(*index_TR.shape), empty(total)
    )
    placed = routing.rows, routing.slots, routing.experts
    if total <= small_limit:
        block = 32
        slot_programs = triton.cdiv(total, block)
        route_small_kernel[(slot_programs + triton.cdiv(experts, block),)](
            index_TR,
            routing.counts,
            routing.starts,
            *placed,
            total,
            experts,
            top_k,
            slot_programs,
            BLOCK=block,
            BLOCK_SCAN=128,
        )
        return routing
    chunks = triton.cdiv(total, chunk)
    found, before = empty(chunks, experts + 1), empty(chunks, experts + 1)
    count_kernel[(chunks, triton.cdiv(experts + 1, 32))](
        index_TR, found, total, experts, CHUNK=chunk, BLOCK_E=32
    )
    scan_kernel[(triton.cdiv(experts + 1, 16),)](
        found, before, routing.counts, chunks, experts, BLOCK_C=128, BLOCK_E=16
    )
    scatter_kernel[(chunks + triton.cdiv(experts, chunk),)](
        index_TR,
        before,
        routing.counts,
        routing.starts,
        *placed,
        total,
        experts,
        top_k,
        chunks,
        CHUNK=chunk,
        BLOCK_SCAN=32,
        num_warps=8,
    )
    return routing


def tile_tables(
    routing: Routing,
    problems: Tensor,
    format_index: Tensor,
    shapes: Tensor,
    *,
    launches: int,
    bound: int,
    target_tiles: int,
    max_split: int,
) -> TileTables:
    """Lay out the tiles of one GEMM.

    ``problems`` int64 [P, 8] and ``format_index`` int32 [P] are those of GroupedWeights;
    ``shapes`` int32 [F, 16, 4] gives (branch, tokens of a tile, launch, cost of one unit of K) for
    each format and for ceil(log2(tokens of the expert)). K is cut into the smallest of 1, 2, 4
    slices that makes ``target_tiles`` tiles, at most ``max_split``. ``bound`` must be at least
    ``tile_bound`` for this number of tokens (``check_bound``).

    Raises:
        ValueError: If a table has another shape or type, or there are too many problems.
    """
    _check_tables(problems, format_index, shapes)
    count = problems.shape[0]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=problems.device)

    tables = TileTables(empty(launches, bound, TILE_WORDS), empty(launches), empty(count))
    # A problem of very many tiles is written by several programs.
    writers = min(16, triton.cdiv(bound, 256 * count))
    tile_table_kernel[(count, writers)](
        routing.counts,
        routing.starts,
        problems,
        format_index,
        shapes,
        tables.tiles,
        tables.counts,
        tables.splits,
        count,
        launches,
        bound,
        target_tiles,
        max_split,
        BLOCK_P=max(16, triton.next_power_of_2(count)),
        BLOCK_TILES=32,
        num_warps=4 if count <= 512 else 8,
    )
    return tables


def column_tiles(problems: Tensor) -> tuple[int, ...]:
    """Tiles along the outputs of each expert that has a problem, most first.

    For ``tile_bound``; copies the table to the host, so it is for the time when a layer is loaded.
    """
    tiles: dict[int, int] = {}
    for row in problems.tolist():
        tiles[row[6]] = tiles.get(row[6], 0) + row[3] // ROW_TILE
    return tuple(sorted(tiles.values(), reverse=True))


@lru_cache(maxsize=1024)
def tile_bound(
    tokens: int,
    top_k: int,
    columns: tuple[int, ...],
    *,
    smallest_tile: int,
    target_tiles: int,
    max_split: int,
) -> int:
    """The most tiles that any routing of so many tokens can make in one GEMM.

    Without a split this is exact if all tiles take ``smallest_tile`` tokens: the first tile of an
    expert costs one assignment, each further one ``smallest_tile``, so the worst routing gives one
    assignment to each of the ``used`` widest experts and the rest to the widest. A split of 2 or 4
    is chosen only if half of it makes fewer than ``target_tiles`` tiles.
    """
    columns = tuple(sorted(columns, reverse=True))
    total = tokens * top_k
    whole = max(
        (
            first + (total - used) // smallest_tile * columns[0]
            for used, first in enumerate(accumulate(columns[:total]), start=1)
        ),
        default=0,
    )
    return max(1, whole, min(whole * min(max_split, 4), 2 * target_tiles - 2))


def check_bound(
    tokens: int,
    top_k: int,
    columns: tuple[int, ...],
    bound: int,
    *,
    smallest_tile: int,
    target_tiles: int,
    max_split: int,
) -> None:
    """Raise ValueError if a routing of so many tokens could overflow a table of ``bound`` tiles."""
    needed = tile_bound(
        tokens,
        top_k,
        columns,
        smallest_tile=smallest_tile,
        target_tiles=target_tiles,
        max_split=max_split,
    )
    if needed > bound:
        raise ValueError(
            f"{counted(tokens, 'token')} with {counted(top_k, 'expert')} each can make "
            f"{counted(needed, 'tile')}, but the tile "
            f"table has room for {bound}; make the table for more tokens or pass fewer at a time"
        )


def _check_index(index_TR: Tensor, experts: int) -> None:
    if index_TR.dim() != 2 or index_TR.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"the expert numbers are {index_TR.dtype} of shape {list(index_TR.shape)}; "
            "expected int32 or int64 of shape [tokens, experts of a token]"
        )
    if not 1 <= experts <= EXPERTS_LIMIT:
        raise ValueError(f"{experts} experts; kernels take 1 to {EXPERTS_LIMIT}")


def _check_tables(problems: Tensor, format_index: Tensor, shapes: Tensor) -> None:
    count = problems.shape[0]
    _check_table("problems", problems, torch.int64, (count, 8))
    _check_table("format_index", format_index, torch.int32, (count,))
    _check_table("shapes", shapes, torch.int32, (shapes.shape[0], 16, 4))
    if not 1 <= count <= PROBLEMS_LIMIT:
        raise ValueError(f"{count} problems in one GEMM; a tile table takes 1 to {PROBLEMS_LIMIT}")


def _check_table(name: str, table: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if table.dtype != dtype or tuple(table.shape) != tuple(shape) or not table.is_contiguous():
        raise ValueError(
            f"{name} is {table.dtype} of shape {list(table.shape)}; expected contiguous {dtype} "
            f"of shape {list(shape)}"
        )

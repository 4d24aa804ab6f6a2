"""Kernels that sort assignments by expert and lay out the tiles of a GEMM.

An *assignment* is one (token, choice) pair, numbered ``token * top_k + choice``; a *slot* is its
place after the stable sort by expert. Expert number ``experts`` stands for "no expert": those
assignments sort last, so every slot is written by exactly one assignment and nothing has to be
cleared first. Past the end of the list the expert is ``experts + 1``, which matches nothing.
All sums are of integers, so their order does not matter. Arguments that change with the number of
tokens are not specialized: a new number of tokens compiles nothing.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["total", "slot_programs"])
def route_small_kernel(
    index_ptr,
    counts_ptr,
    starts_ptr,
    rows_ptr,
    slots_ptr,
    experts_ptr,
    total,
    experts,
    top_k,
    slot_programs,
    BLOCK: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Sort by comparing all pairs: the slot of an assignment is the number of smaller keys.

    The first ``slot_programs`` programs place BLOCK assignments each, the others count for BLOCK
    experts each.
    """
    pid = tl.program_id(0)
    if pid < slot_programs:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        expert = _expert_of(index_ptr, i, total, experts)
        slot = _keys_below(expert * total + i, index_ptr, total, experts, BLOCK, BLOCK_SCAN)
        _place(i, slot, expert, rows_ptr, slots_ptr, experts_ptr, total, experts, top_k)
    else:
        e = (pid - slot_programs) * BLOCK + tl.arange(0, BLOCK)
        start = _keys_below(e * total, index_ptr, total, experts, BLOCK, BLOCK_SCAN)
        end = _keys_below((e + 1) * total, index_ptr, total, experts, BLOCK, BLOCK_SCAN)
        # Mask: experts past the last.
        tl.store(starts_ptr + e, start, mask=e < experts)
        tl.store(counts_ptr + e, end - start, mask=e < experts)


@triton.jit(do_not_specialize=["total"])
def count_kernel(index_ptr, found_ptr, total, experts, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """found[chunk, e]: assignments of each chunk that name expert e (e = experts: none)."""
    chunk = tl.program_id(0)
    expert = _expert_of(index_ptr, chunk * CHUNK + tl.arange(0, CHUNK), total, experts)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    found = tl.sum((e[:, None] == expert[None, :]).to(tl.int32), axis=1)
    # Mask: experts past "no expert".
    tl.store(found_ptr + chunk.to(tl.int64) * (experts + 1) + e, found, mask=e <= experts)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    found_ptr,
    before_ptr,
    counts_ptr,
    chunks,
    experts,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """before[chunk, e]: assignments of earlier chunks that name expert e; counts[e]: of all."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    carry = tl.zeros([BLOCK_E], dtype=tl.int32)
    for base in range(0, chunks, BLOCK_C):
        c = base + tl.arange(0, BLOCK_C)
        at = c[:, None].to(tl.int64) * (experts + 1) + e[None, :]
        # Mask: chunks past the last, experts past "no expert".
        inside = (c[:, None] < chunks) & (e[None, :] <= experts)
        found = tl.load(found_ptr + at, mask=inside, other=0)
        before = tl.cumsum(found, axis=0) - found + carry[None, :]
        tl.store(before_ptr + at, before, mask=inside)
        carry += tl.sum(found, axis=0)
    # Mask: experts past the last; "no expert" is not counted.
    tl.store(counts_ptr + e, carry, mask=e < experts)


@triton.jit(do_not_specialize=["total", "chunks"])
def scatter_kernel(
    index_ptr,
    before_ptr,
    counts_ptr,
    starts_ptr,
    rows_ptr,
    slots_ptr,
    experts_ptr,
    total,
    experts,
    top_k,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Slot = first slot of the expert + those of earlier chunks + earlier ones of this chunk.

    The first ``chunks`` programs place one chunk each, the others write the starts of CHUNK
    experts each.
    """
    pid = tl.program_id(0)
    if pid < chunks:
        i = pid * CHUNK + tl.arange(0, CHUNK)
        expert = _expert_of(index_ptr, i, total, experts)
        earlier = tl.zeros([CHUNK, BLOCK_SCAN], dtype=tl.int32)
        for base in range(0, CHUNK, BLOCK_SCAN):
            j = pid * CHUNK + base + tl.arange(0, BLOCK_SCAN)
            other = _expert_of(index_ptr, j, total, experts)
            same = (other[None, :] == expert[:, None]) & (j[None, :] < i[:, None])
            earlier += same.to(tl.int32)
        # Mask: assignments past the end of the list.
        before_at = before_ptr + pid.to(tl.int64) * (experts + 1) + expert
        before = tl.load(before_at, mask=i < total, other=0)
        slot = _tokens_below(expert, counts_ptr, experts, CHUNK, BLOCK_SCAN) + before
        slot += tl.sum(earlier, axis=1)
        _place(i, slot, expert, rows_ptr, slots_ptr, experts_ptr, total, experts, top_k)
    else:
        e = (pid - chunks) * CHUNK + tl.arange(0, CHUNK)
        start = _tokens_below(e, counts_ptr, experts, CHUNK, BLOCK_SCAN)
        # Mask: experts past the last.
        tl.store(starts_ptr + e, start, mask=e < experts)


@triton.jit(do_not_specialize=["bound", "target_tiles"])
def tile_table_kernel(  # noqa: PLR0915 - one program from counts to tiles
    counts_ptr,
    starts_ptr,
    problems_ptr,
    format_index_ptr,
    shapes_ptr,
    tiles_ptr,
    tile_counts_ptr,
    splits_ptr,
    problems,
    launches,
    bound,
    target_tiles,
    max_split,
    BLOCK_P: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Tiles of one GEMM; program (p, w) writes every w-th block of the tiles of problem p.

    Each program looks at all problems at once: it needs the split that they agree on and the
    tiles of those that come before its own.
    """
    problem = tl.program_id(0)
    q = tl.arange(0, BLOCK_P)
    there = q < problems  # Mask, everywhere below: problems past the last.
    n_tiles = tl.load(problems_ptr + q * 8 + 3, mask=there, other=0).to(tl.int32) // 128
    units = tl.load(problems_ptr + q * 8 + 4, mask=there, other=128).to(tl.int32) // 128
    expert = tl.load(problems_ptr + q * 8 + 6, mask=there, other=0)
    tokens = tl.load(counts_ptr + expert, mask=there, other=0)
    form = tl.load(format_index_ptr + q, mask=there, other=0)
    shape_ptr = shapes_ptr + (form * 16 + _bucket(tokens)) * 4
    tile_tokens = tl.load(shape_ptr + 1, mask=there, other=1)
    launch = tl.load(shape_ptr + 2, mask=there, other=-1)
    unit_cost = tl.load(shape_ptr + 3, mask=there, other=0)

    m_tiles = (tokens + tile_tokens - 1) // tile_tokens
    whole = tl.sum((m_tiles * n_tiles).to(tl.int64))
    wanted = tl.where(whole >= target_tiles, 1, tl.where(2 * whole >= target_tiles, 2, 4))
    split = tl.minimum(tl.minimum(wanted, max_split), units)
    slice_units = (units + split - 1) // split
    slices = (units + slice_units - 1) // slice_units  # fewer than split if some would be empty
    tiles = m_tiles * n_tiles * slices
    cost = unit_cost.to(tl.int64) * slice_units

    own = q == problem
    own_launch = _pick(launch, own)
    own_cost = _pick(cost, own)
    first = (cost > own_cost) | ((cost == own_cost) & (q < problem))
    offset = tl.sum(tl.where(first & (launch == own_launch), tiles, 0))
    own_tiles = _pick(tiles, own)
    own_slices = _pick(slices, own)
    own_slice_units = _pick(slice_units, own)
    own_units = _pick(units, own)
    own_m_tiles = tl.maximum(_pick(m_tiles, own), 1)  # a divisor below; no tile is written for 0
    own_tile_tokens = _pick(tile_tokens, own)
    own_tokens = _pick(tokens, own)
    own_form = _pick(form, own)
    own_start = tl.load(starts_ptr + _pick(expert, own))
    branch = tl.load(shapes_ptr + (own_form * 16 + _bucket(own_tokens)) * 4)
    if tl.program_id(1) == 0:
        tl.store(splits_ptr + problem, own_slices)
        if problem == 0:
            for number in range(launches):
                count = tl.sum(tl.where(launch == number, tiles, 0))
                tl.store(tile_counts_ptr + number, count)

    word = tl.arange(0, 8)[None, :]
    step = tl.num_programs(1) * BLOCK_TILES
    for base in range(tl.program_id(1) * BLOCK_TILES, own_tiles, step):
        i = (base + tl.arange(0, BLOCK_TILES))[:, None]
        m_tile = i % own_m_tiles
        slice_number = (i // own_m_tiles) % own_slices
        n0 = (i // (own_m_tiles * own_slices)) * 128
        row = m_tile * own_tile_tokens
        unit = slice_number * own_slice_units
        entry = tl.where(word == 0, branch, problem)
        entry = tl.where(word == 2, own_start + row, entry)
        entry = tl.where(word == 3, tl.minimum(own_tile_tokens, own_tokens - row), entry)
        entry = tl.where(word == 4, n0, entry)
        entry = tl.where(word == 5, unit, entry)
        entry = tl.where(word == 6, tl.minimum(own_slice_units, own_units - unit), entry)
        entry = tl.where(word == 7, slice_number | (own_slices << 8), entry)
        at = (own_launch.to(tl.int64) * bound + offset + i) * 8 + word
        # Mask: tiles past the problem's last; the bound holds by tile_bound, and guards memory.
        tl.store(tiles_ptr + at, entry, mask=(i < own_tiles) & (offset + i < bound))


@triton.jit
def _expert_of(index_ptr, i, total, experts):
    """Expert of each assignment, ``experts`` if none, ``experts + 1`` past the end."""
    # Mask: assignments past the end of the list.
    expert = tl.load(index_ptr + i, mask=i < total, other=0)
    expert = tl.where((expert >= 0) & (expert < experts), expert, experts).to(tl.int32)
    return tl.where(i < total, expert, experts + 1)


@triton.jit
def _keys_below(limit, index_ptr, total, experts, BLOCK: tl.constexpr, BLOCK_SCAN: tl.constexpr):
    """Assignments whose key, (expert, number) as one integer, is below each limit."""
    below = tl.zeros([BLOCK, BLOCK_SCAN], dtype=tl.int32)
    for base in range(0, total, BLOCK_SCAN):
        j = base + tl.arange(0, BLOCK_SCAN)
        key = _expert_of(index_ptr, j, total, experts) * total + j
        below += (key[None, :] < limit[:, None]).to(tl.int32)
    return tl.sum(below, axis=1)


@triton.jit
def _tokens_below(expert, counts_ptr, experts, BLOCK: tl.constexpr, BLOCK_SCAN: tl.constexpr):
    """Assignments to experts of lower number, for each of BLOCK experts."""
    below = tl.zeros([BLOCK, BLOCK_SCAN], dtype=tl.int32)
    for base in range(0, experts, BLOCK_SCAN):
        e = base + tl.arange(0, BLOCK_SCAN)
        count = tl.load(counts_ptr + e, mask=e < experts, other=0)  # Mask: past the last expert.
        below += tl.where(e[None, :] < expert[:, None], count[None, :], 0)
    return tl.sum(below, axis=1)


@triton.jit
def _place(i, slot, expert, rows_ptr, slots_ptr, experts_ptr, total, experts, top_k):
    """Write assignment i into its slot; a slot without an expert gets row 0 and expert -1."""
    used = expert < experts
    inside = i < total  # Mask: assignments past the end of the list, whose slot is past it too.
    tl.store(slots_ptr + i, tl.where(used, slot, -1), mask=inside)
    tl.store(rows_ptr + slot, tl.where(used, i // top_k, 0), mask=inside)
    tl.store(experts_ptr + slot, tl.where(used, expert, -1), mask=inside)


@triton.jit
def _bucket(tokens):
    """ceil(log2(tokens)), at most 15; 0 for no token."""
    bucket = tokens * 0
    for power in tl.static_range(15):
        bucket += (tokens > (1 << power)).to(tl.int32)
    return bucket


@triton.jit
def _pick(values, own):
    """The one value where ``own`` holds."""
    return tl.sum(tl.where(own, values, 0))

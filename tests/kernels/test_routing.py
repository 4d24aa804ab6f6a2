"""Routing and tile tables: kernels against their definitions, definitions against counting."""

from dataclasses import dataclass

import pytest
import torch

from mxq.kernels import routing
from mxq.kernels.routing import check_bound, column_tiles, route, tile_bound, tile_tables
from mxq.kernels.routing_reference import route_reference, tile_tables_reference

FIELDS = ("counts", "starts", "rows", "slots", "experts")


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    experts: int
    note: str

    def __str__(self):
        return self.note.replace(" ", "-")

    def index(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        if self.note == "all on one":
            return torch.full((self.tokens, self.top_k), self.experts - 2)
        low, high = (-1, self.experts + 3) if self.note == "some name none" else (0, self.experts)
        if self.note == "all name none":
            low, high = self.experts, self.experts + 2
        if self.note == "half empty":
            high = self.experts // 2
        return torch.randint(low, high, (self.tokens, self.top_k), generator=generator)


CASES = (
    Case(1, 1, 4, "one token"),
    Case(1, 8, 16, "one token of eight"),
    Case(40, 3, 7, "all on one"),
    Case(33, 3, 7, "some name none"),
    Case(9, 2, 5, "all name none"),
    Case(37, 5, 12, "half empty"),
    Case(16, 4, 1, "one expert"),
    Case(0, 2, 3, "no token"),
)


def launches_of(monkeypatch):
    """Count the launches of each routing kernel."""
    counted = {}

    class Counting:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(routing, name)

        def __getitem__(self, grid):
            counted[self.name] = counted.get(self.name, 0) + 1
            return self.kernel[grid]

    for name in ("route_small_kernel", "count_kernel", "scan_kernel", "scatter_kernel"):
        monkeypatch.setattr(routing, name, Counting(name))
    return counted


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("small_limit", [4096, -1], ids=["small", "large"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_routing_is_its_definition(case, small_limit, dtype):
    index_TR = case.index().to(dtype)
    found = route(index_TR, case.experts, small_limit=small_limit, chunk=32)
    expected = route_reference(index_TR, case.experts)
    for name, tensor in zip(FIELDS, expected, strict=True):
        assert getattr(found, name).dtype == torch.int32
        assert torch.equal(getattr(found, name), tensor), name


def test_the_definition_by_hand():
    # Experts 0: tokens 1, 2. Expert 1: none. Expert 2: tokens 0, 1. -1, 3 and 9 name none.
    index_TR = torch.tensor([[2, 3], [0, 2], [-1, 0], [9, -7]])
    counts, starts, rows, slots, experts = route_reference(index_TR, 3)
    assert counts.tolist() == [2, 0, 2]
    assert starts.tolist() == [0, 2, 2]
    assert rows.tolist() == [1, 2, 0, 1, 0, 0, 0, 0]
    assert experts.tolist() == [0, 0, 2, 2, -1, -1, -1, -1]
    assert slots.tolist() == [[2, -1], [0, 3], [-1, 1], [-1, -1]]


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_one_launch_up_to_the_limit_and_three_above(over, monkeypatch):
    counted = launches_of(monkeypatch)
    index_TR = torch.randint(0, 5, (64 + over, 1), generator=torch.Generator().manual_seed(1))
    found = route(index_TR, 5, small_limit=64, chunk=16)
    assert torch.equal(found.slots, route_reference(index_TR, 5)[3])
    names = (
        ["route_small_kernel"] if over <= 0 else ["count_kernel", "scan_kernel", "scatter_kernel"]
    )
    assert counted == dict.fromkeys(names, 1)


def test_more_assignments_than_the_default_limit_take_three_launches(monkeypatch):
    counted = launches_of(monkeypatch)
    # 4097 assignments: 17 chunks of 256.
    index_TR = torch.randint(-1, 21, (4097, 1), generator=torch.Generator().manual_seed(2))
    found = route(index_TR, 20)
    for name, tensor in zip(FIELDS, route_reference(index_TR, 20), strict=True):
        assert torch.equal(getattr(found, name), tensor), name
    assert routing.SMALL_LIMIT == 4096
    assert "route_small_kernel" not in counted


def test_more_chunks_than_one_step_of_the_scan():
    # 150 chunks of 16, where the scan takes 128 in a step.
    index_TR = torch.randint(0, 18, (2400, 1), generator=torch.Generator().manual_seed(3))
    found = route(index_TR, 17, small_limit=0, chunk=16)
    for name, tensor in zip(FIELDS, route_reference(index_TR, 17), strict=True):
        assert torch.equal(getattr(found, name), tensor), name


@pytest.mark.parametrize(
    ("index", "experts", "message"),
    [
        (torch.zeros(3, 2), 4, r"float32 of shape \[3, 2\]; expected int32 or int64"),
        (torch.zeros(3, dtype=torch.int64), 4, r"of shape \[3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, "0 experts; kernels take 1 to 65536"),
    ],
)
def test_what_is_no_routing_is_refused(index, experts, message):
    with pytest.raises(ValueError, match=message):
        route(index, experts)


@dataclass(frozen=True)
class Layer:
    """Tables of a GEMM of random problems, two for each expert."""

    problems: torch.Tensor
    format_index: torch.Tensor
    shapes: torch.Tensor
    launches: int


def make_layer(experts, seed, *, launches=2, tiles=(16, 64), tied_costs=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    problems = torch.zeros(2 * experts, 8, dtype=torch.int64)
    problems[:, 2] = draw(1, 385, 2 * experts)  # no multiple of 128
    problems[:, 3] = -(-problems[:, 2] // 128) * 128
    problems[:, 4] = 128 * draw(1, 7, 2 * experts)
    problems[:, 6] = torch.arange(2 * experts) // 2
    cost = torch.ones(3, 16, dtype=torch.int64) if tied_costs else draw(1, 4, 3, 16)
    tokens = torch.tensor(tiles)[draw(0, len(tiles), 3, 16)]
    words = [draw(0, 5, 3, 16), tokens, draw(0, launches, 3, 16), cost]
    return Layer(problems, draw(0, 3, 2 * experts).int(), torch.stack(words, -1).int(), launches)


def tables_of(layer, index_TR, experts, bound, target_tiles, max_split):
    routed = route(index_TR, experts, small_limit=0, chunk=64)
    options = {"launches": layer.launches, "target_tiles": target_tiles, "max_split": max_split}
    tables = layer.problems, layer.format_index, layer.shapes
    found = tile_tables(routed, *tables, bound=bound, **options)
    return found, tile_tables_reference(routed.counts, routed.starts, *tables, **options)


@pytest.mark.parametrize("target_tiles", [1, 60, 10**6])
@pytest.mark.parametrize("max_split", [1, 2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if case.experts > 1], ids=str)
def test_tile_tables_are_their_definition(case, max_split, target_tiles):
    layer = make_layer(case.experts, seed=case.tokens, tied_costs=case.tokens == 33)
    index_TR = case.index()
    found, (tiles, splits) = tables_of(
        layer, index_TR, case.experts, bound := 800, target_tiles, max_split
    )
    assert found.counts.tolist() == [len(launch) for launch in tiles]
    assert found.splits.tolist() == splits
    assert max(map(len, tiles)) <= bound
    for number, expected in enumerate(tiles):
        assert found.tiles[number, : len(expected)].tolist() == [list(tile) for tile in expected]


@pytest.mark.parametrize("target_tiles", [1, 40, 10**6])
def test_each_row_column_and_unit_is_in_one_tile(target_tiles):
    case = CASES[3]
    layer = make_layer(case.experts, seed=5)
    found, _ = tables_of(layer, case.index(), case.experts, 800, target_tiles, 4)
    counts, starts, *_ = route_reference(case.index(), case.experts)
    covered = [
        torch.zeros(int(counts[row[6]]), row[3] // 128, row[4] // 128, dtype=torch.int64)
        for row in layer.problems.tolist()
    ]
    costs = [[] for _ in range(layer.launches)]
    for launch, count in enumerate(found.counts.tolist()):
        for _, p, row0, nrows, n0, unit0, units, last in found.tiles[launch, :count].tolist():
            assert nrows >= 1
            assert units >= 1
            row = row0 - int(starts[layer.problems[p, 6]])
            covered[p][row : row + nrows, n0 // 128, unit0 : unit0 + units] += 1
            assert last >> 8 == int(found.splits[p])
            assert last & 255 < last >> 8
            bucket = max(len(covered[p]) - 1, 0).bit_length()
            unit_cost = int(layer.shapes[layer.format_index[p], bucket, 3])
            slice_units = -(-covered[p].shape[2] // int(found.splits[p]))
            costs[launch].append(unit_cost * slice_units)
    assert all((each == 1).all() for each in covered)
    # ceil(units / splits) is the slice of the table too, for up to 6 units and 4 slices.
    assert all(launch == sorted(launch, reverse=True) for launch in costs)


def test_the_order_of_tiles_by_hand():
    # One expert, 20 tokens from slot 0: 2 tiles of 16; 256 outputs; 3 units in 2 slices: 2 and 1.
    problems = torch.tensor([[0, 0, 200, 256, 384, 0, 0, -1]])
    shapes = torch.tensor([7, 16, 0, 5]).expand(1, 16, 4).int().contiguous()
    index_TR = torch.zeros(20, 1, dtype=torch.int64)
    layer = Layer(problems, torch.zeros(1, dtype=torch.int32), shapes, 1)
    found, _ = tables_of(layer, index_TR, 1, 8, 8, 4)
    first, second = 0 | 2 << 8, 1 | 2 << 8
    assert found.tiles[0].tolist() == [
        [7, 0, row0, nrows, n0, unit0, units, number]
        for n0 in (0, 128)
        for unit0, units, number in ((0, 2, first), (2, 1, second))
        for row0, nrows in ((0, 16), (16, 4))
    ]


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (33, 6)])
def test_the_bucket_is_the_rounded_up_logarithm(tokens, bucket):
    shapes = torch.tensor([[[number, 64, 0, 1] for number in range(16)]], dtype=torch.int32)
    problems = torch.tensor([[0, 0, 128, 128, 128, 0, 0, -1]])
    layer = Layer(problems, torch.zeros(1, dtype=torch.int32), shapes, 1)
    found, _ = tables_of(layer, torch.zeros(tokens, 1, dtype=torch.int64), 1, 4, 1, 1)
    assert found.tiles[0, 0, 0] == bucket


def test_several_programs_write_one_problem():
    # 1 problem in a table of 600 tiles: 3 programs, 1 tile in each column of 300.
    problems = torch.tensor([[0, 0, 38400, 38400, 128, 0, 0, -1]])
    shapes = torch.tensor([0, 16, 0, 1]).expand(1, 16, 4).int().contiguous()
    layer = Layer(problems, torch.zeros(1, dtype=torch.int32), shapes, 1)
    found, (tiles, _) = tables_of(layer, torch.zeros(17, 1, dtype=torch.int64), 1, 600, 1, 1)
    assert found.tiles[0].tolist() == [list(tile) for tile in tiles[0]]


@pytest.mark.parametrize("target_tiles", [1, 50, 300])
@pytest.mark.parametrize("tokens", [1, 5, 33, 200])
def test_no_routing_exceeds_the_bound_and_one_reaches_it(tokens, target_tiles):
    experts, top_k, tile = 6, 2, 16
    layer = make_layer(experts, seed=tokens, launches=1, tiles=(tile, 2 * tile))
    columns = column_tiles(layer.problems)
    generator = torch.Generator().manual_seed(tokens)
    total = tokens * top_k
    spread = torch.arange(total) % experts
    routings = [torch.full((total,), e) for e in range(experts)]
    routings += [torch.where(torch.arange(total) < experts, spread, e) for e in range(experts)]
    routings += [torch.randint(0, experts, (total,), generator=generator) for _ in range(20)]
    for max_split in (1, 4):
        reached = 0
        bound = tile_bound(
            tokens, top_k, columns,
            smallest_tile=tile, target_tiles=target_tiles, max_split=max_split,
        )  # fmt: skip
        for index in routings:
            counts, starts, *_ = route_reference(index.reshape(tokens, top_k), experts)
            shapes = layer.shapes.clone()
            shapes[..., 1] = tile
            for each in (shapes, layer.shapes):
                tiles, _ = tile_tables_reference(
                    counts, starts, layer.problems, layer.format_index, each,
                    launches=1, target_tiles=target_tiles, max_split=max_split,
                )  # fmt: skip
                reached = max(reached, len(tiles[0]))
        assert reached == bound if max_split == 1 else reached <= bound


def test_the_bound_by_hand():
    options = {"smallest_tile": 16, "target_tiles": 1, "max_split": 1}
    # 4 assignments, one to each of the 4 widest experts.
    assert tile_bound(2, 2, (3, 1, 1, 2, 1), **options) == 3 + 2 + 1 + 1
    # 18 assignments: 1 on each expert, and the 16 others make a second tile of the widest.
    assert tile_bound(18, 1, (3, 2), **options) == 3 + 2 + 3
    # 17: a second tile of the widest (6) beats one of each (5).
    assert tile_bound(17, 1, (3, 2), **options) == 6
    # 5 tiles are split in at most 4, but 9 tiles, or twice 5, would already be enough.
    assert tile_bound(2, 1, (3, 2), smallest_tile=16, target_tiles=9, max_split=4) == 16
    assert tile_bound(2, 1, (3, 2), smallest_tile=16, target_tiles=99, max_split=4) == 20


def test_the_widths_of_experts_come_from_their_problems():
    problems = torch.tensor([[0, 0, 100, 128, 128, 0, 2, -1], [0, 0, 300, 384, 128, 0, 0, -1],
                             [0, 0, 200, 256, 128, 0, 2, -1]])  # fmt: skip
    assert column_tiles(problems) == (3, 3)


def test_too_many_tokens_for_a_table_are_refused():
    options = {"smallest_tile": 16, "target_tiles": 1, "max_split": 1}
    check_bound(2, 2, (3, 2), 5, **options)
    message = (
        "2 tokens with 2 experts each can make 5 tiles, but the tile table has room for 4; make"
    )
    with pytest.raises(ValueError, match=message):
        check_bound(2, 2, (3, 2), 4, **options)


def test_tables_of_another_type_are_refused():
    layer = make_layer(2, seed=0)
    routed = route(torch.zeros(1, 1, dtype=torch.int64), 2)
    options = {"launches": 1, "bound": 8, "target_tiles": 1, "max_split": 1}
    with pytest.raises(
        ValueError, match=r"shapes is torch\.int64 of shape .*; expected contiguous"
    ):
        tile_tables(routed, layer.problems, layer.format_index, layer.shapes.long(), **options)
    many = torch.zeros(2049, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="2049 problems in one GEMM; a tile table takes 1 to 2048"):
        tile_tables(routed, many, torch.zeros(2049, dtype=torch.int32), layer.shapes, **options)

"""Generated products in Triton's interpreter against the definition, over ragged shapes.

Most cases multiply small integers with scales that are powers of two: every sum is then exact in
float32 whatever its order, so kernel and definition agree bit for bit. Cases with real numbers
agree within ``error_bounds``. What a kernel must not write, and what it must not read, is poison.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch

from mxq.kernels.arena import Problem, group_weights, size_of
from mxq.kernels.group_gemm import BUCKETS, GroupGemm, bucket_of, tile_shapes, unit_cost
from mxq.kernels.reference import (
    Inputs,
    RoundedInput,
    error_bounds,
    group_gemm_torch,
    make_inputs_torch,
)
from mxq.kernels.routing import route
from mxq.kernels.spec import Branch, KernelSpec, WeightFormat
from mxq.numerics import QuantizedWeight
from mxq.quantizers import quantize_rtn
from mxq.scheme import Scheme

GROUP_INPUTS = {"g128": 256, "g64": 192, "g32": 160, "grow": 200}  # K: two units, most ragged
A16 = [f"w{bits}a16_{group}_asym" for bits in (8, 6, 5, 4, 3, 2) for group in GROUP_INPUTS]
A8 = [f"w{bits}a8_grow_asym" for bits in (8, 6, 5, 4, 3, 2)]
GROUPED_A8 = ["w8a8_g128_sym", *(f"w{bits}a8_g128_asym" for bits in (6, 5, 4, 3, 2))]
A4 = ["w4a4_grow_asym", "w4a4_g128_asym", "w3a4_grow_sym", "w2a4_g128_sym"]
SCHEMES = ["bf16", "fp8", *A16, *A8, *GROUPED_A8, *A4, "w4a16_g128_sym", "w8a8_grow_sym"]
MAIN = ["bf16", "fp8", *(f"w{bits}a16_g128_asym" for bits in (8, 6, 5, 4, 3, 2))]
MAIN += [f"w{bits}a8_grow_asym" for bits in (8, 4, 2)]


@dataclass(frozen=True, slots=True)
class Case:
    """A product: ``counts[e]`` assignments to expert e, which has ``parts`` weights side by side.

    Weights take the schemes in turn. ``unassigned`` assignments name no expert. A small
    ``multiprocessors`` keeps K whole, which otherwise is cut into up to four slices.
    """

    note: str
    schemes: tuple[str, ...]
    counts: tuple[int, ...]
    n: int = 130
    k: int = 256
    parts: int = 1
    top_k: int = 1
    unassigned: int = 0
    bias: str = "none"
    multiprocessors: int = 132
    splits: tuple[int, ...] | None = None

    def __str__(self):
        return self.note


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case gave: bfloat16 [S, N], and what it was made from."""

    y_SN: torch.Tensor
    group: object
    inputs: Inputs
    routing: object
    splits: tuple[int, ...]

    @property
    def places(self):
        """Arguments of the definition."""
        r = self.routing
        return self.inputs, self.group, r.rows.long(), r.starts, r.counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote is not-a-number, or a number that is no index."""
    empty = torch.empty

    def poison(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        is_float = tensor.dtype.is_floating_point
        return tensor.fill_(float("nan") if is_float else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", poison)


def integers(low, high, *shape, seed):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def exact_weight(scheme, n, k, seed):
    """Random codes and zeros; scales 1/8 to 1. Floats are integers."""
    if scheme.kind != "int":
        codes_NK = integers(-8, 9, n, k, seed=seed).float()
        scale_N1 = (2.0 ** -integers(0, 4, n, 1, seed=seed + 1)).half()
        if scheme.kind == "bf16":
            return QuantizedWeight(codes_NK.bfloat16(), None, None, scheme)
        return QuantizedWeight(codes_NK.to(torch.float8_e4m3fn), scale_N1, None, scheme)
    groups = scheme.groups(k)
    codes_NK = integers(0, 2**scheme.w_bits, n, k, seed=seed).to(torch.uint8)
    scale_NG = (2.0 ** -integers(0, 4, n, groups, seed=seed + 1)).half()
    zero_NG = integers(0, 2**scheme.w_bits, n, groups, seed=seed + 2).to(torch.uint8)
    return QuantizedWeight(codes_NK, scale_NG, None if scheme.symmetric else zero_NG, scheme)


def exact_inputs(tokens, k, seed=50):
    """Integers up to 7, others for every kind of input; scales are powers of two."""

    def padded(values_TK):
        return torch.nn.functional.pad(values_TK, (0, -k % 128))

    def rounded(dtype, seed):
        values_TK = padded(integers(-7, 8, tokens, k, seed=seed))
        scale_T = 2.0 ** -integers(0, 3, tokens, seed=seed).float()
        sum_T = None if dtype == torch.float8_e4m3fn else values_TK.sum(1, dtype=torch.int32)
        return RoundedInput(values_TK.float().to(dtype), scale_T, sum_T)

    plain_TK, rotated_TK = (
        padded(integers(-7, 8, tokens, k, seed=seed + i)).bfloat16() for i in range(2)
    )
    kinds = (torch.int8, torch.int8, torch.float8_e4m3fn)
    return Inputs(plain_TK, rotated_TK, *(rounded(d, seed + 2 + i) for i, d in enumerate(kinds)))


def weights_of(case, make=exact_weight):
    problems = []
    for index in range(len(case.counts) * case.parts):
        expert, part = divmod(index, case.parts)
        scheme = Scheme.parse(case.schemes[index % len(case.schemes)])
        weight = make(scheme, case.n, case.k, seed=10 * index)
        has_bias = case.bias == "all" or (case.bias == "some" and index % 2 == 1)
        bias_N = integers(-64, 65, case.n, seed=index) / 8.0 if has_bias else None
        problems.append(Problem(weight, part * (case.n + 3), expert, bias_N))
    return group_weights(problems, [size_of(problem.weight) for problem in problems])


def index_of(case):
    """Expert numbers [T, top_k], shuffled; several numbers stand for no expert."""
    experts = len(case.counts)
    numbers = [e for e, count in enumerate(case.counts) for _ in range(count)]
    numbers += [(experts, -1, experts + 7)[i % 3] for i in range(case.unassigned)]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))
    return torch.tensor(numbers, dtype=torch.int64)[order].reshape(-1, case.top_k)


def run(case, folder, monkeypatch, *, make=exact_weight, inputs=None, **options):
    monkeypatch.setattr("mxq.kernels.group_gemm.multiprocessors", lambda _: case.multiprocessors)
    group, index_TR = weights_of(case, make), index_of(case)
    routing = route(index_TR, len(case.counts))
    inputs = exact_inputs(len(index_TR), case.k) if inputs is None else inputs
    gemm = GroupGemm(group, top_k=case.top_k, folder=folder, **options)
    product = gemm(inputs, routing, len(index_TR))
    y_SN, splits = outputs_of(product, routing, group)
    return Outcome(y_SN, group, inputs, routing, splits)


def outputs_of(product, routing, group):
    """Outputs with partial sums added up, 0 where no weight writes, which still is poison."""
    y_SN, splits = product.y_SN.clone(), tuple(product.splits_P.tolist())
    is_written = torch.zeros(y_SN.shape, dtype=torch.bool)
    for split, row in zip(splits, group.problems.tolist(), strict=True):
        start, count = (int(x[row[6]]) for x in (routing.starts, routing.counts))
        place = slice(start, start + count), slice(row[5], row[5] + row[2])
        is_written[place] = True
        if split > 1:
            assert y_SN[place].isnan().all()
            assert product.partial_LSN[split:, *place].isnan().all()
            y_SN[place] = product.partial_LSN[:split, *place].sum(0).bfloat16()
    assert not y_SN[is_written].isnan().any()
    assert y_SN[~is_written].isnan().all()
    if product.partial_LSN is not None:
        assert product.partial_LSN[:, ~is_written].isnan().all()
    return torch.where(is_written, y_SN, 0.0), splits


RAGGED = tuple(MAIN[i] for i in (0, 5, 8, 6, 1))  # bf16, w4a16, w8a8, w3a16, fp8
EDGES = [
    Case("no token at all", RAGGED, (0, 0, 0), unassigned=3),
    Case("one token in all", RAGGED, (0, 1, 0)),
    Case("all tokens to the last expert", RAGGED, (0, 0, 9)),
    Case("an expert just fills its tiles", RAGGED, (16, 32, 16)),
    Case("an expert of one token more than a tile", RAGGED, (17, 33, 1)),
    Case("every second assignment names no expert", RAGGED, (4, 0, 6, 2, 3), unassigned=15),
    Case("three experts for a token", RAGGED, (7, 1, 0, 12, 4), top_k=3),
    Case("one output", RAGGED, (3, 2, 1, 1, 2), n=1),
    Case("one output less than a tile", RAGGED, (3, 2, 1, 1, 2), n=127),
    Case("outputs of exactly one tile", RAGGED, (3, 2, 1, 1, 2), n=128),
    Case("outputs of one and a bit", RAGGED, (3, 2, 1, 1, 2), n=129),
    Case("gate and up side by side, a gap between", RAGGED, (3, 0, 18), parts=2),
    Case("one input", ("w4a16_grow_asym", "w8a8_grow_asym", "fp8", "bf16"), (2, 2, 2, 2), k=1),
    Case("one group of 32", ("w4a16_g32_asym", "bf16"), (2, 5), k=32),
    Case("half a unit", ("w5a16_g64_asym", "bf16", "w6a8_grow_asym"), (2, 5, 3), k=64),
    Case("a unit and a bit", ("w6a16_g32_asym", "w2a16_grow_asym", "bf16"), (2, 5, 3), k=160),
    Case("zero points of 8 bits, bias", ("w8a8_grow_asym",), (3, 17), bias="all"),
    Case("a bias on every weight, sliced", RAGGED, (3, 17, 1, 2, 5), bias="all"),
    Case("a bias on some weights", RAGGED, (3, 17, 1, 2, 5), parts=2, bias="some"),
    Case("K whole", RAGGED, (3, 0, 17, 2, 5), k=512, multiprocessors=0, splits=(1,) * 5),
    # Tiles of 128 outputs and 16 tokens: 2 * (1 + 2 + 1 + 1) = 10, below 4 * 5 = 2 * 10.
    Case("K in two slices", RAGGED, (3, 0, 17, 2, 5), k=512, multiprocessors=5, splits=(2,) * 5),
    Case("K in three slices of one unit", RAGGED, (3, 0, 17, 2, 5), k=384, splits=(3,) * 5),
    Case("K in four slices", RAGGED, (3, 0, 17, 2, 5), k=512, splits=(4,) * 5),
    Case("K in slices of two units and one", RAGGED, (3, 2, 5), k=640, n=8, splits=(3,) * 3),
    Case("middle plan, tails of a tile of 64", RAGGED, (65, 3, 64, 0, 40), n=129),
    Case("prefill plan, tails of a tile of 128", RAGGED[:3], (129, 0, 128), n=129),
    Case("dense: one weight for all tokens", ("w4a16_g128_asym",), (20,), bias="all"),
    Case("dense prefill", ("w2a16_g64_asym",), (140,), bias="all", n=128, k=128),
]
EACH = [
    Case(text, (text,), (0, 1, 17), n=40, k=GROUP_INPUTS.get("".join(text.split("_")[1:2]), 256))
    for text in SCHEMES
]
PAIRS = [Case(f"{a} with {b}", (a, b), (3, 2), n=8, k=128) for a, b in combinations(MAIN, 2)]
ALL = Case("all formats", tuple(MAIN), tuple(range(1, len(MAIN) + 1)), n=40, k=384, bias="some")


@pytest.mark.parametrize("case", [*EDGES, *EACH, *PAIRS, ALL], ids=str)
def test_products_of_small_integers_are_those_of_the_definition(case, folder, monkeypatch):
    outcome = run(case, folder, monkeypatch)
    assert case.splits is None or outcome.splits == case.splits
    assert torch.equal(outcome.y_SN, group_gemm_torch(*outcome.places))


def rounded_weight(scheme, n, k, seed):
    w_NK = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01
    return quantize_rtn(w_NK, scheme)


# The units of K one after the other in a loop, where the exact cases have a slice for each.
WHOLE = [replace(case, multiprocessors=0) for case in (*EACH, ALL)]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_products_of_real_numbers_agree_within_their_bounds(case, folder, monkeypatch):
    x_TK = torch.randn(sum(case.counts), case.k, generator=torch.Generator().manual_seed(3))
    inputs = make_inputs_torch(x_TK, True, ("bf16", "int8", "int4", "fp8"))
    outcome = run(case, folder, monkeypatch, make=rounded_weight, inputs=inputs)
    expected_SN = group_gemm_torch(*outcome.places)
    assert expected_SN.abs().max() > 0.1
    error_SN = (outcome.y_SN.float() - expected_SN.float()).abs()
    assert (error_SN <= error_bounds(*outcome.places).kernel_SN).all()


@pytest.mark.parametrize("text", ["w8a8_grow_asym", "w4a8_g128_asym", "w4a4_grow_asym"])
def test_integer_products_of_real_numbers_are_exact_in_one_slice(text, folder, monkeypatch):
    # Sums of integers have no order, and scales are multiplied in the order of the definition.
    case = Case("", (text,), (5, 17), k=128, multiprocessors=0)
    x_TK = torch.randn(22, 128, generator=torch.Generator().manual_seed(3))
    inputs = make_inputs_torch(x_TK, True, ("int8", "int4"))
    outcome = run(case, folder, monkeypatch, make=rounded_weight, inputs=inputs)
    assert torch.equal(outcome.y_SN, group_gemm_torch(*outcome.places))


@pytest.mark.parametrize("note", ["all formats", "a bias on some weights"])
def test_a_launch_for_each_format_gives_the_same_bits(note, folder, monkeypatch):
    (case,) = [case for case in (*EDGES, ALL) if case.note == note]
    x_TK = torch.randn(sum(case.counts), case.k, generator=torch.Generator().manual_seed(3))
    inputs = make_inputs_torch(x_TK, True, ("bf16", "int8", "fp8"))
    mixed, single = (
        run(case, folder, monkeypatch, make=rounded_weight, inputs=inputs, launches=launches)
        for launches in ("mixed", "single")
    )
    assert mixed.splits == single.splits
    assert torch.equal(mixed.y_SN.view(torch.int16), single.y_SN.view(torch.int16))


def test_the_same_input_gives_the_same_bits(folder, monkeypatch):
    first, second = (run(ALL, folder, monkeypatch, make=rounded_weight) for _ in range(2))
    assert torch.equal(first.y_SN.view(torch.int16), second.y_SN.view(torch.int16))


def test_two_tile_shapes_of_a_format_share_a_kernel(folder, monkeypatch):
    form, bf16 = WeightFormat(4, "bf16", 128), WeightFormat(16, "bf16")
    branches = (Branch(form, 32, 3), Branch(bf16, 16, 3), Branch(form, 16, 3))
    spec = KernelSpec(branches, num_warps=4)
    case = Case("", ("w4a16_g128_asym", "bf16", "w4a16_g128_asym"), (16, 40, 17), multiprocessors=0)
    outcome = run(case, folder, monkeypatch, specs=[spec])
    assert torch.equal(outcome.y_SN, group_gemm_torch(*outcome.places))
    gemm = GroupGemm(outcome.group, specs=[spec], folder=folder)
    tables = gemm.tables(outcome.routing, 73)
    tiles = tables.tiles[0, : int(tables.counts[0])].tolist()
    # (branch, problem, tokens): 16 tokens fit a tile of 16, 17 one of 32, 40 take 16 + 16 + 8.
    found = {(tile[0], tile[1], tile[3]) for tile in tiles}
    assert found == {(2, 0, 16), (1, 1, 16), (1, 1, 8), (0, 2, 17)}


# --- Choices ---


def test_tile_shapes_take_the_smallest_tile_that_holds_the_tokens():
    w4, bf16 = WeightFormat(4, "bf16", 128), WeightFormat(16, "bf16")
    specs = [
        KernelSpec((Branch(w4, 64, 2), Branch(w4, 16, 2)), num_warps=4),
        KernelSpec((Branch(bf16, 128, 2),), num_warps=8),
    ]
    shapes = tile_shapes([w4, bf16], specs).tolist()
    assert [row[:3] for row in shapes[0]] == [[1, 16, 0]] * 5 + [[0, 64, 0]] * (BUCKETS - 5)
    assert [row[:3] for row in shapes[1]] == [[0, 128, 1]] * BUCKETS


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 0), (1, 0), (2, 1), (16, 4), (17, 5), (2**15, 15), (2**20, 15)]
)
def test_buckets_by_hand(tokens, bucket):
    assert bucket_of(tokens) == bucket


@pytest.mark.parametrize(
    ("form", "tokens", "cycles"),
    [
        (WeightFormat(4, "bf16", 128), 16, 482),  # 8192 bytes / 17 = 481.9; 64 to multiply
        (WeightFormat(2, "bf16", 128), 128, 512),  # 128 * 128 * 128 / 4096; 241 to read
        (WeightFormat(2, "int8"), 128, 256),
    ],
)
def test_the_cost_of_a_unit_by_hand(form, tokens, cycles):
    assert unit_cost(Branch(form, tokens, 2)) == cycles


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "plan"),
    [
        (8, 2, 1, "decode"),
        (8, 2, 95, "decode"),  # 190 assignments to 8 experts; the limit is 24 each
        (8, 2, 97, "middle"),
        (8, 2, 385, "prefill"),
        (1, 1, 24, "decode"),
        (1, 1, 96, "middle"),
        (1, 1, 97, "prefill"),
    ],
)
def test_the_plan_follows_the_tokens_of_an_expert(experts, top_k, tokens, plan):
    group = weights_of(Case("", ("bf16",), (0,) * experts, n=1, k=1))
    assert GroupGemm(group, top_k=top_k).plan_for(tokens).name == plan


def test_inputs_are_those_that_the_weights_multiply():
    case = Case("", ("w4a4_grow_sym", "w8a8_grow_sym", "w4a8_grow_sym"), (1, 1, 1), n=1, k=1)
    assert GroupGemm(weights_of(case)).inputs == ("int8", "int4")


def test_a_call_after_prepare_makes_no_kernel(folder, monkeypatch):
    gemm = GroupGemm(weights_of(Case("", ("w3a16_g32_sym",), (1,), n=1, k=32)), folder=folder)
    gemm.prepare(1)
    monkeypatch.setattr("mxq.kernels.group_gemm.build", None)  # a call of None raises
    gemm(exact_inputs(1, 32), route(torch.zeros(1, 1, dtype=torch.int64), 1), 1)
    with pytest.raises(TypeError):
        gemm.prepare(100)


# --- Mistakes ---


def test_an_input_that_was_not_made_is_named(folder, monkeypatch):
    case = Case("", ("w4a16_g128_asym", "w8a8_grow_asym"), (1, 1))
    inputs = replace(exact_inputs(2, case.k), int8=None)
    with pytest.raises(ValueError, match="needs the input 'int8', which is None; make it too"):
        run(case, folder, monkeypatch, inputs=inputs)


def test_kernels_that_lack_a_format_are_refused():
    group = weights_of(Case("", ("w4a16_g128_asym", "bf16"), (1, 1)))
    spec = KernelSpec((Branch(WeightFormat(16, "bf16"), 16, 2),), num_warps=4)
    with pytest.raises(ValueError, match=r"0 of the kernels given .* w4a16_g128 \(.*: bf16\)"):
        GroupGemm(group, specs=[spec])


def test_a_format_in_two_kernels_is_refused():
    group = weights_of(Case("", ("bf16",), (1,)))
    specs = [
        KernelSpec((Branch(WeightFormat(16, "bf16"), tokens, 2),), num_warps=4)
        for tokens in (16, 32)
    ]
    with pytest.raises(ValueError, match="2 of the kernels given have a branch for bf16"):
        GroupGemm(group, specs=specs)


def test_a_table_without_room_is_refused_before_a_launch(folder):
    group = weights_of(Case("", ("bf16",), (0,)))
    gemm = GroupGemm(group, folder=folder)
    few, many = (route(torch.zeros(tokens, 1, dtype=torch.int64), 1) for tokens in (1, 20))
    tables = gemm.tables(few, 1)  # 2 tiles of outputs in 2 slices
    # 20 tokens are 2 tiles of 16: 2 * 2 * 2 in all.
    with pytest.raises(ValueError, match="can make 16 tiles, but the tile table has room for 8"):
        gemm.launch(exact_inputs(20, 256), many, tables, 20)


def test_a_routing_of_other_tokens_is_refused(folder):
    gemm = GroupGemm(weights_of(Case("", ("bf16",), (0, 0))), top_k=2, folder=folder)
    routing = route(torch.zeros(3, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="6 assignments is not one of 2 tokens with 2 experts"):
        gemm(exact_inputs(3, 256), routing, 2)

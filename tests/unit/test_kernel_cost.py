"""Tile and launch times against hand calculations, simulated schedules and drawn tokens."""

import heapq
import json
import math
import random

import numpy as np
import pytest
from scipy.stats import binom

from mxq.artifacts import BlockInfo, KernelCase, KernelTiming
from mxq.kernels.spec import TILE_PLANS, format_of
from mxq.scheme import Scheme, parse_schemes
from mxq.search import CostModel, Device
from mxq.search.device import Multiprocessor
from mxq.search.figures import BranchFigures, load_figures
from mxq.search.fit import fit_branch, fit_launch, plan_of_tile, predict_us
from mxq.search.kernel_cost import (
    BranchConstants,
    KernelModel,
    Products,
    branch_key,
    launch_time,
    tile_time,
    unit_cycles,
)
from mxq.search.launches import DRAWS, launches, plan_of
from mxq.search.profiles import DeviceProfile, profile_name
from mxq.search.tiles import expected_tiles, makespan, max_split, split_factor

DECODE, MIDDLE, PREFILL = TILE_PLANS

# 2 multiprocessors at 1000 MHz: 1 us is 1000 cycles. 8 GB/s are 4 bytes a cycle for each of them,
# 2.048 TFLOP/s (bf16) 1024 operations a cycle.
TOY = Device(
    name="toy",
    bandwidth_gb_s=8.0,
    tflop_s={"bf16": 2.048, "int8": 4.096, "fp8": None, "int4": None},
    sm_count=2,
    launch_us=3.0,
    sources={},
    gpu_names=("TOY 1",),
    multiprocessor=Multiprocessor(90, 1000.0, 32.0, 500.0, 0.5, 0.5, 0.5),
)
W4 = Scheme.parse("w4a16_g128_sym")
FIGURES = BranchFigures(loop_instructions=400, alu_instructions=100, step=128, warps=4)


def block(name, *, expert=0, out=128, inner=256, tokens=5, site="s", projection="up"):
    return BlockInfo(name, 0, expert, projection, out, inner, tokens, site)


def price(model, blocks, schemes, *, tokens, calibration_tokens=10):
    question = {"tokens": tokens, "calibration_tokens": calibration_tokens}
    return CostModel(TOY, model, "test").latency_us(blocks, parse_schemes(schemes), **question)


# Tiles


@pytest.mark.parametrize(("tokens", "share", "tile"), [(1, 0.3, 16), (40, 0.5, 16), (700, 0.1, 64)])
def test_expected_tiles_are_the_sum_over_all_counts(tokens, share, tile):
    counts = np.arange(tokens + 1)
    by_hand = float((binom.pmf(counts, tokens, share) * np.ceil(counts / tile)).sum())
    assert expected_tiles(tokens, np.array([share]), tile) == pytest.approx([by_hand], rel=1e-9)


def test_expected_tiles_agree_with_drawn_tokens():
    drawn = np.random.default_rng(1).binomial(8192, 0.0157, size=200_000)
    tiles = np.ceil(drawn / 16)
    error = 4 * tiles.std() / math.sqrt(len(tiles))
    assert expected_tiles(8192, np.array([0.0157]), 16)[0] == pytest.approx(tiles.mean(), abs=error)


def test_expected_tiles_of_no_share_and_of_all_tokens():
    assert expected_tiles(33, np.array([0.0, 1.0, 0.0]), 16).tolist() == [0.0, 3.0, 0.0]


def test_expected_tiles_have_a_value_between_whole_tokens():
    low, middle, high = (expected_tiles(t, np.array([0.4]), 16)[0] for t in (40, 40.5, 41))
    assert low < middle < high


def scheduled(durations, counts, slots):
    """The schedule tile by tile: each starts where a program ends first, the longest ones first."""
    free_at = [0.0] * slots
    tiles = sorted((d for d, n in zip(durations, counts, strict=True) for _ in range(n)), reverse=1)
    for duration in tiles:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


@pytest.mark.parametrize("seed", range(30))
def test_makespan_is_that_of_the_schedule_tile_by_tile(seed):
    rng = random.Random(seed)
    kinds, slots = rng.randint(1, 6), rng.choice([1, 2, 7, 132])
    durations = [rng.choice([1.0, 3.5, rng.uniform(0.1, 50)]) for _ in range(kinds)]
    counts = [rng.choice([0, 1, rng.randint(2, 3000)]) for _ in range(kinds)]
    expected = scheduled(durations, counts, slots)
    assert makespan(durations, counts, slots) == pytest.approx(expected, rel=1e-9)


def test_split_is_the_least_that_fills_the_slots():
    assert [split_factor(tiles, 100) for tiles in (100, 99, 50, 49, 1)] == [1, 2, 2, 4, 4]
    assert split_factor(1, 100, 1) == 1


def test_rules_of_the_kernels_are_those_of_the_kernels():
    group_gemm = pytest.importorskip("mxq.kernels.group_gemm")
    assert max_split(DECODE, group_gemm.SPLIT_ROWS) == group_gemm.MAX_SPLIT
    assert max_split(DECODE, group_gemm.SPLIT_ROWS + 1) == 1
    assert max_split(MIDDLE, 1) == 1


# Tile times


def test_cycles_of_a_unit_by_hand():
    # 128 rows x (64 bytes of codes + 4 of scale and zero) = 8704 bytes, 4 a cycle: 2176. From the
    # cache those and 16 tokens x 128 x 2 bytes, 32 a cycle: 12800 / 32 = 400. Issue: 400 x 4 warps
    # / 4. Matrix: 2 x 16 x 128 x 128 operations, 1024 a cycle.
    cycles = unit_cycles(format_of(W4), DECODE, TOY, FIGURES)
    assert cycles.first == {"memory": 2176.0, "issue": 400.0, "matrix": 512.0}
    assert cycles.repeat == {"memory": 400.0, "issue": 400.0, "matrix": 512.0}


def test_integer_pipe_and_loops_of_half_a_unit_count_twice():
    figures = BranchFigures(loop_instructions=400, alu_instructions=300, step=64, warps=8)
    # 2 x 300 > 400 instructions, x 8 warps / 4 schedulers, x 128 / 64.
    assert unit_cycles(format_of(W4), DECODE, TOY, figures).first["issue"] == 2400


def test_four_bit_inputs_run_as_int8_and_read_no_metadata_of_groups():
    cycles = unit_cycles(format_of(Scheme.parse("w4a4_grow_sym")), DECODE, TOY, None)
    # 128 x 64 bytes / 4; 2 x 16 x 128 x 128 operations, 2048 a cycle.
    assert cycles.first == {"memory": 2048.0, "issue": 0.0, "matrix": 256.0}


def test_the_slowest_unit_holds_up_the_loop():
    cycles = unit_cycles(format_of(W4), DECODE, TOY, FIGURES)
    time = tile_time(cycles, BranchConstants(500.0, 0.5, 0.25, 0.5))
    assert (time.first, time.repeat) == (2176 / 0.5, 400 / 0.25)
    # A unit that never was the slowest has no say.
    assert tile_time(cycles, BranchConstants(500.0, None, None, 0.5)).first == 512 / 0.5


def products(tokens, *, out, units, first=1000.0, repeat=400.0, outside=500.0, slices=1):
    ones = np.ones(len(tokens))
    return Products(
        ones * outside, ones * first, ones * repeat, np.array(tokens), np.array(out), units, slices
    )


MODEL = KernelModel(TOY, {branch_key(format_of(W4), plan): FIGURES for plan in TILE_PLANS})


def test_a_launch_of_few_tiles_lasts_as_long_as_one():
    # 2 tiles on 2 multiprocessors: each has one to itself. 500 + 3 x 1000 cycles.
    time = launch_time(products([16], out=[256], units=3), DECODE, MODEL)
    assert (time.tiles, time.rounds, time.tiles_us) == (2, 1, 3.5)
    assert time.total_us == 6.5


def test_programs_on_one_multiprocessor_share_it():
    # 9 tiles, 8 slots: 4 share a multiprocessor, loops take 4 x 3000, and one tile comes after.
    time = launch_time(products([1] * 9, out=[128] * 9, units=3), DECODE, MODEL)
    assert (time.rounds, time.longest_us, time.tiles_us) == (2, 12.5, 25.0)
    # Shared evenly: 9 x (500 / 4 + 3000) cycles on 2 multiprocessors.
    assert time.work_us == pytest.approx(9 * 3.125 / 2)


def test_blocks_of_tokens_share_one_load_of_the_weights():
    # 128 tokens under the plan of 64: 2 tiles, (1000 + 400) / 2 each for a unit.
    time = launch_time(products([128], out=[128], units=2), MIDDLE, MODEL)
    assert (time.tiles, time.tiles_us) == (2, 0.5 + 2 * 0.7)


def test_a_split_launch_has_shorter_tiles():
    # 1 tile for 8 slots: 4 slices of ceil(6 / 4) units, 2 on a multiprocessor.
    time = launch_time(products([1], out=[128], units=6, slices=4), DECODE, MODEL)
    assert (time.split, time.tiles, time.tiles_us) == (4, 4, 0.5 + 2 * 2.0)


def test_experts_without_tokens_have_no_tiles():
    time = launch_time(products([0, 0], out=[128, 128], units=2), DECODE, MODEL)
    assert (time.tiles, time.tiles_us, time.work_us, time.total_us) == (0, 0.0, 0.0, 3.0)


# Blocks and plans


def test_price_of_a_dense_block_by_hand():
    # 20 tokens: 2 tiles of 16 in one column, 2 units. 20 assignments allow a split: 2 tiles, 8
    # slots: 4, but there are 2 units, so 2 slices. Outside: 2 x 2 x 500 / 4; loops: 2 units x
    # (2176 / 0.5 + 512 / 0.5); both on 2 multiprocessors.
    cycles = 2 * 2 * 500 / 4 + 2 * (2176 / 0.5 + 512 / 0.5)
    expected = cycles / 2 / 1000 + 3
    found = price(MODEL, [block("a", expert=None)], "w4a16_g128_sym", tokens=20)
    assert found == pytest.approx(np.array([[expected]]))


def test_price_of_an_expert_that_half_of_the_tokens_go_to():
    # 2 tokens: reached with 3/4, one tile then. Half a tile of 2 slots, so all of 2 slices.
    expected = 0.75 * (2 * 500 / 4 + 2 * 2176 / 0.5) / 2 / 1000 + 3
    found = price(MODEL, [block("a")], "w4a16_g128_sym", tokens=2)
    assert found == pytest.approx(np.array([[expected]]))


def test_gate_and_up_of_a_site_are_one_launch_and_down_another():
    names = ("gate", "up", "down")
    blocks = [block(f"{e}{n}", expert=e, projection=n) for e in range(2) for n in names]
    assert sorted(launches(blocks).values()) == [[0, 1, 3, 4], [2, 5]]
    free = KernelModel(TOY, {}, {}, launch_us=8.0)
    unused = [block(b.name, expert=b.expert, projection=b.projection, tokens=0) for b in blocks]
    assert price(free, unused, "bf16", tokens=4).sum() == pytest.approx(2 * 8.0)


def test_the_plan_is_that_of_the_kernels_own_rule():
    group_gemm = pytest.importorskip("mxq.kernels.group_gemm")
    for experts, top_k in ((1, 1), (8, 2), (60, 4)):
        gemm = group_gemm.GroupGemm.__new__(group_gemm.GroupGemm)
        gemm._columns, gemm.top_k = (1,) * experts, top_k
        blocks = [block(str(e), expert=e if experts > 1 else None) for e in range(experts)]
        shares = np.full(experts, top_k / experts)
        for tokens in (1, 16, 30, 64, 300, 1000, 4000):
            assert plan_of(blocks, shares, tokens) == gemm.plan_for(tokens)


def test_a_scheme_without_kernel_is_decoded_and_multiplied_as_bf16():
    blocks = [block("a", expert=None)]
    plain, odd = price(MODEL, blocks, "w4a8_g64_sym,bf16", tokens=5)[0][::-1]
    # Read 128 x 256 codes of 4 bits and 512 scales of 16, write 2 bytes each; 8000 bytes in 1 us.
    bytes_moved = 128 * 256 / 2 + 128 * 4 * 2 + 2 * 128 * 256
    assert odd - plain == pytest.approx(bytes_moved / 8000 + 3)


def step(blocks, schemes, *, tokens, model=MODEL):
    chosen = [Scheme.parse(scheme) for scheme in schemes]
    return CostModel(TOY, model, "test").step(blocks, chosen, tokens=tokens, calibration_tokens=10)


def test_a_step_of_dense_blocks_is_the_sum_of_its_launches():
    blocks = [block(n, expert=None, site=n, out=384) for n in "ab"]
    found = step(blocks, ["w4a16_g128_sym"] * 2, tokens=20)
    # Each: 3 columns x 2 blocks of tokens in 2 slices of 1 unit, 12 tiles for 8 slots, 4 on a
    # multiprocessor: 500 + 4 x (4352 + 1024) / 2 cycles, twice.
    assert found.total_us == pytest.approx(2 * (3 + 2 * (0.5 + 4 * 2.688)))
    assert found.launches == 2
    assert found.branches == {"w4a16_g128/16"}
    assert found.additive_us == pytest.approx(found.work_us)


def test_a_step_averages_over_tokens_as_they_fall():
    blocks = [block(str(e), expert=e, tokens=5) for e in range(4)]
    found = step(blocks, ["w4a16_g128_sym"] * 4, tokens=3)
    generator, times = np.random.default_rng(0), []
    for _ in range(DRAWS):
        counts = [generator.binomial(3, 0.5) for _ in blocks]
        loop, reached = 2176 / 0.5, sum(count > 0 for count in counts)
        slices = 1 if reached >= 8 else 2  # of the 2 units there are
        tiles = reached * slices
        resident = math.ceil(tiles / 2)
        alone = (500 + resident * 2 / slices * loop) / 1000 if reached else 0
        times.append(3 + alone * math.ceil(tiles / 8))
    assert found.total_us == pytest.approx(sum(times) / DRAWS)


def test_a_roofline_has_no_step():
    model = CostModel(TOY)
    assert model.step([block("a")], [W4], tokens=1, calibration_tokens=10) is None


# Compiled figures


def test_figures_come_from_a_file_of_the_architecture(tmp_path):
    branch = {"loop_instructions": 10, "alu_instructions": 3, "step": 128, "warps": 4}
    fields = {"arch": 90, "triton": "1", "ptxas": "2", "branches": {"bf16/16": branch}}
    path = tmp_path / "kernels-sm90.json"
    path.write_text(json.dumps(fields))
    figures = load_figures(90, tmp_path)
    assert figures.source == "Triton 1, ptxas 2"
    assert figures.branches == {"bf16/16": BranchFigures(10, 3, 128, 4)}
    assert load_figures(80, tmp_path) is None
    branch["alu_instructions"] = 11
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="11 of 10 instructions of a loop cannot be for the integ"):
        load_figures(90, tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"compiled kernels \(TypeError.*compile_kernels.py"):
        load_figures(90, tmp_path)


def test_the_committed_figures_cover_every_scheme_that_a_kernel_serves():
    figures = load_figures(90)
    schemes = parse_schemes(
        "w2a16_g32_asym,w3a16_g64_asym,w4a16_grow_asym,w5a16_g128_asym,w6a16_g128_asym,bf16,fp8,"
        "w8a16_g128_asym,w8a8_grow_sym,w4a8_grow_sym,w4a4_grow_sym,w3a8_g128_asym"
    )
    wanted = {branch_key(format_of(s), plan) for s in schemes for plan in TILE_PLANS}
    assert wanted <= set(figures.branches)


# Fits


def timing(case, us):
    return KernelTiming(case, 5, us, us, us)


def cases(scheme, plan):
    return [
        KernelCase(scheme, plan.tokens, experts, tokens, out, inner)
        for experts in (1, 3, 20)
        for out, inner in ((128, 256), (512, 1024), (256, 640))
        for tokens in (plan.tokens, 4 * plan.tokens)
    ]


@pytest.mark.parametrize(
    ("scheme", "plan", "instructions", "constants"),
    [
        # A unit needs 2176 cycles of memory, then 900 of issue or 512 of the matrix unit.
        ("w4a16_g128_sym", DECODE, 900, BranchConstants(700.0, 0.8, 0.7, None)),
        ("w4a16_g128_sym", DECODE, 400, BranchConstants(700.0, 0.8, None, 0.3)),
        # 4096 of the matrix unit against 2176 of memory: only one is ever seen.
        ("w4a16_g128_sym", PREFILL, 400, BranchConstants(1500.0, None, None, 0.7)),
        # 1600 of issue against 1152 of memory.
        ("w2a16_g128_sym", DECODE, 1600, BranchConstants(90.0, None, 0.75, None)),
        # 8192 of memory, then 2048 of the matrix unit.
        ("bf16", MIDDLE, 200, BranchConstants(2000.0, 0.55, None, 0.5)),
    ],
)
def test_the_fit_finds_the_constants_behind_the_times(scheme, plan, instructions, constants):
    parsed = Scheme.parse(scheme)
    figures = BranchFigures(instructions, 0, 128, 4)
    timings = [
        timing(case, predict_us(case, TOY, figures, constants, 3.0)) for case in cases(parsed, plan)
    ]
    found = fit_branch(timings, TOY, figures, 3.0)
    assert found.constants.tile_cycles == pytest.approx(constants.tile_cycles, rel=1e-6)
    for limit, value in constants.efficiencies.items():
        assert found.constants.efficiencies[limit] == (value and pytest.approx(value, rel=1e-6))
    assert max(found.errors) < 1e-6


def test_the_fit_of_noisy_times_is_judged_on_times_that_it_has_not_seen():
    constants, rng = BranchConstants(700.0, 0.8, 0.3, None), random.Random(0)
    timings = [
        timing(case, predict_us(case, TOY, FIGURES, constants, 3.0) * rng.uniform(0.95, 1.05))
        for case in cases(W4, DECODE)
    ]
    found = fit_branch(timings, TOY, FIGURES, 3.0)
    assert found.constants.memory_efficiency == pytest.approx(0.8, rel=0.05)
    others = fit_branch(timings[1:], TOY, FIGURES, 3.0).constants
    assert found.predicted_us[0] == predict_us(timings[0].case, TOY, FIGURES, others, 3.0)
    assert 0 < max(found.errors) < 0.1


def test_a_launch_without_tiles_is_the_overhead():
    empty = [timing(KernelCase(W4, 16, 1, 0, 128, 128), us) for us in (1.0, 2.5, 9.0)]
    assert fit_launch(empty, TOY) == 2.5
    assert fit_launch([], TOY) == TOY.launch_us


def test_times_that_nothing_explains_are_refused():
    case = KernelCase(W4, 16, 1, 16, 128, 256)
    with pytest.raises(ValueError, match="3 timings of w4a16_g128/16; a fit needs 4"):
        fit_branch([timing(case, 5.0)] * 3, TOY, FIGURES, 3.0)
    # The launch alone takes longer than what was measured.
    with pytest.raises(ValueError, match="no constants explain the 5 timings of w4a16_g128/16"):
        fit_branch([timing(case, 5.0)] * 5, TOY, FIGURES, 30.0)
    with pytest.raises(ValueError, match="no tile plan has tiles of 17 tokens"):
        plan_of_tile(17)


# Profiles


def profile(**changes):
    timings = [
        timing(case, predict_us(case, TOY, FIGURES, BranchConstants(700.0, 0.8, None, 0.3), 4.0))
        for case in cases(W4, DECODE)
    ]
    fields = {
        "gpu": "TOY 1",
        "device": TOY,
        "launch_us": 4.0,
        "branches": {"w4a16_g128/16": fit_branch(timings, TOY, FIGURES, 4.0)},
        "date": "2026-01-02",
        "clocks_mhz": {"sm": 1000.0},
        "versions": {"triton": "3.6.0"},
    }
    return DeviceProfile(**(fields | changes))


def test_a_profile_prices_with_what_was_measured():
    model = profile().kernel_model(None)
    blocks = [block("a", expert=None)]
    # As by hand above, with 700 cycles outside the loop and efficiencies 0.8 and 0.3.
    cycles = 2 * 2 * 700 / 4 + 2 * (2176 / 0.8 + 512 / 0.3)
    found = price(model, blocks, "w4a16_g128_sym", tokens=20)
    assert found == pytest.approx(np.array([[cycles / 2 / 1000 + 4]]))


def test_a_profile_says_what_it_is():
    text = "measured on TOY 1 on 2026-01-02 with Triton 3.6.0, 1 branch, model error median 0.0 %"
    assert profile().describe() == text
    assert profile_name("NVIDIA H200", "3.6.0") == "nvidia-h200-triton3.6.0.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": {}}, "the profile of TOY 1 holds no branch"),
        ({"launch_us": -1.0}, "a launch of -1 us"),
        ({"versions": {}}, "does not name its Triton version"),
    ],
)
def test_a_profile_of_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        profile(**changes)


def test_constants_that_no_kernel_has_are_refused():
    with pytest.raises(ValueError, match="an efficiency of 0 is not between 0 and 10"):
        BranchConstants(1.0, 0.0, None, None)
    with pytest.raises(ValueError, match="needs at least one efficiency"):
        BranchConstants(1.0, None, None, None)
    with pytest.raises(ValueError, match="-1 cycles of a tile outside its loop"):
        BranchConstants(-1.0, 1.0, None, None)

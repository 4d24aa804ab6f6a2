"""The benchmark of the products without a GPU: cases, weights, checks, peers' inputs, goals, page.

Nothing is timed here: a dry run has no times, and goals are judged on rows made by hand.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from group_gemm import checks, peers, rows, timing
from group_gemm.cases import Case, all_cases
from group_gemm.goals import GOALS, judge
from group_gemm.page import timing_sections
from group_gemm.products import error_over_bound, make_groups, make_pair
from group_gemm.shapes import (
    MODELS,
    TINY,
    TOKENS,
    Model,
    choose_experts,
    expert_counts,
    expert_shares,
    mixes,
    plan_named,
)
from group_gemm.timing import CudaClock, NoClock, Times, measure_ceilings
from group_gemm.weights import random_group, touched_bytes

from mxq.kernels.arena import weight_of
from mxq.kernels.group_gemm import SPLIT_ROWS
from mxq.kernels.layout import layout_of, to_kernel_order
from mxq.kernels.spec import TILE_PLANS, format_of, tile_plan
from mxq.scheme import Scheme

ROOT = Path(__file__).resolve().parents[2]

KEYS = {"runner": "mxq", "kind": "pair", "routing": "uniform", "launches": "mixed"}


def row(**values):
    base = {**KEYS, "identical_bits": True, "weight_tb_s": 1.0, "model": "Mixtral-8x7B"}
    return {**base, "key": "k", "tokens": 64, "median_us": 10.0, **values}


def verdict(name, rows_):
    (found,) = (v for v in judge(rows_) if v.goal.name == name)
    return found


@pytest.fixture
def program(tmp_path):
    def run(*arguments):
        command = [sys.executable, ROOT / "benchmarks" / "bench_group_gemm.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    return run


def test_a_dry_run_writes_rows_without_times_and_goes_on_where_it_stopped(program, tmp_path):
    path = tmp_path / "dry.json"
    command = ("--dry-run", "--json", path, "--only", "/w4a16_g128_asym/1/uniform/mixed")
    done = program(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    kinds = {found["kind"] for found in results["rows"] if found["runner"] == "mxq"}
    assert kinds == {"pair", "layer"}
    for found in results["rows"]:
        for key in ("median_us", "p10_us", "p90_us", "roofline_share", "weight_tb_s", "tflop_s"):
            assert found[key] is None
    assert all(check["passed"] for check in results["checks"])
    assert all(value is None for value in results["ceilings"].values())
    assert "not measured" in done.stdout
    again = program(*command)
    assert "0 checks" in again.stdout
    assert json.loads(path.read_text())["rows"] == results["rows"]


def test_a_dry_run_does_not_write_into_results(program):
    path = ROOT / "benchmarks" / "results" / "group-gemm-dry.json"
    done = program("--dry-run", "--json", path)
    assert done.returncode != 0
    assert "write it elsewhere" in done.stderr
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed(program, tmp_path):
    done = program("--json", tmp_path / "times.json")
    assert done.returncode != 0
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "times.json").exists()


def test_the_cases_are_those_of_the_plan_each_once_and_what_goals_need_first():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    assert {case.tokens for case in cases} == set(TOKENS)
    assert {case.model for case in cases} == {model.name for model in MODELS}
    assert {case.routing for case in cases} == {"uniform", "zipf", "traced"}
    assert cases[0] == Case("pair", "mxq", MODELS[0].name, "bf16", 64)
    needed = Case("pair", "mxq", "Mixtral-8x7B", "mix-w4-size", 256, launches="single")
    assert cases.index(needed) < 200


def test_mixes_keep_their_bits_and_their_schemes():
    # The trained model's rows are 256 wide, where a scale for a row costs 0.06 to 0.08 bits.
    bits = {"mix-2.25": 2.25, "mix-w3-size": 3.148, "mix-w4-size": 4.156, "mix-prefill": 4.156}
    for name, expected in bits.items():
        for model in MODELS:
            plan = plan_named(name, model)
            assert plan.stored_bits(model) == pytest.approx(expected, abs=0.2)
            offered = {s for counts in mixes()[name].values() for s in counts}
            assert {str(scheme) for scheme in (*plan.first, *plan.down)} <= offered
            assert len(plan.down) == model.experts


def test_bits_of_a_uniform_plan_by_hand():
    # 4 bits, and a 16-bit scale and a 4-bit zero for 128 weights.
    assert plan_named("w4a16_g128_asym", TINY).stored_bits(TINY) == 4 + 20 / 128


@pytest.mark.parametrize("routing", ["uniform", "zipf", "traced"])
def test_a_token_takes_different_experts_in_the_wanted_proportions(routing):
    model = Model("m", 256, 128, 40, 4)
    index = choose_experts(model, 4000, routing)
    assert index.shape == (4000, 4)
    assert all(len(set(token)) == 4 for token in index[:200].tolist())
    shares = expert_shares(40, routing)
    assert sum(shares) == pytest.approx(1.0)
    # Drawing without replacement flattens: the busiest has less than its share, but not much less.
    counts = sorted(expert_counts(index, 40), reverse=True)
    assert 0.5 * shares[0] < counts[0] / 16000 < 1.1 * shares[0]


def test_the_traced_shares_of_as_many_experts_are_the_mean_of_the_layers():
    layers = json.loads((ROOT / "benchmarks/group_gemm/routing.json").read_text())["layers"]
    largest = [max(layer) / sum(layer) for layer in layers]
    assert expert_shares(16, "traced")[0] == pytest.approx(sum(largest) / len(largest))


@pytest.mark.parametrize("name", ["w3a16_g128_asym", "w8a8_grow_sym", "fp8", "bf16"])
def test_weights_made_in_kernel_order_are_a_valid_arena(name):
    scheme = Scheme.parse(name)
    group = random_group((scheme,) * 4, 128, 256, parts=2, device="cpu")
    layout = layout_of(format_of(scheme))
    for index in range(4):
        q = weight_of(group, index)
        ordered = to_kernel_order(q.codes_NK, layout)
        start = group.problems[index, 0]
        assert torch.equal(group.words[start : start + len(ordered)], ordered)
        assert q.scale_NG is None or bool((q.scale_NG > 0).all())
    assert group.problems[:, 5].tolist() == [0, 128, 0, 128]
    assert group.problems[:, 6].tolist() == [0, 0, 1, 1]
    assert group.out_features == 256


def test_only_experts_with_tokens_count_as_read():
    scheme = Scheme.parse("w4a16_g128_asym")
    group = random_group((scheme,) * 6, 128, 256, parts=2, device="cpu")
    # 128 x 256 codes of 4 bits and 2 words of 4 bytes for each of 128 rows.
    one = 128 * 256 // 2 + 2 * 128 * 4
    assert touched_bytes(group, [3, 0, 1]) == 4 * one


def test_a_wrong_result_is_refused():
    plan = plan_named("w4a16_g128_asym", TINY)
    index = choose_experts(TINY, 2, "uniform")
    groups = make_groups(plan, TINY, "cpu")
    pair = make_pair(groups, TINY, index, launches="mixed", copies=1)
    assert error_over_bound(pair.first, 2) <= 1.0
    # The kernel reads the scales of another weight than the definition does.
    half = pair.first
    meta = half.gemms[0].weights.meta
    original = half.launch(0, 2)
    meta.copy_(meta.roll(1))
    half = SimpleNamespace(
        gemms=half.gemms, inputs=half.inputs, routing=half.routing, launch=lambda *_: original
    )
    assert error_over_bound(half, 2) > 1.0


def test_a_failed_check_keeps_its_cases_from_being_timed():
    case = Case("pair", "mxq", "tiny", "w4a16_g128_asym", 1)
    models = {"tiny": TINY}
    name = next(c.name for c in checks.checks_for([case], models) if c.plan == "decode")
    with pytest.raises(rows.Refused, match="off"):
        rows.make_row(case, models, NoClock(), measure_ceilings(NoClock()), {name: "off"})


def test_a_check_that_raises_is_a_failure_with_its_reason():
    result = checks.guarded(checks.Check(("w9a16_g128_asym",), "mixed", "decode"), "cpu", 4)
    assert not result["passed"]
    assert "weight bits of 9" in result["reason"]


@pytest.mark.parametrize("plan", TILE_PLANS, ids=lambda plan: plan.name)
def test_a_check_has_the_tokens_that_its_tile_plan_is_for(plan):
    tokens = checks.TOKENS_OF[plan.name]
    assert tile_plan(tokens * checks.TOP_K / checks.EXPERTS) == plan
    # Few enough slots for the first plan to split the sum over K.
    assert (tokens * checks.TOP_K <= SPLIT_ROWS) == (plan.name == "decode")


def test_each_part_of_the_checks_goes_on_after_one_that_breaks_its_process(monkeypatch, tmp_path):
    part = [checks.Check((name,), "mixed", "decode") for name in ("bf16", "fp8", "w8a8_grow_sym")]

    def worker(command, check, timeout):
        source, target = command[-2:]
        left = json.loads(Path(source).read_text())
        # The first process dies at its second check, the next one does all that is left.
        done = left[:1] if len(left) == 3 else left
        results = [{"name": f"{schemes[0]}/mixed/decode", "passed": True} for schemes, *_ in done]
        Path(target).write_text(json.dumps(results))
        return SimpleNamespace(returncode=-6 if len(left) == 3 else 0)

    monkeypatch.setattr(checks.subprocess, "run", worker)
    found = checks.run_checks(part, "cuda", workers=1, folder=tmp_path)
    assert [result["passed"] for result in found] == [True, False, True]
    assert "status -6" in found[1]["reason"]


def test_times_are_those_of_a_launch_of_the_graph(monkeypatch):
    replays = iter([1000.0] * 3 + [100_000.0, *range(100, 2100, 100)])
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing, "_recorded", lambda launches: graph)
    monkeypatch.setattr(timing, "WARM_UPS", 3)
    monkeypatch.setattr(timing, "_replay_us", lambda graph: float(next(replays)))
    for _ in range(3):
        next(replays)
    times = CudaClock().time([lambda: None] * 10)
    # 20 replays of 100, 200, .. 2000 us with 10 launches each.
    assert times == Times(105.0, 29.0, 181.0, 20)


def test_figures_of_a_row_by_hand():
    times = Times(2.0, 1.0, 3.0, 20)
    work = {"bf16": 4e6, "int8": 0.0, "fp8": 0.0, "bytes": 1e6}
    ceilings = {"copy_bytes_per_s": 4e12, "bf16_flops_per_s": 1e12, "int8_flops_per_s": None}
    found = rows._figures({"weight_bytes": 3e6}, times, work, {**ceilings, "fp8_flops_per_s": None})
    assert found["weight_tb_s"] == 1.5
    assert found["total_tb_s"] == 2.0
    assert found["tflop_s"] == 2.0
    assert found["roofline_us"] == 4.0  # 4e6 operations at 1e12 a second, against 1 us of bytes
    assert found["roofline_share"] == 2.0


def test_work_by_hand():
    model = Model("m", 256, 128, 2, 1)
    schemes = [Scheme.parse("bf16")] * 2 + [Scheme.parse("w8a8_grow_sym")] * 2
    schemes += [Scheme.parse("fp8")] * 2
    work = rows._work(model, schemes, [3, 1])
    each = 2 * 256 * 128
    assert (work["bf16"], work["int8"], work["fp8"]) == (6 * each, 2 * each, 4 * each)
    inputs = 3 * 256 * 2 + 1 * 256 * 1 + 4 * 128 * 1
    assert work["bytes"] == inputs + 2 * 4 * (2 * 128 + 256)


def test_blocks_of_assignments_by_hand():
    index = torch.tensor([1, 0, 1, 3, 1])
    ids, owners, count = peers.align_blocks(index, 4, 2)
    assert ids.tolist() == [1, 5, 0, 2, 4, 5, 3, 5]
    assert owners.tolist() == [0, 1, 1, 3]
    assert count.tolist() == [8]


def dense_by_blocks(x, weights_ENK, ids, owners, share):
    """Results by assignment of a kernel that works through padded blocks."""
    block = len(ids) // len(owners)
    kept = ids < len(x) * share
    out = torch.zeros(len(x) * share, weights_ENK.shape[1])
    expert = owners.repeat_interleave(block)[kept].long()
    ids = ids[kept].long()
    out[ids] = torch.einsum("nk,nmk->nm", x[ids // share].float(), weights_ENK[expert].float())
    return out.to(torch.bfloat16)


def fake_flag_gems():
    """Its two functions on codes decoded by a slow loop, called as the real ones are."""

    def dispatch(a, b, c, a_scale, b_scale, zeros, weights, ids, owners, count, *rest, **options):
        assert (a_scale, zeros, weights, count.tolist()) == (None, None, None, [len(ids)])
        is_weighted, share, config = rest
        assert not is_weighted
        assert len(ids) == len(owners) * config["BLOCK_SIZE_M"]
        dense = b
        if options["use_int4_w4a16"]:
            columns = [
                (b[..., k // 2].int() >> 4 * (k % 2) & 15) - 8 for k in range(2 * b.shape[2])
            ]
            dense = torch.stack(columns, -1) * b_scale.float().repeat_interleave(128, -1)
        c.copy_(dense_by_blocks(a, dense.bfloat16(), ids, owners, share).reshape(c.shape))

    return SimpleNamespace(
        dispatch_fused_moe_kernel=dispatch,
        _get_config_dtype_str=lambda **_: None,
        try_get_optimal_moe_config=lambda *_: {"BLOCK_SIZE_M": 4},
    )


@pytest.mark.parametrize("scheme", ["bf16", "w4a16_g128_sym"])
def test_flag_gems_gets_what_its_kernel_reads(monkeypatch, scheme):
    monkeypatch.setitem(sys.modules, "flag_gems.fused.fused_moe", fake_flag_gems())
    monkeypatch.setattr(peers, "copies_needed", lambda _: 2)
    index = choose_experts(TINY, 6, "uniform")
    maker = peers.MAKERS["flag-gems"]
    launches, read = peers.peer_pair(maker, Scheme.parse(scheme), TINY, index, "cpu")
    assert len(launches) == 2
    reached = sum(count > 0 for count in expert_counts(index, TINY.experts))
    bits = 16 if scheme == "bf16" else 4 + 16 / 128
    assert read == pytest.approx(reached * 3 * TINY.hidden * TINY.inner * bits / 8, rel=0.01)


def test_a_peer_with_wrong_results_is_not_timed(monkeypatch):
    fake = fake_flag_gems()
    right = fake.dispatch_fused_moe_kernel

    def wrong(a, b, *rest, **options):
        right(a, b.flip(0), *rest, **options)

    fake.dispatch_fused_moe_kernel = wrong
    monkeypatch.setitem(sys.modules, "flag_gems.fused.fused_moe", fake)
    monkeypatch.setattr(peers, "copies_needed", lambda _: 1)
    index = choose_experts(TINY, 6, "uniform")
    with pytest.raises(ValueError, match="of its norm"):
        peers.peer_pair(peers.MAKERS["flag-gems"], Scheme.parse("bf16"), TINY, index, "cpu")


def slow_grouped(x, w_EKN, ends):
    starts = [0, *ends.tolist()]
    parts = [x[a:b] @ w_EKN[e] for e, (a, b) in enumerate(pairwise(starts))]
    return torch.cat(parts)


def test_torch_gets_what_its_products_read(monkeypatch):
    def scaled(x, w, x_scale, w_scale, *, offs, out_dtype, use_fast_accum):
        assert use_fast_accum
        assert x_scale.shape == (len(x),)
        assert w_scale.shape == (w.shape[0], w.shape[2])
        out = slow_grouped(x.float() * x_scale[:, None], w.float() * w_scale[:, None], offs)
        return out.to(out_dtype)

    def grouped(x, w, *, offs):
        return slow_grouped(x.float(), w.float(), offs).to(torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled)
    monkeypatch.setattr(torch, "_grouped_mm", grouped)
    monkeypatch.setattr(peers, "copies_needed", lambda _: 2)
    index = choose_experts(TINY, 6, "uniform")
    for scheme in ("bf16", "fp8"):
        launches, _ = peers.peer_pair(
            peers.MAKERS["torch"], Scheme.parse(scheme), TINY, index, "cpu"
        )
        launches[1]()


@pytest.mark.parametrize("gemm_type", ["indexed", "grouped_contiguous"])
def test_humming_gets_what_its_kernel_reads(monkeypatch, gemm_type):
    def forward(config, *, inputs, outputs, weight, compute_config, tuning_config, top_k, **rest):
        assert compute_config == {"gemm_type": gemm_type}
        assert rest["locks"].dtype == torch.int32
        if gemm_type == "indexed":
            assert rest["num_tokens_padded"].shape == ()
            assert len(rest["sorted_ids"]) == len(rest["expert_ids"]) * 8
            ids, owners = rest["sorted_ids"], rest["expert_ids"]
            outputs.copy_(dense_by_blocks(inputs, weight, ids, owners, top_k))
        else:
            assert rest["expert_layout"].dtype == torch.int64
            ends = rest["expert_layout"][1:]
            outputs.copy_(slow_grouped(inputs.float(), weight.float().transpose(1, 2), ends))

    fake = SimpleNamespace(
        humming_forward=forward,
        may_quant_input=lambda config, x: (x, None),
        get_heuristics_config=lambda config, shape_m, gemm_type: {"block_shape": [8, 64, 64]},
    )

    def weights(task, scheme, copies):
        dense = peers._dense(task)
        return None, [{"weight": dense}] * copies, lambda expert: dense[expert].float()

    monkeypatch.setitem(sys.modules, "humming.forward", fake)
    monkeypatch.setitem(sys.modules, "humming.tune", fake)
    monkeypatch.setattr(peers, "_humming_weights", weights)
    monkeypatch.setattr(peers, "copies_needed", lambda _: 1)
    index = choose_experts(TINY, 6, "uniform")
    maker = peers.humming_maker(gemm_type)
    launches, _ = peers.peer_pair(maker, Scheme.parse("w4a16_g128_sym"), TINY, index, "cpu")
    assert len(launches) == 1


def test_the_reason_for_a_missing_peer_is_recorded(monkeypatch):
    monkeypatch.setitem(sys.modules, "flag_gems.fused.fused_moe", None)
    found = peers.available(("torch", "flag-gems"))
    assert found["flag-gems"].startswith("missing: ")
    assert found["torch"] == torch.__version__


def test_goals_without_timed_rows_are_not_measured():
    assert {v.words for v in judge([])} == {"not measured"}
    assert {v.words for v in judge([row(plan="bf16", median_us=None)])} == {"not measured"}


def test_the_worst_case_decides_a_goal():
    name = "decode, full waves, w4a16"
    fast = row(plan="w4a16_g128_asym", weight_tb_s=2.9)
    assert verdict(name, [fast]).words == "goal"
    slower = row(plan="w4a16_g128_asym", weight_tb_s=2.5, tokens=16)
    assert verdict(name, [fast, slower]).words == "floor"
    slow = row(plan="w4a16_g128_asym", weight_tb_s=2.3, tokens=1)
    found = verdict(name, [fast, slower, slow])
    assert found.words == "missed"
    assert found.worst == ("w4a16_g128_asym Mixtral-8x7B M=1", 2.3)
    assert found.cases == 3
    # A small model's single token fills no wave, and a skewed routing is another case.
    apart = [{**slow, "model": "Qwen1.5-MoE"}, {**slow, "routing": "zipf"}]
    assert verdict(name, [fast, *apart]).words == "goal"


def test_ratios_of_goals_by_hand():
    bf16 = row(plan="bf16", median_us=30.0)
    w4 = row(plan="w4a16_g128_asym", median_us=10.0)
    assert verdict("w4a16 against own bf16, M=16..64", [bf16, w4]).worst[1] == 3.0
    mixed, single = (
        row(plan="mix-w4-size", launches=launches, median_us=us)
        for launches, us in (("mixed", 20.0), ("single", 19.0))
    )
    found = verdict("mix in one launch against one for each scheme, M<=256", [mixed, single])
    assert found.worst[1] == 0.95
    assert found.words == "missed"
    peer = row(plan="w4a16_g128_sym", runner="flag-gems", median_us=15.0, identical_bits=None)
    better = row(plan="w4a16_g128_sym", runner="humming-indexed", median_us=12.0)
    found = verdict(
        "best uniform peer of the same bytes against ours, M<=64", [w4, mixed, peer, better]
    )
    assert (found.worst[1], found.best[1]) == (0.6, 1.2)
    many = row(plan="bf16", median_us=50.0, tokens=8192)
    torch_row = {**many, "runner": "torch", "median_us": 45.0}
    found = verdict("prefill M=8192, bf16 against torch grouped_mm", [many, torch_row])
    assert (found.worst[1], found.words) == (0.9, "floor")


def test_less_time_is_better_for_the_first_token():
    name = "M=1, small experts, w4a16, both products"
    rows_ = [
        row(plan="w4a16_g128_asym", model="Qwen1.5-MoE", tokens=1, median_us=us)
        for us in (12.0, 18.0)
    ]
    found = verdict(name, rows_)
    assert (found.words, found.worst[1], found.best[1]) == ("floor", 18.0, 12.0)


def test_different_bits_in_two_runs_miss_their_goal():
    found = verdict("same bits in two runs", [row(plan="bf16", identical_bits=False)])
    assert found.words == "missed"


def test_every_goal_has_a_goal_at_least_as_hard_as_its_floor():
    for goal in GOALS:
        sign = -1 if goal.less_is_better else 1
        assert sign * goal.goal >= sign * goal.floor


def test_the_page_says_that_nothing_was_timed():
    text = "\n".join(timing_sections({}))
    assert "No timing of the kernels exists yet" in text
    assert "not measured" in text


def test_the_page_refuses_rows_without_times():
    results = {"about": {"dry_run": False}, "rows": [row(plan="bf16", median_us=None)]}
    with pytest.raises(ValueError, match="not timed"):
        timing_sections({"group-gemm-x.json": results})


def test_the_page_shows_rows_and_what_was_left_out():
    timed = row(plan="bf16", p10_us=9.0, p90_us=11.0, tflop_s=1.0, roofline_share=0.5)
    results = {
        "about": {"dry_run": False, "gpu": "A GPU", "date": "a day", "versions": {"torch": "1"}},
        "rows": [timed],
        "checks": [{"name": "c", "passed": True}],
        "ceilings": {"copy_bytes_per_s": 4.3e12, "int8_flops_per_s": None},
        "peers": {"flag-gems": "missing: x"},
        "left_out": [{"key": "some/case", "reason": "why"}],
    }
    text = "\n".join(timing_sections({"group-gemm-x.json": results}))
    assert (
        "| pair | mxq | bf16 | 64 | uniform | mixed | 10.0 | 9.0 .. 11.0 | 1.00 | 1 | 50% |" in text
    )
    assert "copy 4.30 TB/s" in text
    assert "some/case: why" in text

"""The logic of ``benchmarks/bench_accuracy.py``: counted bits, jobs and results of peers, goals."""

import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_accuracy  # noqa: E402
import bench_ranking  # noqa: E402
import bench_scope  # noqa: E402
from accuracy import bench, goals, page, peers, ranking, runs, scope  # noqa: E402

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable  # noqa: E402
from mxq.blocks import LinearBlock  # noqa: E402
from mxq.scheme import Scheme  # noqa: E402

UP = LinearBlock("layers.0.up", 0, None, "up", 8, 256, "m.0.up.weight", "m.0.up")
DOWN = LinearBlock("layers.0.down", 0, None, "down", 16, 128, "m.0.down.weight", "m.0.down")
BLOCKS = (UP, DOWN)
TWO = Scheme.parse("w2a16_g128_asym")
EIGHT = Scheme.parse("w8a16_grow_sym")


def on_grid(block, levels):
    """A weight whose every group of 128 has the values 0, 1, ... of that many levels."""
    rows = torch.arange(block.in_features) % levels
    return (rows * 0.37 - 0.5).expand(block.out_features, -1).clone()


def row_of(method, size, seed, kl, bits=3.1, **more):
    return {
        "method": method,
        "size": size,
        "seed": seed,
        "kl": kl,
        "bits": bits,
        "commit": "abc",
        "excess_nats": 0.1,
        "top1_agreement": 0.9,
        "predicted": None,
        "heldout_tokens": 7,
        "domains": {"books": {"kl": kl}},
        **more,
    }


def test_bits_of_codes_scales_and_zero_points_add_up_by_hand():
    found = bench.stored_bits(BLOCKS, {UP.name: TWO, DOWN.name: EIGHT})
    # 8 x 256 of 2 bits in 2 groups: 4096 + 16 scales of 16 and zeros of 2; 16 x 128 of 8: 16384
    # and 16 scales.
    assert found == {
        "bits": (4096 + 256 + 32 + 16384 + 256) / 4096,
        "codes": (4096 + 16384) / 4096,
        "zeros": 32 / 4096,
        "scales": (256 + 256) / 4096,
    }
    more = bench.stored_bits(BLOCKS, {UP.name: TWO, DOWN.name: EIGHT}, more_bits=4096)
    assert more == {**found, "bits": found["bits"] + 1, "other": 1.0}


def test_a_size_is_its_own_number_or_that_of_its_scheme():
    assert bench.budget_bits(BLOCKS, "w2a16_g64_asym=2.5") == 2.5
    assert bench.budget_bits(BLOCKS, "w2a16_g128_asym") == 2 + 18 / 128


def test_a_group_with_more_values_than_codes_is_refused():
    schemes = {UP.name: TWO, DOWN.name: EIGHT}
    good = {UP.name: on_grid(UP, 4), DOWN.name: torch.randn(16, 128)}
    peers.check_grids(BLOCKS, good, schemes)
    shifted = good[UP.name].clone()
    # Another group may lie elsewhere, and one value of it may not.
    shifted[:, 128:] += 3
    peers.check_grids(BLOCKS, {**good, UP.name: shifted}, schemes)
    shifted[7, 200] += 0.01
    with pytest.raises(peers.PeerError, match=r"m\.0\.up: a group has 5 values.*has 4"):
        peers.check_grids(BLOCKS, {**good, UP.name: shifted}, schemes)


@pytest.fixture
def setting(tmp_path):
    """A bench of two blocks, and the options of a peer."""
    source = type("Source", (), {"folder": tmp_path})
    adapter = type("Adapter", (), {"source": source, "blocks": lambda self: BLOCKS})()
    rows = torch.arange(12).reshape(3, 4)
    return (
        bench.Bench(adapter, None, rows, (), 5),
        peers.Setting(tmp_path, 1, {"toy": {"iters": 200, "own": 1}}),
    )


RUNNER = """
import json, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
import numpy
job = json.load(sys.stdin)
assert load_file(job["tokens"])["fit"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
assert (job["seed"], job["options"], job["threads"]) == (5, {"iters": 9, "own": 1}, 1)
shapes = {"m.0.up": (8, 256), "m.0.down": (16, 128)}
schemes = job["schemes"] or {n: {"bits": 4, "group_size": None, "symmetric": True} for n in shapes}
save_file({f"{n}.weight": numpy.ones(shapes[n], numpy.float32) for n in NAMES}, job["weights"])
row = {"schemes": {n: schemes[n] for n in NAMES}, "settings": job["bits"], "versions": {}}
Path(job["row"]).write_text(json.dumps(row))
"""


def run_toy(monkeypatch, tmp_path, setting, widths, names, plan=None):
    runner = tmp_path / "weights_toy.py"
    runner.write_text(RUNNER.replace("NAMES", repr(names)))
    monkeypatch.setattr(peers.Peer, "runner", runner)
    monkeypatch.setattr(peers, "python_of", lambda tool, folder: Path(sys.executable))
    judged = {}
    monkeypatch.setattr(
        peers, "judge_weights", lambda bench, weights, reference: judged.update(weights) or {}
    )
    peer = peers.Peer("toy", widths, {"iters": 9})
    found = peers.judge_peer(setting[0], peer, "w2a16_g64_asym=2.5", plan, setting[1], [])
    return found, judged


@pytest.mark.parametrize(
    ("widths", "schemes"),
    [
        ("uniform", {"w2a16_g64_asym": 2}),
        ("own", {"w4a16_grow_sym": 2}),
        ("mxq", {"w2a16_g128_asym": 1, "w8a16_grow_sym": 1}),
    ],
)
def test_a_peer_gets_the_widths_of_its_row(monkeypatch, tmp_path, setting, widths, schemes):
    plan = type("Plan", (), {"schemes": {UP.name: TWO, DOWN.name: EIGHT}})
    names = ["m.0.up", "m.0.down"]
    found, judged = run_toy(monkeypatch, tmp_path, setting, widths, names, plan)
    assert found["schemes"] == schemes
    assert found["settings"] == 2.5  # the budget
    assert {name: tuple(w.shape) for name, w in judged.items()} == {
        UP.name: (8, 256),
        DOWN.name: (16, 128),
    }


def test_a_peer_that_left_out_a_linear_has_no_row(monkeypatch, tmp_path, setting):
    with pytest.raises(peers.PeerError, match=r"quantize 2 linears and gave 1: m\.0\.down"):
        run_toy(monkeypatch, tmp_path, setting, "own", ["m.0.up"])


def test_a_failed_peer_says_what_it_said(monkeypatch, tmp_path, setting):
    with pytest.raises(peers.PeerError, match=r"KeyError: 'm\.9'"):
        run_toy(monkeypatch, tmp_path, setting, "own", ["m.9"])


def test_a_peer_that_is_not_installed_is_named(setting):
    absent = replace(setting[1], environments=None)
    with pytest.raises(peers.PeerError, match="no environment modelopt in --peers None"):
        peers.judge_peer(setting[0], peers.PEERS["modelopt"], "w2a16_g128_asym", None, absent, [])


def test_a_skipped_row_gives_way_and_rows_keep_their_order(tmp_path):
    path = tmp_path / "r.json"
    results = {"rows": [], "skipped": []}
    third = "w3a16_g128_asym"
    skipped = {"seed": 0, "method": "modelopt", "size": third, "skipped": "no CUDA"}
    bench_accuracy._add(results, skipped, path)
    assert not bench_accuracy._has(results, 0, "modelopt", third)
    for method, size, seed in (("modelopt", third, 0), ("mxq", third, 1), ("mxq", third, 0)):
        bench_accuracy._add(results, row_of(method, size, seed, 0.1, seconds=1.0), path)
    bench_accuracy._add(results, row_of("rtn", "w2a16_g64_asym=2.5", 0, 0.1, seconds=1.0), path)
    found = json.loads(path.read_text())
    assert found["skipped"] == []
    assert [(row["seed"], row["method"]) for row in found["rows"]] == [
        *((0, "rtn"), (0, "mxq"), (0, "modelopt"), (1, "mxq"))
    ]


def test_shares_compare_the_seeds_that_both_rows_have():
    rows = [row_of("mxq", "s=3", seed, kl) for seed, kl in ((0, 1.0), (1, 3.0), (2, 50.0))]
    rows += [row_of("gptq", "s=3", seed, kl) for seed, kl in ((0, 4.0), (1, 4.0), (7, 90.0))]
    assert goals.share(rows, "s=3", "mxq", "gptq") == 0.5
    assert goals.share(rows, "s=3", "mxq", "rtn") is None


def test_goals_name_the_row_that_is_hardest_to_beat():
    two, half, three = "w2a16_g128_asym", "w2a16_g64_asym=2.5", "w3a16_g128_asym"
    rows = [row_of("mxq", two, 0, 0.5, bits=2.1), row_of("gptq-rotated", two, 0, 1.0, bits=2.1)]
    rows += [row_of("mxq", half, 0, 0.3, bits=2.5), row_of("gptq-rotated", half, 0, 1.0, bits=2.3)]
    rows += [row_of(name, three, 0, kl) for name, kl in (("mxq", 0.9), ("rtn", 9.0), ("gptq", 0.8))]
    found = [(goal.text, round(goal.found, 3), goal.verdict) for goal in goals.goals_of(rows)]
    assert found == [
        ("that of w2a16_g128_asym: KL at most 0.5 of gptq-rotated", 0.5, "reached"),
        ("2.5 bits: KL at most 0.25 of gptq-rotated", 0.3, "missed"),
        ("that of w3a16_g128_asym: KL not above that of gptq", 1.125, "missed"),
    ]
    assert goals.goals_of([])[0].verdict == "not measured"


def test_the_page_has_peers_goals_spread_and_what_was_not_measured():
    size = "w2a16_g128_asym"
    peer = {"settings": {"iters": 50}, "versions": {"auto-round": "1"}, "quantize_s": 60.0}
    results = {
        "model": "m",
        "date": "d",
        "samples": 1,
        "seqlen": 2,
        "versions": {"mxq": "1"},
        "rows": [
            row_of("gptq-rotated", size, 0, 0.02, bits=2.1),
            row_of("mxq", size, 0, 0.01, bits=2.1),
            row_of("mxq", size, 1, 0.03, bits=2.1),
            row_of("autoround", size, 0, 0.04, bits=2.1, **peer),
        ],
        "skipped": [{"seed": 0, "method": "modelopt", "size": size, "skipped": "a\nno CUDA\n"}],
    }
    text = "\n".join(page.accuracy_section("f.json", results))
    # By hand: the mean of 0.01 and 0.03 is 0.02, their deviation 0.01414; 0.01 is half of 0.02.
    assert "| mxq default | 2 | 2.1000 | 0.02000 +- 0.01414 | 0.10000 | 90.00% | 0.50 |" in text
    assert (
        "tuned, 50 steps instead of its 200 | 1 | 2.1000 | 0.04000 | 0.10000 | 90.00% | 2.00 |"
        in text
    )
    assert "auto-round 1; iters 50; a row took 60 s" in text
    assert "modelopt" not in text.split("Not measured")[0]
    assert "that of w2a16_g128_asym, seed 0: no CUDA" in text
    assert "| that of w2a16_g128_asym: KL at most 0.5 of gptq-rotated | 0.50 | 0.50 |" in text


def test_choices_kept_are_a_column_once_a_row_has_them():
    size, facts = "w2a16_g128_asym", {"model": "m", "date": "d", "samples": 1, "seqlen": 2}
    rows = [row_of("gptq", size, 0, 0.02), row_of("mxq", size, 0, 0.01)]
    rows += [row_of("mxq", size, seed, 0.01, choices_kept=0.75 + seed / 8) for seed in (1, 2)]
    results = {**facts, "versions": {}, "rows": rows}
    text = "\n".join(page.accuracy_section("f.json", results))
    assert "| top-1 same | choices kept | KL / gptq-rotated |\n| ---: | --- |" in text
    assert "| uniform, GPTQ | 1 | 3.1000 | 0.02000 | 0.10000 | 90.00% | - | - |" in text
    # The mean of 7/8 and 1, without the row that has none.
    assert "0.01000 +- 0.00000 | 0.10000 | 90.00% | 93.75% | - |" in text
    heads = next(line for line in text.splitlines() if line.startswith("| budget | method | seeds"))
    assert all(
        line.count("|") == heads.count("|")
        for line in text.splitlines()
        if size in line and line.count("|") > 7
    )
    assert "choices" not in "\n".join(page.accuracy_section("f", {**results, "rows": rows[:2]}))


def test_the_readme_compares_the_seeds_that_all_rows_of_a_size_have():
    size = "w2a16_g128_asym"
    rows = [row_of("mxq", size, seed, kl, bits=2.1) for seed, kl in ((0, 0.25), (1, 0.75))]
    rows += [row_of("rtn", size, 0, 0.5, bits=2.1)]
    rows += [row_of("mxq", "s=3", seed, kl, bits=3.0) for seed, kl in ((0, 0.25), (1, 0.75))]
    assert page.readme_table(rows)[-2:] == [
        "| mxq default | 0.2500 | 0.5000 |",
        "| uniform, round to nearest with clip search | 0.5000 | - |",
    ]


def test_every_method_has_a_name_and_every_peer_a_runner():
    assert set(page.NAMES) == set(bench_accuracy.METHODS)
    for peer in peers.PEERS.values():
        assert peer.runner.is_file()
        assert (ROOT / "benchmarks" / "peers" / f"{peer.tool}.txt").is_file()


def test_a_file_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    words = ["x", "m", "--calibration", "file:a=/p/t.txt", "--evaluate", "b=/q/u.txt"]

    def opened(*more):
        monkeypatch.setattr(sys, "argv", [*words, "--json", str(path), *more])
        return runs.open_results(bench_accuracy._arguments(), {"own": 1}, {"rows": []})

    first = opened()
    assert (first["calibration"], first["evaluate"]) == (["a=t.txt"], ["b=u.txt"])
    path.write_text(json.dumps(first))
    assert opened() == first
    with pytest.raises(SystemExit, match="measured with other windows: 10, now 3; give another"):
        opened("--windows", "3")


# --- order of plans ---------------------------------------------------------------------------


def table_of(blocks=40):
    """Blocks of 64 x 128 that lose 4 ** -bits times their own weight, by two schemes."""
    schemes = TWO, Scheme.parse("w4a16_g128_asym")
    names = [f"layers.0.experts.{expert}.up" for expert in range(blocks)]
    return SensitivityTable(
        blocks=tuple(
            BlockInfo(name, 0, expert, "up", 64, 128, 10, "layers.0.experts")
            for expert, name in enumerate(names)
        ),
        schemes=schemes,
        loss=tuple(tuple((1 + n) * 4.0**-s.w_bits for s in schemes) for n in range(blocks)),
        quantizer=(("gptq", "gptq"),) * blocks,
        metric="fisher",
        unit="nats per token",
        calibration_tokens=10,
        rotated_layers=(),
        provenance=Provenance("", "", {}, {}),
    )


def test_a_plan_without_noise_is_the_best_and_noise_makes_others_of_that_size():
    table, plans = table_of(), []
    for noise, seed in ((0.0, 1), (3.0, 1), (3.0, 2)):
        plans.append(bench_ranking.draw_plan(table, 3.0, noise, seed))
    four = table.schemes[1]
    for plan in plans:
        lost = [(1 + n) * 4.0 ** -plan.schemes[b.name].w_bits for n, b in enumerate(table.blocks)]
        # What the true table says, not the noisy one.
        assert plan.predicted_loss == pytest.approx(sum(lost))
        assert plan.bits_per_weight == plans[0].bits_per_weight <= 3.0
    wide = [b.expert for b in table.blocks if plans[0].schemes[b.name] == four]
    assert wide == list(range(40 - len(wide), 40))
    assert plans[0].predicted_loss < min(plan.predicted_loss for plan in plans[1:])
    assert plans[1].schemes != plans[2].schemes


def test_order_and_bias_of_plans_by_hand():
    rows = [{"predicted": p, "kl": k} for p, k in ((1.0, 2.0), (2.0, 6.0), (4.0, 4.0))]
    found = bench_ranking.summary(rows)
    # Ranks 1 2 3 and 1 3 2: 1 - 6 x (0 + 1 + 1) / (3 x 8).
    assert found.pop("spearman") == pytest.approx(0.5)
    assert found == {"plans": 3, "factor_median": 2.0, "factor_least": 1.0, "factor_most": 3.0}
    assert "spearman" not in bench_ranking.summary(rows[:2])


@pytest.mark.parametrize(("spearman", "verdict"), [(0.9, "reached"), (0.89, "missed")])
def test_the_page_says_whether_the_order_is_good_enough(spearman, verdict):
    rows = [{"noise": 0.0, "predicted": 0.5, "kl": 0.75, "bits": 2.5}]
    summary = {**bench_ranking.summary(rows), "spearman": spearman}
    facts = {"model": "m", "date": "d", "commit": "c", "bits": 2.5, "seed": 0}
    text = "\n".join(ranking.ranking_section("f.json", {**facts, "rows": rows, "summary": summary}))
    assert verdict in text
    assert "| 0.00 | 0.50000 | 0.75000 | 1.50 |" in text


# --- experts beside all linears ---------------------------------------------------------------


def test_attention_is_left_its_wide_schemes_and_others_all():
    table = replace(table_of(blocks=3), schemes=(TWO, EIGHT))
    name = table.blocks[1].name
    loss = bench_scope.at_least(table, {name}, 8).loss
    assert loss == (table.loss[0], (inf, table.loss[1][1]), table.loss[2])


def test_bits_of_what_a_plan_leaves_out_are_16():
    plan = type("Plan", (), {"schemes": {UP.name: TWO}})
    # Both have 2048 weights; of UP 2 bits and 18 for each group of 128.
    assert bench_scope.mean_bits([UP], plan) == 2 + 18 / 128
    assert bench_scope.mean_bits([DOWN], plan) == 16
    assert bench_scope.mean_bits(BLOCKS, plan) == (2 + 18 / 128 + 16) / 2


def test_plans_of_all_linears_are_solved_for_the_files_of_the_experts(monkeypatch):
    table = table_of(blocks=8)
    run = bench_scope.Run(
        commit="c",
        benches={
            name: type("Bench", (), {"adapter": name, "blocks": ()}) for name in ("experts", "all")
        },
        tables={name: type("Tables", (), {"get": lambda *_: table}) for name in ("experts", "all")},
        reference=[],
    )
    monkeypatch.setattr(bench_scope, "kept_bytes", lambda adapter: 5000)
    asked = []
    monkeypatch.setattr(bench_scope, "block_budget", lambda *args: asked.append(args) or 10**6)
    limit_bytes = int(3.0 * 8 * 64 * 128) // 8
    for name in bench_scope.PLANS:
        assert bench_scope.solve(run, 3.0, name)[1] == 5000 + limit_bytes
    assert asked == [("all", 5000 + limit_bytes)] * 2


def test_the_page_compares_rows_of_one_size():
    def row(bits, plan, kl):
        more = {"expert_bits": bits, "attention_bits": 16.0, "file_bytes": 1_000_000}
        judged = {"kl": kl, "top1_agreement": 0.5, "heldout_tokens": 7, "commit": "c"}
        return {"expert_bits_asked": bits, "plan": plan, **more, **judged}

    rows = [row(2.5, "experts", 0.4), row(2.5, "all", 0.1), row(3.0, "all", 0.2)]
    facts = {"model": "m", "date": "d", "seed": 0, "rows": rows}
    lines = scope.scope_section("f.json", facts)
    assert [line.split(" | ")[-1] for line in lines[-4:-1]] == ["1.00 |", "0.25 |", "- |"]
    assert "| 2.5 bits | `--scope all` | 1,000,000 | 2.50 | 16.00 | 0.10000 |" in lines[-3]
    assert set(scope.NAMES) == set(bench_scope.PLANS)

"""The logic of ``benchmarks/bench_pipeline.py``: clock, jobs, goals, resuming, page. No times."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_pipeline  # noqa: E402
import speed.clock as clock_module  # noqa: E402
from speed import cases, goals, models, page, processes  # noqa: E402

from mxq.scheme import Scheme, parse_schemes  # noqa: E402

AMOUNTS = cases.Amounts()


@pytest.fixture
def ticks(monkeypatch):
    """Both clocks of the module: the wall moves when the test says so, processors twice as fast."""
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock_module.time, "process_time", lambda: 2 * now[0])
    return now


def test_every_second_goes_to_the_innermost_part_of_the_present_stage(ticks):
    clock = clock_module.Clock()
    steps = [
        ("enter", "measure", "other", 1.0),
        ("enter", None, "Hessians", 2.0),
        ("enter", None, "forward", 4.0),
        ("leave", None, None, 8.0),
        ("leave", None, None, 16.0),
        ("leave", None, None, 32.0),
    ]
    ticks[0] += 0.5
    for what, stage, part, after in steps:
        clock.enter(stage, part) if what == "enter" else clock.leave()
        ticks[0] += after
    found = {(row["stage"], row["part"]): row for row in clock.rows()}
    # By hand: 8 s pass after "forward" ends and before "Hessians" does.
    assert {place: row["wall_s"] for place, row in found.items()} == {
        ("other", "other"): 32.5,
        ("measure", "other"): 17.0,
        ("measure", "Hessians"): 10.0,
        ("measure", "forward"): 4.0,
    }
    assert found["measure", "Hessians"]["processor_s"] == 20.0
    assert found["measure", "Hessians"]["calls"] == 1


def test_a_pass_of_the_original_keeps_the_time_of_what_it_calls(ticks):
    clock = clock_module.Clock()
    whole = "pass of the original"
    assert whole in clock_module.WHOLE
    for stage, part in (("pack plan", "other"), (None, whole), (None, "forward"), (None, "write")):
        clock.enter(stage, part)
        ticks[0] += 1.0
    for after in (2.0, 4.0, 8.0):
        clock.leave()
        ticks[0] += after
    clock.enter(None, "forward")
    ticks[0] += 16.0
    # By hand: 1 + 1 + 1 on the way in, 2 + 4 out of the inner two; 8 after it.
    found = {row["part"]: row["wall_s"] for row in clock.rows() if row["stage"] == "pack plan"}
    assert found == {"other": 1.0 + 8.0, whole: 9.0, "forward": 16.0}


def test_shares_sum_up_to_one_by_stage_and_by_part():
    rows = [
        {"stage": "measure", "part": "forward", "wall_s": 1.0},
        {"stage": "measure", "part": "Hessians", "wall_s": 2.0},
        {"stage": "pack plan", "part": "forward", "wall_s": 5.0},
    ]
    assert cases.shares(rows, "stage") == {"measure": 0.375, "pack plan": 0.625}
    assert cases.shares(rows, "part") == {"forward": 0.75, "Hessians": 0.25}
    other = [{**row, "wall_s": 0.0, "used_s": 1.0} for row in rows]
    assert cases.shares(other, "stage", "used_s") == {"measure": 2 / 3, "pack plan": 1 / 3}


@pytest.mark.parametrize("path", [*clock_module.STAGES, *clock_module.PARTS])
def test_every_counted_function_is_in_mxq(path):
    assert callable(clock_module.find(path)[2])


def test_a_counted_function_that_mxq_lost_is_named():
    with pytest.raises(ValueError, match=r"no mxq\.numerics:gone now"):
        clock_module.find("mxq.numerics:gone")
    with pytest.raises(ValueError, match=r"no mxq\.numerics:Gone\.call now"):
        clock_module.find("mxq.numerics:Gone.call")


def test_a_run_of_mxq_is_counted_where_functions_were_imported_by_name(tmp_path):
    # In a process of its own, because the functions of mxq are replaced.
    ids = torch.randint(500, (18, 24), generator=torch.Generator().manual_seed(0))
    models.save_tokens(ids, tmp_path / "tokens.safetensors")
    job = cases.make_job(
        "small/mxq-best",
        cases.Amounts(16, 16, 24, 2, bits=2.2, threads=1),
        model=models.small_model("demo"),
        tokens=tmp_path / "tokens.safetensors",
        room=tmp_path,
    )
    row = processes.run_job(Path(sys.executable), processes.RUNNERS["mxq"], job, tmp_path)
    assert "error" not in row, row
    seconds = {(entry["stage"], entry["part"]): entry["wall_s"] for entry in row["clock"]}
    assert sum(seconds.values()) == pytest.approx(row["total_s"], rel=0.05)
    stages = {"open", "profile", "measure", "allocate", "pack plan", "measured loss", "publish"}
    assert stages <= {stage for stage, _ in seconds}
    # What is held by "from module import name", by a class, and by a table of choices.
    packed = {"digests", "write", "install", "pass of the original", "target: regression"}
    packed.add("quantizer: refinement by gradients")
    measured = set(clock_module.PARTS.values()) - packed
    assert measured == {part for stage, part in seconds if stage == "measure"} - {"other"}
    wanted = {"forward", "Hessians", "quantizer: clip search", "quantizer: refinement", *packed}
    assert wanted <= {part for stage, part in seconds if stage == "pack plan"}


def test_tokens_that_are_fitted_to_and_held_out_are_all_of_them(tmp_path):
    ids = torch.arange(18 * 4).reshape(18, 4)
    models.save_tokens(ids, tmp_path / "t.safetensors")
    parts = load_file(tmp_path / "t.safetensors")
    assert len(parts["fit"]) == 16
    assert len(parts["heldout"]) == 2
    rejoined = torch.cat([parts["fit"], parts["heldout"]])
    assert torch.equal(rejoined.sort(0).values, ids)
    assert torch.equal(parts["all"], ids)


@pytest.mark.parametrize("samples", [0, 4, 12])
def test_samples_that_mxq_would_split_otherwise_are_refused(samples):
    with pytest.raises(ValueError, match=f"{samples} samples: give a multiple of 8"):
        cases.Amounts(small_samples=samples)


def test_both_tools_are_offered_the_same_bits_and_groups():
    ours = [(scheme.w_bits, scheme.group_size) for scheme in parse_schemes(list(cases.SCHEMES))]
    theirs = []
    for preset in cases.PRESETS:  # W<bits>A16 has groups of 128, W<bits>A16G<group> says
        bits, _, group = preset.removeprefix("W").partition("A16")
        theirs.append((int(bits), int(group.removeprefix("G") or 128)))
    assert sorted(ours) == sorted(theirs)
    assert len(set(ours)) == 8


def test_one_scheme_is_the_same_for_mxq_and_llm_compressor(tmp_path):
    paths = {"model": tmp_path, "tokens": tmp_path, "room": tmp_path}
    theirs = cases.make_job("small/llmcompressor", AMOUNTS, **paths)["scheme"]
    job = cases.make_job("small/mxq-one-scheme", AMOUNTS, **paths)
    ours = Scheme.parse(job["plan"].removeprefix("uniform:"))
    assert theirs == {
        "num_bits": ours.w_bits,
        "group_size": ours.group_size,
        "symmetric": ours.symmetric,
    }
    assert job["bits"] is None


def test_jobs_of_one_model_share_tokens_threads_and_budget(tmp_path):
    paths = {"model": tmp_path / "m", "tokens": tmp_path / "t", "room": tmp_path}
    jobs = {case: cases.make_job(case, AMOUNTS, **paths) for case in cases.ORDER}
    efforts = {case: job["effort"] for case, job in jobs.items() if "effort" in job}
    for effort in ("balanced", "best"):
        assert [case for case in efforts if efforts[case] == effort] == [f"small/mxq-{effort}"]
    for key in ("model", "tokens", "threads", "output", "row"):
        assert len({job[key] for job in jobs.values()}) == 1, key
    assert jobs["small/mxq"]["bits"] == jobs["small/autoround"]["bits"] == AMOUNTS.bits
    scored = [
        (jobs[case]["scored_samples"], jobs[case]["scored_seqlen"])
        for case in ("small/autoround", "small/autoround-default-scoring")
    ]
    assert scored == [(128, 512), (16, 128)]
    assert jobs["small/llmcompressor"]["batch_rows"] * AMOUNTS.seqlen == cases.BATCH_TOKENS
    json.dumps(jobs)


def test_the_random_model_is_offered_four_of_the_schemes_unless_all_are_asked_for(tmp_path):
    paths = {"model": tmp_path, "tokens": tmp_path, "room": tmp_path}
    few = cases.make_job("random/mxq", AMOUNTS, **paths)["schemes"]
    assert len(few) == 4
    assert set(few) < set(cases.SCHEMES)
    every = cases.make_job("random/mxq", cases.Amounts(all_on_random=True), **paths)["schemes"]
    assert every == cases.make_job("small/mxq", AMOUNTS, **paths)["schemes"] == [*cases.SCHEMES]


def test_the_random_peer_runs_only_when_asked_for():
    assert "random/llmcompressor" not in cases.chosen_cases("", random_peer=False)
    assert cases.chosen_cases("random/", random_peer=True) == ["random/mxq", "random/llmcompressor"]
    assert cases.chosen_cases("small/mxq", random_peer=False) == [
        "small/mxq",
        "small/mxq-one-scheme",
        "small/mxq-balanced",
        "small/mxq-best",
    ]


def test_a_tool_that_is_not_installed_gets_a_row_that_says_so(tmp_path):
    arguments = argparse.Namespace(peers=tmp_path)
    row = bench_pipeline._run("small/autoround", arguments, AMOUNTS, models.RandomShape(), tmp_path)
    assert "no environment autoround" in row["skipped"]
    assert processes.python_of("mxq", None) == Path(sys.executable)


def test_peers_run_with_empty_caches_and_without_our_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("AR_AUTO_SCHEME_CACHE", "warm")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    theirs = processes._environment(tmp_path, 2, is_own=False)
    assert "PYTHONPATH" not in theirs
    assert processes._environment(tmp_path, 2, is_own=True)["PYTHONPATH"] == "ours"
    assert theirs["AR_AUTO_SCHEME_CACHE"].startswith(str(tmp_path))
    assert theirs["OMP_NUM_THREADS"] == "2"


def test_a_runner_that_fails_gives_a_row_with_the_end_of_its_output(tmp_path):
    job = cases.make_job(
        "small/mxq", AMOUNTS, model=tmp_path / "none", tokens=tmp_path / "none", room=tmp_path
    )
    row = processes.run_job(Path("/bin/false"), processes.RUNNERS["mxq"], job, tmp_path)
    assert row["error"].startswith("exit status 1")


def test_parameters_are_counted_from_headers(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "x.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "y.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "some"}')
    assert models.about_model(tmp_path)["parameters"] == 15 + 7 + 2


def test_the_random_model_has_a_shard_for_each_layer_and_the_parameters_asked_for(tmp_path):
    shape = models.RandomShape(gb=0.06, layers=1, vocabulary=1000)
    shape.write(tmp_path / "model", 0)
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert names == ["model-layer-00000.safetensors", "model-outside.safetensors"]
    assert models.about_model(tmp_path / "model")["parameters"] == pytest.approx(30e6, rel=0.15)


def row(case, total, **more):
    return {
        "run": 0,
        "case": case,
        "total_s": total,
        "processor_s": 2 * total,
        "import_s": 5.0,
        "load_at_start": 0.1,
        "nll": 4.5,
        "commit": "abc",
        "quantized_weights": 16_000_000,
        "versions": {"tool": "1.2"},
        "model": {"name": "tiny", "family": "some", "parameters": 20_000_000},
        **more,
    }


CLOCK = [
    {"stage": "measure", "part": "forward", "wall_s": 30.0, "processor_s": 60.0},
    {"stage": "measure", "part": "sensitivity", "wall_s": 0.1, "processor_s": 0.2},
    {"stage": "pack plan", "part": "forward", "wall_s": 9.9, "processor_s": 19.8},
]


def test_goals_are_judged_by_medians_over_runs():
    rows = [
        *(row("small/mxq", total) for total in (10.0, 40.0, 12.0)),
        *(row("small/autoround", total) for total in (36.0, 35.0)),
        {"case": "small/llmcompressor", "run": 0, "error": "exit status 1"},
    ]
    scheme, gptq = goals.goals_of(rows)
    assert scheme.found == pytest.approx(35.5 / 12.0)
    assert scheme.verdict == "missed"
    assert gptq.found is None
    assert gptq.verdict == "not measured"


def test_the_peer_that_only_packs_is_held_against_the_packing_alone():
    mine = row("small/mxq-one-scheme", 40.0, clock=CLOCK)
    gptq = goals.goals_of([mine, row("small/llmcompressor", 9.9)])[1]
    assert gptq.found == pytest.approx(1.0)
    assert gptq.verdict == "reached"


def results(rows):
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "is_quick": False,
        "settings": {
            **AMOUNTS.as_settings(),
            "model": "tiny",
            "calibration": "some.txt",
            "random": {"gb": 2.0},
            "seed": 0,
        },
        "machine": {"processor": "a CPU", "cores": 2, "memory_bytes": 2**34, "python": "3.11"},
        "rows": rows,
    }


def test_the_page_says_that_nothing_was_measured_without_a_file():
    lines = page.speed_sections({})
    assert any(line.startswith("Not measured: there is no") for line in lines)


def test_the_page_has_totals_goals_and_shares_from_rows_alone():
    mine = row("small/mxq", 40.0, clock=CLOCK, original_nll=4.25)
    lines = page.speed_sections({"pipeline-x.json": results([mine, row("small/autoround", 130.0)])})
    text = "\n".join(lines)
    # 40 s for 20 million parameters; 130 / 40 = 3.25.
    assert "| 40.0 | 80.0 | 2.000 | 5.0 | 0.1 | 4.5000 |" in text
    assert "at least 3 times, found 3.25 (**reached**)" in text
    assert "not slower than the whole run of the peer: at least 1 times (**not" in text
    assert "4.2500 held-out nats" in text
    # 79.8 and 80 processors' seconds for the 16 million parameters that were quantized.
    assert "| forward | 75.0% | 24.8% | 99.8% | 4.987 |" in text
    assert "| all others | 0.2% | 0.0% | 0.2% | 0.013 |" in text
    assert "| all | 75.2% | 24.8% | 100.0% | 5.000 |" in text
    assert "| s per million | 3.763 | 1.238 | 5.000 |  |" in text


def test_a_run_beside_other_programs_gives_steps_and_no_totals(tmp_path):
    quiet = row("small/mxq", 40.0, clock=CLOCK, original_nll=4.25)
    steps = [{**CLOCK[0], "processor_s": 32.0}]
    busy = row("small/mxq", 400.0, clock=steps, commit="def", threads=1)
    found = results([quiet, row("small/autoround", 130.0)])
    bench_pipeline._add(found, busy, tmp_path / "x.json", "loaded")
    assert [entry["total_s"] for entry in found["rows"]] == [40.0, 130.0]
    assert bench_pipeline._is_done(found, "small/mxq", 0, "loaded")
    assert not bench_pipeline._is_done(results([busy]), "small/mxq", 0, "loaded")
    text = "\n".join(page.speed_sections({"pipeline-x.json": found}))
    assert "at least 3 times, found 3.25 (**reached**)" in text
    assert "400.0" not in text
    assert "all stages, tiny (some, 20.0 M), commit def, one thread, load 0.1 at the start:" in text
    assert "| forward | 100.0% | 100.0% | 2.000 |" in text
    assert "commit abc" not in text


def test_the_page_names_what_failed_and_gives_the_spread_of_runs():
    rows = [
        row("small/mxq", 40.0, clock=CLOCK, original_nll=4.0),
        row("small/mxq", 44.0, clock=CLOCK, original_nll=4.0) | {"run": 1},
        {"case": "small/autoround", "run": 0, "error": "exit status 1: long"},
        {"case": "small/llmcompressor", "run": 0, "skipped": "no environment"},
    ]
    text = "\n".join(page.speed_sections({"pipeline-x.json": results(rows)}))
    assert "42.0 (40.0 to 44.0)" in text
    assert "- small/autoround: failed\n- small/llmcompressor: no environment" in text


def test_a_row_that_failed_is_run_again_and_replaced(tmp_path, capsys):
    found = results([{"case": "small/mxq", "run": 0, "error": "exit status 1"}])
    assert not bench_pipeline._is_done(found, "small/mxq", 0)
    bench_pipeline._add(found, row("small/mxq", 40.0, clock=CLOCK), tmp_path / "r" / "x.json")
    written = json.loads((tmp_path / "r" / "x.json").read_text())
    assert [entry.get("total_s") for entry in written["rows"]] == [40.0]
    assert bench_pipeline._is_done(written, "small/mxq", 0)
    assert not bench_pipeline._is_done(written, "small/mxq", 1)
    assert "2.000 s per million parameters" in capsys.readouterr().out


def test_a_file_of_other_settings_is_refused_and_one_of_the_same_gone_on_with(tmp_path):
    arguments = argparse.Namespace(
        model="demo", calibration="file:a=/x/y/b.txt", seed=0, quick=False, json=tmp_path / "x.json"
    )
    shape = models.RandomShape()
    first = bench_pipeline._open_results(arguments, AMOUNTS, shape)
    assert first["settings"]["calibration"] == "a=b.txt"
    first["rows"].append({"case": "small/mxq", "run": 0, "total_s": 1.0})
    arguments.json.write_text(json.dumps(first))
    assert bench_pipeline._open_results(arguments, AMOUNTS, shape)["rows"] == first["rows"]
    with pytest.raises(SystemExit, match="measured with other settings"):
        bench_pipeline._open_results(arguments, cases.Amounts(threads=1), shape)


def test_quick_runs_are_kept_out_of_the_results(monkeypatch, capsys):
    path = ROOT / "benchmarks" / "results" / "pipeline-quick.json"
    monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", "--quick", "--json", str(path)])
    with pytest.raises(SystemExit):
        bench_pipeline._arguments()
    assert "--quick measures nothing of worth" in capsys.readouterr().err


def test_quick_runs_take_the_number_of_threads_that_is_asked_for(monkeypatch):
    argv = ["bench_pipeline.py", "--quick", "--threads", "1", "--json", "quick.json"]
    monkeypatch.setattr(sys, "argv", argv)
    amounts = bench_pipeline._amounts(bench_pipeline._arguments())
    assert amounts == cases.Amounts(8, 8, 64, 5, threads=1)


def test_a_command_without_amounts_gets_the_stated_ones(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench_pipeline.py", "--json", str(tmp_path / "a.json")])
    arguments = bench_pipeline._arguments()
    assert bench_pipeline._amounts(arguments) == AMOUNTS
    assert arguments.random_gb == models.RandomShape().gb

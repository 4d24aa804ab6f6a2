"""What ``mxq allocate`` says of latencies: where they come from, and what was measured."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from mxq import latency, pipeline
from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.cli import app
from mxq.config import AllocateOptions, TuneOptions
from mxq.kernels.tuning import Bench
from mxq.latency import latency_report, load_pricing, run_tune
from mxq.scheme import parse_schemes
from mxq.search import load_device, uniform
from mxq.search.figures import load_figures
from mxq.search.fit import predict_us
from mxq.search.kernel_cost import BranchConstants
from mxq.workspace import Workspace

EXPERTS, TOKENS = 4, 100


def make_table(menu):
    schemes = parse_schemes(menu)
    shapes = {"gate": (256, 512), "up": (256, 512), "down": (512, 256)}
    blocks = tuple(
        BlockInfo(f"layers.0.experts.{e}.{name}", 0, e, name, *shape, TOKENS // 2, "layers.0")
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    )
    loss = tuple(tuple(2.0**-s.w_bits for s in schemes) for _ in blocks)
    quantizer = tuple(("rtn",) * len(schemes) for _ in blocks)
    provenance = Provenance("model", "text")
    return SensitivityTable(
        blocks, schemes, loss, quantizer, "fisher", "nats", TOKENS, (), provenance
    )


@pytest.fixture
def work(tmp_path):
    space = Workspace(tmp_path / "work")
    space.save("sensitivity", make_table("w2a16_g128_asym,w4a16_g128_asym,w4a8_g64_sym"))
    return space.folder


def allocated(monkeypatch, cache, work, *arguments):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    arguments = ("allocate", work, *arguments, "--tokens", 8)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def tune(folder):
    """A profile of 4-bit decode kernels, from times that the model itself predicts."""
    device, truth = load_device("h200"), BranchConstants(3000.0, 0.6, 0.5, None)

    def timer(cases, replays):
        figures = load_figures(90).branches["w4a16_g128/16"]
        return [predict_us(cases[0], device, figures, truth, 2.5)] * replays

    def launcher(case):
        return [case] * case.copies

    bench = Bench("NVIDIA H200", launcher, timer, dict, {"triton": "3.6.0"})
    options = TuneOptions(parse_schemes("w4a16_g128_asym"), ("decode",), output=folder)
    return run_tune(options, bench=bench)


def test_both_plans_are_priced_and_the_source_is_said(monkeypatch, tmp_path, work):
    shown = allocated(monkeypatch, tmp_path, work, "--bits", 2.2, "--device", "h200")
    assert "Latency of the blocks in a step of 8 tokens, us" in shown
    assert "not measured" in shown
    assert "Predicted against measured" not in shown
    assert "No kernel computes" not in shown  # of the schemes in the plans
    report = latency.latency_of(
        Workspace(work).sensitivity(),
        pipeline.plan_again(Workspace(work), AllocateOptions(2.2, device="h200", tokens=8)),
        AllocateOptions(2.2, device="h200", tokens=8),
    )
    for name, step in report.steps.items():
        assert f"{report.additive_us[name]:.1f}" in shown
        assert f"{step.total_us:.1f}" in shown
        assert step.additive_us == pytest.approx(report.additive_us[name])
        # Gate and up of the experts are a launch, down is another.
        assert step.launches == 2


def test_a_measurement_is_shown_beside_the_prediction(monkeypatch, tmp_path, work):
    tune(tmp_path / "mxq" / "profiles")
    shown = allocated(
        monkeypatch, tmp_path, work, "--plan", "uniform:w4a16_g128_asym", "--device", "h200"
    )
    assert "measured on NVIDIA H200 on" in shown
    assert "Predicted against measured, us" in shown
    assert "w4a16_g128/16" in shown
    mixed = allocated(
        monkeypatch, tmp_path, work, "--plan", "uniform:w2a16_g128_asym", "--device", "h200"
    )
    assert "Not timed: w2a16_g128/16" in mixed


def test_a_profile_may_be_given_by_its_path(monkeypatch, tmp_path, work):
    path = tune(tmp_path / "elsewhere").path
    plan = ("--plan", "uniform:w4a16_g128_asym")
    assert "measured on" in allocated(monkeypatch, tmp_path, work, *plan, "--device", path)


def test_a_roofline_says_that_it_is_one(monkeypatch, tmp_path, work):
    shown = allocated(monkeypatch, tmp_path, work, "--bits", 3, "--device", "a100")
    assert "No compiled figures of the kernels for NVIDIA A100 SXM 80 GB" in shown


def test_a_forced_plan_has_a_latency_too(monkeypatch, tmp_path, work):
    shown = allocated(
        monkeypatch, tmp_path, work, "--plan", "uniform:w4a8_g64_sym", "--device", "h200"
    )
    assert "No kernel computes w4a8_g64_sym: priced as decoded to bf16 in memory" in shown
    assert Workspace(work).allocation().predicted_latency_us > 0


def test_a_branch_without_figures_is_named():
    table, pricing = make_table("w4a16_g128_asym"), load_pricing("h200")
    figures = pricing.cost.kernels.figures
    figures = {name: value for name, value in figures.items() if name != "w4a16_g128/16"}
    kernels = replace(pricing.cost.kernels, figures=figures)
    pricing = replace(pricing, cost=replace(pricing.cost, kernels=kernels))
    plan = uniform(table, table.schemes[0], cost_model=pricing.cost, tokens=8)
    report = latency_report(table, {"plan": plan}, pricing, 8)
    assert report.notes == (
        "No compiled figures of w4a16_g128/16: priced by bytes and matrix rate, without "
        "instructions.",
    )


def test_more_tokens_never_take_less_time_within_a_plan():
    table, pricing = make_table("w4a16_g128_asym"), load_pricing("h200")
    times = [
        uniform(table, table.schemes[0], cost_model=pricing.cost, tokens=t).predicted_latency_us
        for t in range(1, 30)
    ]
    assert times == sorted(times)

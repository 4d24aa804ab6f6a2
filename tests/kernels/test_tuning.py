"""Cases, times and the whole of ``mxq tune`` on a bench whose clock is a formula."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mxq import latency, pipeline
from mxq.artifacts import KernelCase
from mxq.cli import app
from mxq.config import TuneOptions, parse_shapes
from mxq.kernels.spec import TILE_PLANS, format_of
from mxq.kernels.tuning import (
    COLD_BYTES,
    DEFAULT_SHAPES,
    LEAST_COPIES,
    Bench,
    cuda_bench,
    time_cases,
    tuning_cases,
)
from mxq.latency import load_pricing, measured_branch, run_tune
from mxq.latency_tables import show_tuning
from mxq.scheme import Scheme, parse_schemes
from mxq.search.device import load_device
from mxq.search.figures import load_figures
from mxq.search.fit import branch_of, predict_us
from mxq.search.kernel_cost import BranchConstants
from mxq.storage import load_artifact, save_artifact

H200 = load_device("h200")
LAUNCH_US = 2.75
MENU = "w4a16_g128_asym,w8a8_grow_sym,bf16"
TRUTH = BranchConstants(2500.0, 0.61, 0.52, 0.66)


def formula_us(case):
    """What a launch takes on the bench: the model itself, with constants to be found."""
    figures = load_figures(90).branches[branch_of(case)]
    return predict_us(case, H200, figures, TRUTH, LAUNCH_US)


def bench(us_of=formula_us, gpu="NVIDIA H200"):
    """A machine that launches nothing and reads times off a formula."""
    state = {}

    def launcher(case):
        state["case"] = case
        return [lambda: None] * case.copies

    def timer(launches, replays):
        assert len(launches) == state["case"].copies
        middle = us_of(state["case"])
        return [middle * (0.9 + 0.2 * i / (replays - 1)) for i in range(replays)]

    versions = {"triton": "3.6.0", "mxq": "0"}
    return Bench(gpu, launcher, timer, lambda: {"sm": 1900.0}, versions)


# Cases


def test_each_format_has_cases_once_under_every_plan():
    # The grid's symmetry is data: both w4a16_g128 schemes are one format.
    cases = tuning_cases(parse_schemes("w4a16_g128_asym,w4a16_g128_sym,bf16"))
    branches = {branch_of(case) for case in cases}
    assert branches == {f"{form}/{t}" for form in ("w4a16_g128", "bf16") for t in (16, 64, 128)}
    assert sum(case.tokens == 0 for case in cases) == len(TILE_PLANS)
    assert len(set(cases)) == len(cases)


def test_cases_read_cold_weights_once_and_more_often():
    decode = TILE_PLANS[:1]
    cases = [c for c in tuning_cases([Scheme.parse("bf16")], plans=decode) if c.tokens]
    assert {case.tokens for case in cases} == {16, 64}
    assert len({case.in_features for case in cases}) >= 4
    for case in cases:
        read = case.copies * case.experts * case.out_features * case.in_features * 2
        assert case.copies >= LEAST_COPIES
        assert read >= COLD_BYTES


def test_a_scheme_without_kernel_cannot_be_timed():
    with pytest.raises(ValueError, match="no kernel computes w4a8_g64_sym"):
        tuning_cases(parse_schemes("w4a8_g64_sym"))


def test_times_are_percentiles_of_the_replays():
    case = KernelCase(Scheme.parse("bf16"), 16, 1, 16, 128, 128, 4)
    (timing,) = time_cases([case], bench(lambda _: 10.0), replays=11)
    assert (timing.count, timing.median_us) == (11, pytest.approx(10.0))
    assert (timing.p10_us, timing.p90_us) == (pytest.approx(9.2), pytest.approx(10.8))


# The command, on a bench


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    options = TuneOptions(parse_schemes(MENU), output=folder, replays=5)
    return run_tune(options, bench=bench()), folder


def test_tuning_finds_the_constants_behind_the_times(tuned):
    profile = tuned[0].profile
    assert profile.launch_us == pytest.approx(LAUNCH_US)
    assert len(profile.branches) == 9
    for branch in profile.branches.values():
        assert branch.constants.tile_cycles == pytest.approx(TRUTH.tile_cycles, rel=1e-6)
        for limit, value in branch.constants.efficiencies.items():
            # A unit that never held up a loop was not seen.
            assert value is None or value == pytest.approx(TRUTH.efficiencies[limit], rel=1e-6)
    assert profile.error < 1e-6
    decode = profile.branches["bf16/16"].constants
    assert decode.memory_efficiency == pytest.approx(TRUTH.memory_efficiency)


def test_the_profile_is_found_by_the_device_and_by_its_path(tuned):
    result, folder = tuned
    assert result.path == folder / "nvidia-h200-triton3.6.0.json"
    for pricing in (load_pricing("h200", folder), load_pricing(str(result.path))):
        assert pricing.profile == result.profile
        assert pricing.cost.describe().startswith("measured on NVIDIA H200 on 20")
        assert "model error median 0.0 %" in pricing.cost.describe()
    assert load_pricing("h100", folder).profile is None
    assert load_pricing("h200", folder / "nothing").profile is None


def test_without_a_profile_the_source_says_not_measured():
    found = load_pricing("h200").cost.describe()
    assert found.startswith("compiled figures (Triton")
    assert found.endswith("+ device file of NVIDIA H200 SXM, not measured")
    assert load_pricing("a100").cost.describe() == "roofline of NVIDIA A100 SXM 80 GB"


def test_a_profile_that_was_edited_is_refused(tuned, tmp_path):
    fields = json.loads(tuned[0].path.read_text())
    fields["content"]["launch_us"] = 0.1
    path = tmp_path / "nvidia-h200-triton3.6.0.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="was edited or damaged: its checksum differs"):
        load_pricing("h200", tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not an mxq artifact"):
        load_pricing("h200", tmp_path)
    with pytest.raises(ValueError, match="is not a device file"):
        load_pricing(str(path))


def test_predicted_is_shown_against_measured(tuned, capsys):
    show_tuning(tuned[0])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Predicted against measured" in shown
    assert "w8a8_grow/128" in shown
    assert f"a launch takes {LAUNCH_US:.2f} us" in shown
    assert "sm 1900 MHz" in shown


def test_unmeasured_predictions_come_from_the_device_file_alone(tuned):
    branch = tuned[0].profile.branches["bf16/16"]
    row = measured_branch("bf16/16", branch, H200)
    largest = max(branch.timings, key=lambda timing: timing.median_us)
    sm = H200.multiprocessor
    assumed = BranchConstants(
        sm.tile_cycles, sm.memory_efficiency, sm.issue_efficiency, sm.matrix_efficiency
    )
    figures = branch.figures
    assert row.timing == largest
    assert row.compiled_us == predict_us(largest.case, H200, figures, assumed, H200.launch_us)
    assert row.median_compiled_error > 0.05 > row.median_error


def test_a_gpu_that_no_device_file_names_needs_one(tmp_path):
    options = TuneOptions(parse_schemes("bf16"), ("decode",), output=tmp_path, replays=5)
    with pytest.raises(ValueError, match="no device file names the GPU 'NVIDIA B200'"):
        run_tune(options, bench=bench(gpu="NVIDIA B200"))


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="plan 'fast' is unknown; choose one of decode, middle"):
        TuneOptions(plans=("fast",))
    with pytest.raises(ValueError, match="replays is 0; it must be at least 1"):
        TuneOptions(replays=0)
    with pytest.raises(ValueError, match="shape ' 12' is not of the form OUTPUTSxINPUTS"):
        parse_shapes("128x64, 12")
    assert parse_shapes("128x64, 7x9") == ((128, 64), (7, 9))


def test_the_command_times_the_shapes_of_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "cuda_bench", bench)
    arguments = ["tune", "demo", "--schemes", "bf16", "--plans", "decode", "--replays", "5"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    path = tmp_path / "mxq" / "profiles" / "nvidia-h200-triton3.6.0.json"
    timings = load_artifact(path, latency.DeviceProfile).branches["bf16/16"].timings
    timed = {(t.case.out_features, t.case.in_features) for t in timings}
    # The embedded model has blocks of one shape, too few to tell constants apart.
    assert timed == {*pipeline.shapes_of("demo"), *DEFAULT_SHAPES}


def test_shapes_of_enough_widths_replace_the_default_ones(tmp_path):
    shapes = ((512, 256), (512, 512), (128, 1024))
    options = TuneOptions(parse_schemes("bf16"), ("decode",), output=tmp_path, replays=5)
    profile = run_tune(options, bench=bench(), shapes=shapes).profile
    timings = profile.branches["bf16/16"].timings
    assert {(t.case.out_features, t.case.in_features) for t in timings} == set(shapes)


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 1
    assert "mxq tune times kernels on a CUDA GPU and torch finds none here" in done.output
    with pytest.raises(RuntimeError, match="torch finds none here"):
        cuda_bench()


# The real launches, in the interpreter


@pytest.mark.parametrize("scheme", ["w4a16_g128_asym", "w8a8_grow_sym", "bf16", "fp8"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_launches_of_a_case_compute_its_product(scheme, tokens):
    timed = pytest.importorskip("mxq.kernels.timed_launches")
    if torch.cuda.is_available():
        pytest.skip("the interpreter computes on the CPU")
    case = KernelCase(Scheme.parse(scheme), 16, 2, tokens, 128, 256, copies=2)
    assert format_of(case.scheme)
    launches = timed.group_gemm_launches(case, "cpu")
    assert len(launches) == 2
    for launch in launches:
        launch()


def test_an_artifact_of_another_kind_is_no_profile(tmp_path, tuned):
    path = tmp_path / "other.json"
    save_artifact(path, tuned[0].profile.device)
    with pytest.raises(ValueError, match="is Device version 1, expected DeviceProfile version 1"):
        load_pricing(str(path))

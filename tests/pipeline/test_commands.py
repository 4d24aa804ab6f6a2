"""The command line: what each command prints and writes, and how it fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mxq
from mxq import pipeline, resources
from mxq.artifacts import Allocation
from mxq.cli import app
from mxq.machine import Machine
from mxq.quantizers import quantize_rtn
from mxq.scheme import Scheme
from mxq.storage import load_artifact
from mxq.workspace import Workspace

MENU = "w2a16_g32_asym,w3a16_g32_asym,w4a16_g32_asym,w8a16_g32_asym"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The clock struck {number} times. " for number in range(60)))
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    """Standard output of a command that ends well, its lines joined."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def fails(*arguments):
    """The message of a command that the user got wrong: one line, no traceback, status 1."""
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert done.stderr.count("error: ") == 1
    return done.stderr.splitlines()[-1]


def budget_free(model, text, *, samples=6, seqlen=16):
    """Arguments of ``profile``, ``measure`` and ``quantize`` alike, but for what they write."""
    return (model, "--calibration", f"file:{text}", "--samples", samples, "--seqlen", seqlen)


def contract(model, text, output, work):
    """The command of the project's contract, in sizes that fit a tiny model."""
    line = (
        f"quantize {model} --bits 3.5 --output {output} --schemes {MENU} --calibration file:{text} "
        "--samples 6 --seqlen 16 --granularity block --quantizer gptq --sensitivity fisher "
        f"--seed 0 --work {work}"
    )
    return line.split()


@pytest.fixture(scope="module")
def contracted(model, text, tmp_path_factory):
    """Output of that command, its folder and its work folder."""
    place = tmp_path_factory.mktemp("contract")
    shown = succeeds(*contract(model, text, place / "out", place / "work"))
    return shown, place / "out", place / "work"


@pytest.fixture
def work(contracted, tmp_path):
    """A copy of the work folder that a test may change."""
    return Path(shutil.copytree(contracted[2], tmp_path / "work"))


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_quantize_shows_the_plan_and_its_measured_loss(contracted):
    shown, output, _ = contracted
    for words in (
        "Bits per weight by layer and projection",
        "Each plan that was packed, on 15 held-out tokens",
        "Quantized 30 linear blocks; kept in their type:",
        "4 tensors: router",
        "8 tensors: outside the scope 'experts'",
    ):
        assert words in shown
    assert shown.endswith(f"Written to {output}")
    AutoModelForCausalLM.from_pretrained(output)


def test_the_same_command_in_another_process_writes_the_same_bytes(
    contracted, model, text, tmp_path
):
    _, output, work = contracted
    command = [
        sys.executable,
        "-m",
        "mxq",
        *contract(model, text, tmp_path / "out", tmp_path / "w"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Written to" in done.stdout
    assert "pack plan: pack 2/2" in done.stderr
    assert files_of(tmp_path / "out") == files_of(output)
    assert files_of(tmp_path / "w") == files_of(work)


def test_another_seed_takes_other_calibration_text(contracted, model, text, tmp_path):
    arguments = (*contract(model, text, tmp_path / "out", tmp_path / "work"), "--seed", 1)
    succeeds(*arguments)
    name = "calibration.safetensors"
    assert files_of(tmp_path / "work")[name] != files_of(contracted[2])[name]


def test_quantize_of_the_embedded_model_needs_nothing_else(tmp_path):
    shown = succeeds(
        "quantize", "demo", "--bits", 4, "--samples", 4, "--seqlen", 32, "--quantizer", "rtn",
        "--sensitivity", "output_mse", "--rotation", "off", "--output", tmp_path / "out",
    )  # fmt: skip
    assert "Quantized 81 linear blocks" in shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_allocate_solves_again_without_reading_the_model(work, monkeypatch):
    monkeypatch.setattr(pipeline, "open_adapter", None)
    shown = succeeds("allocate", work, "--bits", 5)
    assert "5.0000" in shown
    plan = Workspace(work).allocation()
    assert plan.asked_bits == 5
    assert 4.9 < plan.bits_per_weight <= 5


def test_allocate_then_pack_is_what_quantize_would_have_written(
    work, model, text, tmp_path, contracted
):
    succeeds("allocate", work, "--bits", 5)
    succeeds("pack", work, "--output", tmp_path / "packed")
    whole = tmp_path / "whole"
    line = contract(model, text, whole, contracted[2].with_name("again"))
    line[line.index("3.5")] = "5"
    succeeds(*line, "--no-guard")
    assert files_of(tmp_path / "packed") == files_of(whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_allocate_takes_a_size_and_a_forced_plan(work):
    succeeds("allocate", work, "--size", "320kB", "--granularity", "layer", "--tie-gate-up")
    sized = Workspace(work).allocation()
    succeeds("allocate", work, "--plan", "uniform:w8a16_g32_asym")
    forced = Workspace(work).allocation()
    assert set(forced.schemes.values()) == {Scheme.parse("w8a16_g32_asym")}
    assert sized.bits_per_weight < forced.bits_per_weight


def test_allocate_within_a_latency_reports_it(work):
    shown = succeeds(
        "allocate", work, "--bits", 5, "--device", "h200", "--tokens", 64, "--max-latency", 1000
    )
    assert "Latency of the blocks in a step of 64 tokens" in shown
    plan = Workspace(work).allocation()
    assert f"{plan.predicted_latency_us:.1f} us" in shown
    assert plan.predicted_latency_us > 0
    assert "64 tokens" in plan.latency_source


def test_profile_then_measure_then_inspect(model, text, tmp_path):
    work = tmp_path / "work"
    shown = succeeds("profile", *budget_free(model, text), "--work", work)
    # Six samples, one in four spare; the held-out one is not routed for statistics.
    assert "Experts by the tokens routed to them, of 112 profiled tokens" in shown
    assert "still under 64 fitting tokens" in shown
    assert "layers.1.experts" in shown
    shown = succeeds(
        "measure", *budget_free(model, text), "--work", work, "--schemes", MENU,
        "--sensitivity", "output_mse", "--rotation", "off",
    )  # fmt: skip
    assert "Predicted loss of uniform plans (output_mse" in shown
    assert "w2a16_g32_asym │ 2.5625" in shown
    shown = succeeds("inspect", work)
    assert f"Work folder for {model}".replace(" ", "") in shown.replace(" ", "")
    assert "Predicted loss of uniform plans" in shown


def test_inspect_shows_the_plan_of_a_checkpoint(contracted):
    _, output, _ = contracted
    plan = load_artifact(output / "mxq_plan.json", Allocation)
    shown = succeeds("inspect", output)
    assert f"{plan.bits_per_weight:.4f} bits per weight" in shown
    assert all(str(scheme) in shown for scheme in plan.schemes.values())


# Mistakes


def test_an_infeasible_budget_ends_with_one_line_and_no_output(model, text, tmp_path):
    message = fails(
        "quantize", *budget_free(model, text), "--bits", 1.5, "--schemes", MENU, "--rotation",
        "off", "--quantizer", "rtn", "--output", tmp_path / "out", "--work", tmp_path / "work",
    )  # fmt: skip
    assert "1.5 bits per weight were asked for, but the cheapest plan needs 2.5625" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "17"], "--bits 17 is not between 0 and 16 bits per weight"),
        ([], "give one of --bits, --size or --plan; found none of them"),
        (["--bits", "3", "--size", "1MB"], "found --bits and --size"),
        (["--size", "5 parsecs"], "size '5 parsecs' is not a number with a unit"),
        (["--plan", "best"], "--plan 'best' is not of the form uniform:SCHEME"),
        (["--bits", "3", "--schemes", "w4"], "scheme 'w4' is not of the form"),
        (["--bits", "3", "--schemes", "w4a16_g128_asym"], "add a scheme with a smaller group"),
        (["--bits", "3", "--samples", "1"], "samples is 1; it must be at least 2"),
        (["--bits", "3", "--keep", "("], "--keep '(' is not a regular expression"),
        (["--bits", "3", "--scope", "most"], "scope 'most' is unknown; choose one of auto"),
        (["--bits", "3", "--rotation", "x"], "rotation 'x' is unknown; choose one of auto, on"),
        (
            ["--bits", "3", "--quantizer", "x"],
            "quantizer 'x' is unknown; choose one of gptq, kronecker, refined, rtn",
        ),
        (["--bits", "3", "--sensitivity", "x"], "sensitivity 'x' is unknown; choose one of"),
        (["--bits", "3", "--granularity", "x"], "granularity 'x' is unknown; choose one of block"),
        (["--bits", "3", "--device", "h200", "--max-latency", "1"], "--max-latency needs"),
        (["--bits", "3", "--samples", "900"], "windows of 16 need at least"),
    ],
)
def test_a_mistake_in_quantize_is_explained(options, message, model, text, tmp_path):
    command = ("quantize", *budget_free(model, text), "--output", tmp_path / "out", *options)
    assert message in fails(*command)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_that_does_not_exist_is_explained(tmp_path):
    command = ("quantize", tmp_path / "none", "--bits", 4, "--output", tmp_path / "out")
    assert "none is not a folder; give a model folder or a hub id" in fails(*command)


def test_commands_on_a_folder_that_is_no_work_folder_say_so(tmp_path):
    for command in (["allocate", tmp_path, "--bits", 4], ["pack", tmp_path, "-o", tmp_path / "o"]):
        assert "does not exist; run" in fails(*command)
    assert "is neither an mxq checkpoint nor a work folder" in fails("inspect", tmp_path)


def test_pack_refuses_a_model_that_changed_since(work, model, tmp_path):
    moved = Path(shutil.copytree(model, tmp_path / "model"))
    settings = work / "settings.json"
    assert str(model) in settings.read_text()
    succeeds(
        "profile",
        moved,
        "--work",
        tmp_path / "other",
        "--calibration",
        "demo",
        "--samples",
        8,
        "--seqlen",
        16,
    )
    shutil.copy(tmp_path / "other" / "settings.json", settings)
    save_tiny(moved, seed=5)
    message = fails("pack", work, "--output", tmp_path / "out")
    assert "is not the model that" in message
    assert "run mxq measure again" in message


def test_pack_refuses_a_plan_of_another_model(work, tmp_path):
    other = save_tiny(tmp_path / "other", seed=5)
    succeeds(
        "profile", other, "--work", work, "--calibration", "demo", "--samples", 8, "--seqlen", 16
    )
    message = fails("pack", work, "--output", tmp_path / "out")
    assert "were measured on another model or other calibration text" in message
    assert not (tmp_path / "out").exists()


def test_pack_refuses_a_plan_of_other_calibration_text(work, model, tmp_path):
    succeeds(
        "profile", model, "--work", work, "--calibration", "demo", "--samples", 8, "--seqlen", 16
    )
    message = fails("pack", work, "--output", tmp_path / "out")
    assert "were measured on another model or other calibration text" in message


@pytest.mark.parametrize("command", ["profile", "measure", "pack"])
def test_a_stage_without_room_is_refused_before_it_begins(
    command, work, model, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(resources, "machine", lambda folder: Machine(2**20, 2**50))
    folder = tmp_path / "fresh"
    line = {
        "pack": (work, "--output", tmp_path / "out"),
        "profile": (*budget_free(model, text), "--work", folder),
        "measure": (*budget_free(model, text), "--schemes", MENU, "--work", folder),
    }[command]
    done = run(command, *line)
    assert done.exit_code == 1
    assert "of memory and 1.0 MiB are free" in done.stderr
    stages = {"pack": ("pack", "measured loss"), "measure": ("profile", "measure")}
    shown = [name for name in resources.STAGES if f" {name} " in done.stderr]
    assert shown == list(stages.get(command, ("profile",)))
    assert not list(folder.rglob("*.*"))
    assert not list((tmp_path / "out").rglob("*.*"))
    succeeds(command, *line, "--force")


def test_samples_longer_than_the_model_are_refused(model, tmp_path):
    command = ("profile", model, "--calibration", "demo", "--work", tmp_path / "work")
    message = fails(*command, "--samples", 8, "--seqlen", 300)
    assert "samples of 300 tokens are longer than the model's 128 positions" in message


def test_an_edited_artifact_is_refused(work):
    path = work / "sensitivity.json"
    path.write_text(path.read_text().replace('"fisher"', '"fishy"'))
    assert "sensitivity.json was edited or damaged" in fails("allocate", work, "--bits", 4)


def test_commands_without_arguments_show_the_menu():
    done = run()
    for command in ("quantize", "profile", "measure", "allocate", "pack", "inspect"):
        assert command in done.output


def test_pack_refuses_a_plan_that_is_older_than_the_measurement(work, model, text, tmp_path):
    again = (*budget_free(model, text), "--schemes", "w8a16_g32_asym", "--work", work)
    succeeds("measure", *again)
    assert "run mxq allocate" in fails("pack", work, "--output", tmp_path / "out")
    succeeds("allocate", work, "--plan", "uniform:w8a16_g32_asym")
    succeeds("pack", work, "--output", tmp_path / "out")


def test_pack_says_that_a_quantizer_of_the_callers_own_is_not_in_the_folder(model, tmp_path):
    mxq.quantize(
        model,
        output=tmp_path / "first",
        bits=4,
        work=tmp_path / "work",
        calibration=token_ids(9, 16),
        schemes=MENU,
        quantizer=lambda w, scheme, hessian: quantize_rtn(w, scheme),
    )
    message = fails("pack", tmp_path / "work", "--output", tmp_path / "out")
    assert "of the caller's own" in message

"""Runs that are stopped: killed, interrupted, out of disk; the next one goes on and ends alike."""

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import Stop, attempts
from safetensors.torch import load_file, save_file
from tiny import save_tiny, token_ids

import mxq
from mxq import finish, pipeline, profile_stage
from mxq.checkpoint import pack as packing
from mxq.locks import LOCK
from mxq.profiling import measure as measuring
from mxq.publish import record_files
from mxq.quantizers import quantize_rtn
from mxq.workspace import Workspace

MENU = "w2a16_g32_asym,w4a8_g32_asym,bf16"
IDS = token_ids(9, 16, seed=7)
KILLS = 26


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def attempt(tmp_path_factory):
    with attempts(tmp_path_factory.mktemp("printed")) as attempt:
        yield attempt


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("small"))
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"The clock struck {number} times. " for number in range(60)))
    line = (
        f"quantize {model} --bits 4.5 --schemes {MENU} --calibration file:{text} --samples 6 "
        "--seqlen 16 --rotation off --output"
    )
    return line.split()


@pytest.fixture(scope="module")
def undisturbed(attempt, command, tmp_path_factory):
    """A folder that a run wrote in one go, what it printed, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    done = attempt([*command, folder])
    assert done.status == 0, done.stderr
    return folder, done


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_message(done):
    """What a command that failed said: one line, no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr.splitlines()[-1]


def without_path(text, folder):
    """Printed tables without the name of the folder, which differs."""
    return text.replace(str(folder), "").split("Written to")[0]


# Killed


def test_what_a_killed_writer_left_is_no_file_of_a_checkpoint(tmp_path):
    for name in ("config.json", "model-0.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".write-7-model-1.safetensors.mxq-part").mkdir()
    assert list(record_files(tmp_path)) == ["model-0.safetensors", "config.json"]


def test_a_run_killed_at_any_moment_goes_on_and_writes_the_same_bytes(
    attempt, command, undisturbed, tmp_path
):
    (reference, first), folder = undisturbed, tmp_path / "out"
    chance, kills = random.Random(3), 0
    while kills < KILLS:
        done = None
        while done is None or done.status != 0:
            # Every second one dies at a write: before it, half way, or after it.
            stop = Stop(seconds=chance.uniform(0, first.seconds))
            done = attempt(
                [*command, folder], Stop(flush=chance.randint(1, 24)) if kills % 2 else stop
            )
            assert done.status in (0, -signal.SIGKILL), done.stderr
            kills += done.status != 0
        assert files_of(folder) == files_of(reference)
        assert without_path(done.stdout, folder) == without_path(first.stdout, reference)
        shutil.rmtree(folder)


# Interrupted, and out of disk


@pytest.mark.parametrize(
    "call", ["mxq.profiling.measure.measure_layer", "mxq.checkpoint.pack.quantize_layer"]
)
def test_an_interrupted_run_says_so_and_goes_on(attempt, command, undisturbed, call, tmp_path):
    folder = tmp_path / "out"
    stop = Stop(call=call, number=2, signal=signal.SIGINT)
    done = attempt([*command, folder], stop)
    assert done.status == 130, done.stderr
    assert "interrupted; the same command goes on" in one_message(done)
    assert not list(folder.rglob("*.mxq-part"))
    assert attempt([*command, folder]).status == 0
    assert files_of(folder) == files_of(undisturbed[0])


@pytest.mark.parametrize("limit", [8000, 30_000])
def test_a_file_that_the_disk_does_not_take_is_named(
    attempt, command, undisturbed, limit, tmp_path
):
    folder = tmp_path / "out"
    done = attempt([*command, folder], Stop(limit=limit))
    assert done.status == 1
    message = one_message(done)
    assert str(folder) in message
    assert "could not be written: " in message
    assert "File too large" in message
    assert "run the same command again" in message
    assert not list(folder.rglob("*.mxq-part"))
    assert attempt([*command, folder]).status == 0
    assert files_of(folder) == files_of(undisturbed[0])


# In one process: what is done again and what is not


FAST = {
    "calibration": IDS,
    "schemes": MENU,
    "bits": 8,
    "quantizer": "rtn",
    "rotation": "on",
}


class Stopped(Exception):  # noqa: N818  (no error: a test ends the run)
    pass


def stop_at(stage, done, steps=("backward", "pack")):
    """A report that ends the run after so many layers of a stage."""

    def report(name, step, finished, total):
        if name.startswith(stage) and step in steps and finished == done:
            raise Stopped

    return report


@pytest.fixture
def layers_done(monkeypatch):
    """The layers that were really measured and quantized, in order."""
    found = {"measured": [], "packed": []}

    def measure_layer(adapter, batches, settings, visit, provenance):
        found["measured"].append(visit.layer)
        return measure(adapter, batches, settings, visit, provenance)

    def quantize_layer(work):
        found["packed"].append(work.layer)
        return quantize(work)

    measure, quantize = measuring.measure_layer, packing.quantize_layer
    monkeypatch.setattr(measuring, "measure_layer", measure_layer)
    monkeypatch.setattr(packing, "quantize_layer", quantize_layer)
    return found


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run in one go with FAST."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = mxq.quantize(model, output=folder, **FAST)
    # Rounded inputs, and bf16 in a rotated layer, come back from a shard in other ways.
    used = {str(scheme) for scheme in result.plans["plan"].schemes.values()}
    assert used >= {"w4a8_g32_asym", "bf16"}
    return result


def stopped(model, folder, stage, done, **changes):
    steps = ("forward", "pack") if "sensitivity" in changes else ("backward", "pack")
    report = stop_at(stage, done, steps)
    with pytest.raises(Stopped):
        mxq.quantize(model, output=folder, progress=report, **{**FAST, **changes})


@pytest.mark.parametrize(
    ("changes", "order"), [({}, [2, 1, 0]), ({"sensitivity": "output_mse"}, [0, 1, 2])]
)
def test_measured_layers_are_not_measured_again(model, layers_done, changes, order, tmp_path):
    stopped(model, tmp_path / "out", "measure", 2, **changes)
    assert layers_done["measured"] == order[:2]
    mxq.quantize(model, output=tmp_path / "out", **{**FAST, **changes})
    assert layers_done["measured"] == order
    mxq.quantize(model, output=tmp_path / "whole", **{**FAST, **changes})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("plan", ["plan", "uniform"])
def test_packed_layers_are_not_packed_again(model, whole, layers_done, plan, tmp_path):
    stopped(model, tmp_path / "out", f"pack {plan}", 2)
    mxq.quantize(model, output=tmp_path / "out", **FAST)
    assert layers_done["packed"] == [0, 1, 2, 0, 1, 2]
    assert files_of(tmp_path / "out") == files_of(whole.folder)


def test_a_measured_loss_is_not_measured_again(model, whole, monkeypatch, tmp_path):
    def fail(*arguments):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(finish, "publish", fail)
        with pytest.raises(Stopped):
            mxq.quantize(model, output=tmp_path / "out", **FAST)
    monkeypatch.setattr(finish, "measure_loss", fail)
    again = mxq.quantize(model, output=tmp_path / "out", **FAST)
    assert again.losses == whole.losses
    assert files_of(tmp_path / "out") == files_of(whole.folder)


def test_a_run_stopped_while_it_publishes_leaves_no_model_and_moves_the_rest(
    model, whole, layers_done, monkeypatch, tmp_path
):
    moved = []

    def fail_at_the_fourth(path, target):
        if len(moved) == 3:
            raise Stopped
        moved.append(target.name)
        path.replace(target)

    with monkeypatch.context() as patch:
        patch.setattr("mxq.publish.move_whole", fail_at_the_fourth)
        with pytest.raises(Stopped):
            mxq.quantize(model, output=tmp_path / "out", **FAST)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"mxq_run.json", *moved} < names
    assert "config.json" not in names
    monkeypatch.setattr(finish, "pack", None)
    assert mxq.quantize(model, output=tmp_path / "out", **FAST).losses == whole.losses
    assert files_of(tmp_path / "out") == files_of(whole.folder)


def test_a_finished_run_returns_its_result_at_once(model, whole, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise AssertionError("done again")

    for place, name in (
        (profile_stage, "profile_routing"),
        (pipeline, "measure"),
        (pipeline, "plan"),
        (finish, "pack"),
        (finish, "measure_loss"),
        (finish, "publish"),
    ):
        monkeypatch.setattr(place, name, fail)
    monkeypatch.setattr("mxq.planning.plan", fail)
    before = files_of(whole.folder)
    for overwrite in (False, True):
        assert mxq.quantize(model, output=whole.folder, overwrite=overwrite, **FAST) == whole
    assert files_of(whole.folder) == before


def test_a_finished_run_is_known_again_if_its_bits_are_not_a_round_number(tmp_path):
    model = save_tiny(tmp_path / "model")
    bits, weights = 3.34, 61440  # 2 layers, 4 + 1 experts of three matrices of 64 x 32
    assert bits * weights / weights != bits
    options = {"calibration": IDS, "schemes": "w2a16_g32_asym,w4a16_g32_asym", "bits": bits}
    options |= {"quantizer": "rtn", "guard": False, "output": tmp_path / "out"}
    assert mxq.quantize(model, **options) == mxq.quantize(model, **options)


def test_a_damaged_shard_of_a_stopped_run_is_packed_again(
    model, whole, layers_done, caplog, tmp_path
):
    stopped(model, tmp_path / "out", "pack plan", 2)
    shard = tmp_path / "out" / "work" / "packed-plan" / "model-layer-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    mxq.quantize(model, output=tmp_path / "out", guard=True, **FAST)
    assert layers_done["packed"] == [0, 1, 0, 2, 0, 1, 2]
    assert f"{shard} is absent or was changed; it is made anew" in caplog.text
    assert files_of(tmp_path / "out") == files_of(whole.folder)


def test_a_damaged_result_is_made_anew(model, whole, tmp_path):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "out"))
    shard = folder / "model-layer-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    mxq.quantize(model, output=folder, **FAST)
    assert files_of(folder) == files_of(whole.folder)


def test_a_quantizer_of_the_callers_own_starts_again(model, layers_done, tmp_path):
    def own(w_NK, scheme, hessian_KK):
        return quantize_rtn(w_NK, scheme, None)

    changes = {"quantizer": own, "guard": False}
    stopped(model, tmp_path / "out", "measure", 2, **changes)
    stopped(model, tmp_path / "out", "pack", 2, **changes)
    mxq.quantize(model, output=tmp_path / "out", **{**FAST, **changes})
    assert layers_done == {"measured": [2, 1, 2, 1, 0, 2, 1, 0], "packed": [0, 1, 0, 1, 2]}
    with pytest.raises(ValueError, match="is not empty"):
        mxq.quantize(model, output=tmp_path / "out", **{**FAST, **changes})


# What has changed is named


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model", "another model"),
        ("text", "other calibration text"),
        ("settings", "other settings (rotation: on -> off)"),
        ("versions", "torch: 1.0 -> "),
    ],
)
def test_layers_of_other_inputs_are_measured_again_and_the_change_is_named(
    change, words, model, layers_done, monkeypatch, caplog, tmp_path
):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    old = {"mxq": "1", "torch": "1.0", "transformers": "1", "safetensors": "1"}
    with monkeypatch.context() as patch:
        if change == "versions":
            patch.setattr("mxq.workspace.library_versions", lambda: old)
        stopped(folder, tmp_path / "out", "measure", 2)
    options = dict(FAST)
    if change == "model":
        other_weights(folder)
    if change == "text":
        options["calibration"] = token_ids(9, 16, seed=8)
    if change == "settings":
        options["rotation"] = "off"
    with caplog.at_level(logging.WARNING, "mxq"):
        stopped(folder, tmp_path / "out", "measure", 3, **options)
    assert layers_done["measured"] == [2, 1, 2, 1, 0]
    [line] = [record.getMessage() for record in caplog.records if "measure: " in record.message]
    assert words in line
    assert line.endswith("they are made anew")
    other = {"model", "text", "settings", "versions"} - {change}
    named = {"model": "another model", "text": "calibration", "settings": "settings"}
    assert not [word for word in other if named.get(word, "library versions") in line]


def test_the_result_of_another_run_is_not_replaced_but_with_overwrite(model, whole, tmp_path):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "out"))
    before = files_of(folder)
    options = {**FAST, "work": tmp_path / "work", "guard": False}
    with pytest.raises(ValueError, match=r"out holds the result of another run, made from other "):
        mxq.quantize(model, output=folder, **{**options, "bits": 3})
    assert files_of(folder) == before
    mxq.quantize(model, output=folder, overwrite=True, **{**options, "bits": 3})
    after = files_of(folder)
    assert after["config.json"] != before["config.json"]


def test_the_result_of_other_options_is_refused_before_anything_is_computed(
    model, whole, layers_done, tmp_path
):
    for change, words in (
        ({"bits": 3}, "bits: 8.0 -> 3"),
        ({"rotation": "off"}, "rotation: on -> off"),
    ):
        options = {**FAST, "work": tmp_path / "work", **change}
        with pytest.raises(ValueError, match=f"holds the result of another run, .*{words}"):
            mxq.quantize(model, output=whole.folder, **options)
    assert layers_done["measured"] == []


def test_the_result_of_other_text_is_refused_before_anything_is_measured(
    model, whole, layers_done, tmp_path
):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "out"))
    words = "holds the result of another run, made from other calibration text;"
    other = {"work": tmp_path / "work", "calibration": IDS.flip(0)}
    with pytest.raises(ValueError, match=words):
        mxq.quantize(model, output=folder, **{**FAST, **other})
    assert layers_done["measured"] == []


# Files


def test_files_have_the_mode_that_the_user_gives_new_files(whole, tmp_path):
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in whole.folder.iterdir() if path.is_file()}
    assert set(modes.values()) == {expected}, modes


def test_a_write_without_room_keeps_what_was_finished(model, whole, monkeypatch, tmp_path):
    flush = os.fsync
    for number in (3, 8, 13):
        left = [number]

        def full(descriptor, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"could not be written: .*No space left on device"):
                mxq.quantize(model, output=tmp_path / "out", **FAST)
        assert not list(tmp_path.rglob("*.mxq-part"))
    mxq.quantize(model, output=tmp_path / "out", **FAST)
    assert files_of(tmp_path / "out") == files_of(whole.folder)


def test_a_second_run_in_a_work_folder_is_refused_with_the_first_ones_process(tmp_path):
    work = Workspace(tmp_path / "work")
    with work.locked():
        words = rf"another run of mxq \(process {os.getpid()} on .*"
        with pytest.raises(ValueError, match=words), Workspace(tmp_path / "work").locked():
            pass
        assert (tmp_path / "work" / LOCK).is_file()  # the second took nothing with it
    assert not (tmp_path / "work" / LOCK).exists()
    with work.locked():
        pass


def test_the_lock_of_a_killed_run_is_no_lock(tmp_path):
    work = Workspace(tmp_path)
    (tmp_path / LOCK).write_text("process 1 on elsewhere")
    with work.locked():
        pass


def test_what_a_killed_write_left_goes_and_nothing_else(tmp_path):
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom mxq.storage import write_whole\n"
        "def die(path):\n"
        "    for name in (path, path.parent / '.tmpnbGc44'):\n"  # as safetensors does
        "        name.write_text('half')\n"
        "    os._exit(1)\n"
        "write_whole(Path(sys.argv[1]), die)\n"
    )
    work, kept = Workspace(tmp_path), tmp_path / ".mine.mxq-part"
    kept.mkdir()
    for path in (tmp_path / "profile.json", tmp_path / "curvature" / "layer-0.safetensors"):
        path.parent.mkdir(exist_ok=True)
        assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 1
        assert len(list(path.parent.glob(".write-*"))) == 1
    with work.locked():
        left = {path.name for path in tmp_path.rglob("*")}
    assert left == {LOCK, "curvature", ".mine.mxq-part"}

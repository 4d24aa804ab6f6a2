"""Several processes that share a run: the same bytes, and an end for all when one of them ends."""

import signal
import socket
import subprocess
import sys

import pytest
from attempts import Stop, attempts
from tiny import save_tiny
from typer.testing import CliRunner

from mxq.cli import app

MENU = "w2a16_g32_asym,w4a8_grow_sym,fp8,bf16"
MEASURE = "mxq.profiling.measure.measure_layer"
PACK = "mxq.checkpoint.pack.quantize_layer"


@pytest.fixture(scope="module")
def attempt(tmp_path_factory):
    # One expert at a time, so that a layer has more parts than there are processes.
    setup = "mxq.quantizers.choose.BATCH_BYTES=1"
    with attempts(tmp_path_factory.mktemp("printed"), setup) as attempt:
        yield attempt


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run that writes to ``out`` where it works; four layers of four experts each."""
    model = save_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"The clock struck {number} times. " for number in range(60)))
    line = (
        f"quantize {model} --bits 5 --schemes {MENU} --calibration file:{text} --samples 6 "
        "--seqlen 16 --rotation off --effort best --no-guard --output out"
    )
    return line.split()


@pytest.fixture(scope="module")
def alone(attempt, command, tmp_path_factory):
    """The folder that one process writes, and what it prints."""
    folder = tmp_path_factory.mktemp("alone")
    [done] = attempt.team(command, [folder])
    assert done.status == 0, done.stderr
    return folder / "out", done


@pytest.fixture
def folders(tmp_path):
    """Where each of three processes works: they share no folder but the model's."""
    return [tmp_path / f"rank-{rank}" for rank in range(3)]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def message(done):
    """The one line that a process says when it ends with an error."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def says_nothing(done):
    return (done.stdout, done.stderr) == ("", "")


# The same bytes


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_write_what_one_does(attempt, command, alone, folders, size):
    first, *others = attempt.team(command, folders[:size])
    assert first.status == 0, first.stderr
    assert files_of(folders[0] / "out") == files_of(alone[0])
    assert first.stdout == alone[1].stdout
    for rank, other in enumerate(others, start=1):
        assert other.status == 0, other.stderr
        assert says_nothing(other), other.stderr
        assert list(folders[rank].iterdir()) == []  # nothing is written there


def test_accelerate_launch_starts_it(command, tmp_path, monkeypatch):
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    line = [sys.executable, "-m", *launch.split(), "--mixed_precision", "no"]
    line += ["--dynamo_backend", "no", "-m", "mxq", *command]
    shared = tmp_path / "shared"
    shared.mkdir()
    done = subprocess.run(
        line, cwd=shared, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to out") == 1
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert files_of(shared / "out") == files_of(tmp_path / "out")


# One of them ends


@pytest.mark.parametrize(("call", "kept"), [(MEASURE, "measure"), (PACK, "packed-plan-layers")])
def test_a_killed_process_is_named_and_one_alone_goes_on(
    attempt, command, alone, folders, call, kept
):
    # In the second layer that it takes: of the four, two are finished, or one that is packed.
    first, second = attempt.team(command, folders[:2], Stop(call=call, number=2, rank=1))
    assert second.status == -signal.SIGKILL
    assert first.status == 1
    said = message(first)
    assert f"process 1 of 2 on {socket.gethostname()} ended without a word" in said
    assert "run the same command again" in said
    finished = sorted(path.name for path in (folders[0] / "out" / "work" / kept).glob("*.json"))
    names = {"measure": ["layer-00002", "layer-00003"], "packed-plan-layers": ["layer-00000"]}
    assert finished == [f"{name}.json" for name in names[kept]]
    [done] = attempt.team(command, folders[:1])
    assert done.status == 0, done.stderr
    assert files_of(folders[0] / "out") == files_of(alone[0])


def test_what_one_process_began_two_go_on_with(attempt, command, alone, folders):
    [done] = attempt.team(command, folders[:1], Stop(call=PACK, number=3))
    assert done.status == -signal.SIGKILL
    ends = attempt.team(command, folders[:2])
    assert [end.status for end in ends] == [0, 0], ends[0].stderr
    assert files_of(folders[0] / "out") == files_of(alone[0])


def test_a_survivor_says_so_where_the_leading_process_is_lost(attempt, command, folders):
    first, second = attempt.team(command, folders[:2], Stop(call=MEASURE, number=1))
    assert (first.status, second.status) == (-signal.SIGKILL, 1)
    assert "error: process 0 of 2 on " in message(second)


def test_an_error_of_one_process_ends_all_with_its_number(attempt, command, folders):
    stop = Stop(call=MEASURE, error="the moon is full", rank=2)
    first, *others = attempt.team(command, folders, stop)
    assert [first.status, *(other.status for other in others)] == [1, 1, 1]
    assert message(first) == "error: process 2 of 3 stopped: the moon is full"
    assert all(says_nothing(other) for other in others), others


def test_a_mistake_that_all_make_is_told_once(attempt, command, folders):
    first, second = attempt.team([*command, "--bits", "1"], folders[:2])
    assert (first.status, second.status) == (1, 1)
    assert "1 bits per weight" in message(first)
    assert says_nothing(second), second.stderr
    assert not (folders[0] / "out" / "config.json").exists()

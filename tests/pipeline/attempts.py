"""Runs of ``mxq`` in child processes that are stopped on purpose, without an import for each.

This file is also a program: a process that imports mxq once and forks a child for every request.
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stop:
    """How an attempt is stopped: a signal after some seconds, or death at a write to disk.

    ``flush`` counts the calls of fsync. A file is flushed when it has its content and not yet its
    name, its folder when it has; half of the files are cut before the process dies. ``limit`` is
    the largest file that the process may write. ``call`` is the function in whose call of that
    ``number`` the process dies, or raises ValueError with the text ``error``. In a team all of
    this is done to the process of that ``rank``.
    """

    seconds: float | None = None
    signal: int = signal.SIGKILL
    flush: int | None = None
    limit: int | None = None
    call: str | None = None
    number: int = 1
    error: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class Attempt:
    """How a child ended: its exit status, negative for a signal, and what it printed."""

    status: int
    seconds: float
    stdout: str
    stderr: str


@contextmanager
def attempts(folder, setup=""):
    """``attempt(arguments, stop)``: one run of the command line in a child.

    ``attempt.team(arguments, folders, stop)`` is one run of a process for each folder, which it
    works in; the ends of all, by rank. ``setup`` is ``NAME=NUMBER``, a constant to change.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__, str(folder), setup],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )

    def team(arguments, folders, stop=None):
        for place in folders:
            place.mkdir(parents=True, exist_ok=True)
        request = [[str(a) for a in arguments], [str(f) for f in folders], asdict(stop or Stop())]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return [Attempt(*end) for end in json.loads(server.stdout.readline())]

    def attempt(arguments, stop=None):
        return team(arguments, [folder], stop)[0]

    attempt.team = team
    try:
        yield attempt
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait()


def _serve(folder, setup):
    import mxq.cli  # noqa: F401  (before the first fork)

    if setup:
        name, _, number = setup.partition("=")
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, int(number))

    for request, line in enumerate(sys.stdin):
        arguments, folders, stop = json.loads(line)
        port, started, children = _free_port(), time.monotonic(), []
        for rank, place in enumerate(folders):
            printed = [folder / f"{request}-{rank}.{name}" for name in ("stdout", "stderr")]
            child = os.fork()
            if child == 0:
                os.chdir(place)
                if len(folders) > 1:
                    _join(rank, len(folders), port)
                _run(arguments, Stop(**stop) if rank == stop["rank"] else Stop(), printed)
            children.append((child, printed))
        if stop["seconds"] is not None:
            victim = children[stop["rank"]][0]
            _wait_until(victim, started + stop["seconds"])
            os.kill(victim, stop["signal"])
        ends = [
            [_status(child), time.monotonic() - started, *printed] for child, printed in children
        ]
        ends = [[*end[:2], *(path.read_text() for path in end[2:])] for end in ends]
        sys.stdout.write(json.dumps(ends) + "\n")
        sys.stdout.flush()


def _status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _join(rank, size, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _wait_until(child, deadline):
    """Wait for the child to end, but no longer than that; it stays to be waited for."""
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def _run(arguments, stop, printed):
    """Be the command; never returns."""
    import mxq.cli

    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    if stop.flush is not None:
        _die_at_flush(stop.flush)
    if stop.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (stop.limit, stop.limit))
    if stop.call is not None:
        _end_at_call(stop)
    status = 1
    try:
        mxq.cli.app(arguments)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:  # noqa: BLE001  (what a real process prints before it ends)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_at_flush(number):
    flush, left = os.fsync, [number]

    def count(descriptor):
        left[0] -= 1
        if left[0] == 0:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.is_file() and number % 2:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = count


def _end_at_call(stop):
    module, _, name = stop.call.rpartition(".")
    place, left = importlib.import_module(module), [stop.number]
    function = getattr(place, name)

    def count(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and stop.error is not None:
            raise ValueError(stop.error)
        if left[0] == 0:
            os.kill(os.getpid(), stop.signal)
        return function(*arguments, **options)

    setattr(place, name, count)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])

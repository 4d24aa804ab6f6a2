"""Runs of ``mxq`` in child processes that are stopped on purpose, without an import for each.

This file is also a program: a process that imports mxq once and forks a child for every request.
"""

import json
import os
import resource
import signal
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
    the largest file that the process may write.
    """

    seconds: float | None = None
    signal: int = signal.SIGKILL
    flush: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Attempt:
    """How a child ended: its exit status, negative for a signal, and what it printed."""

    status: int
    seconds: float
    stdout: str
    stderr: str


@contextmanager
def attempts(folder):
    """``attempt(arguments, stop, environment)``: one run of the command line in a child."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )

    def start(arguments, stop=None, environment=None):
        request = [[str(a) for a in arguments], asdict(stop or Stop()), environment or {}]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()

    def attempt(arguments, stop=None):
        start(arguments, stop)
        return Attempt(*json.loads(server.stdout.readline()))

    try:
        yield attempt
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait()


def _serve(folder):
    import mxq.cli  # noqa: F401  (before the first fork)

    for number, line in enumerate(sys.stdin):
        arguments, stop, environment = json.loads(line)
        printed = [folder / f"{number}.stdout", folder / f"{number}.stderr"]
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(arguments, Stop(**stop), environment, printed)
        if stop["seconds"] is not None:
            _wait_until(child, started + stop["seconds"])
            os.kill(child, stop["signal"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [path.read_text() for path in printed]
        sys.stdout.write(json.dumps([status, time.monotonic() - started, *texts]) + "\n")
        sys.stdout.flush()


def _wait_until(child, deadline):
    """Wait for the child to end, but no longer than that; it stays to be waited for."""
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def _run(arguments, stop, environment, printed):
    """Be the command; never returns."""
    import mxq.cli

    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.environ.update(environment)
    if stop.flush is not None:
        _die_at_flush(stop.flush)
    if stop.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (stop.limit, stop.limit))
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


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))

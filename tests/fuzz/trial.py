"""One input through one target: in a folder of its own, within a time limit, leaving nothing."""

import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

from targets import LIMIT_S, TARGETS


def accepts(name: str, data: bytes, root: Path) -> bool:
    """Whether the target takes the input; False if it refuses it with ValueError.

    ``root`` is a folder of the caller's with nothing else in it.

    Raises:
        Exception: A finding, whatever it is: see ``targets.py``.
    """
    folder = root / "input"
    folder.mkdir()
    try:
        with _limit():
            TARGETS[name](data, folder)
        accepted = True
    except ValueError as error:
        if not str(error):
            raise AssertionError("a refusal without a word") from error
        accepted = False
    finally:
        shutil.rmtree(folder)
    strays = list(root.iterdir())
    assert not strays, f"{name} has written {strays} outside of its folder"
    return accepted


def empty_root() -> Path:
    """A folder for ``accepts``, in memory where there is such a disk."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz", dir=memory if memory.is_dir() else None))


@contextmanager
def _limit():
    def stop(*unused):
        # Not a ValueError or OSError, which a reader may take for a damaged file.
        raise KeyboardInterrupt(f"an input takes more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""A file that one process holds locked while it writes to a folder.

The lock is the kernel's and ends with the process, so a killed run locks nobody out; the file may
stay behind.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".mxq-lock"
"""Name of the file in the folder that it is about."""


@contextmanager
def hold(folder: Path, *, at: str, instead: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where it does not exist.

    ``at`` is what a message says that the other one is at work in, ``instead`` what it advises to
    give.

    Raises:
        ValueError: If another process holds it.
    """
    path = folder / LOCK
    descriptor = _lock(path, f"at work in {at}; wait for it to end, or give {instead}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, doing: str) -> int:
    """Descriptor of the locked file.

    Raises:
        ValueError: If another process has locked it.
    """
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(f"another run of mxq ({holder or 'unknown'}) is {doing}") from error
        if _is_at(descriptor, path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # its owner removed the file when it ended, after it was opened here


def _open(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its owner removed the folder when it ended, after it was found here


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

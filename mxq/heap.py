"""How the C library deals with memory that tensors on the host have freed.

glibc takes large pieces from the system and gives them back one by one, so every temporary tensor
costs page faults that take several times as long as what is computed in it; pieces that it keeps
are as large as any that was ever freed, so the weights of a layer would stay when they are dropped.
Hence temporaries are kept and used again, up to a limit, and weights go back unless they took the
place of temporaries. All of this does nothing where the C library is another one.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

WEIGHT_BYTES = 4 * 2**20
"""Size from which memory goes back to the system when it is freed, while weights are loaded."""

TEMPORARY_BYTES = 32 * 2**20
"""The same at other times; glibc takes no larger number."""

KEPT_BYTES = 512 * 2**20
"""Free memory at the top of the heap that is kept for the next temporaries."""

# Numbers of the options in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_temporaries() -> None:
    """Keep freed memory of temporaries for the next ones, in one heap for all threads."""
    _set(_M_ARENA_MAX, 1)  # the threads of a run take turns, so they can share
    _set(_M_TRIM_THRESHOLD, KEPT_BYTES)
    _set(_M_MMAP_THRESHOLD, TEMPORARY_BYTES)


@contextmanager
def loading_weights() -> Iterator[None]:
    """What is allocated inside goes back to the system as soon as it is freed, if it is large."""
    _set(_M_MMAP_THRESHOLD, WEIGHT_BYTES)
    try:
        yield
    finally:
        _set(_M_MMAP_THRESHOLD, TEMPORARY_BYTES)


def give_back() -> None:
    """Return the free pages of the heap to the system, also those between pieces in use."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _set(option: int, value: int) -> None:
    tune = _function("mallopt")
    if tune is not None:
        tune(ctypes.c_int(option), ctypes.c_int(value))


@cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None)

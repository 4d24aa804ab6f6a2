"""Freed memory: temporaries keep theirs, weights give it back at once."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import contextlib
import psutil
import torch
from mxq.heap import give_back, keep_temporaries, loading_weights

def resident():
    return psutil.Process().memory_info().rss

def kept(context):
    with context:
        piece = torch.ones(6 * 2**20)  # 24 MiB
    before = resident()
    del piece
    return (before - resident()) < 12 * 2**20

torch.ones(1) + 1
keep_temporaries()
print(kept(loading_weights()), kept(contextlib.nullcontext()))
pieces = [torch.ones(2**18) for _ in range(64)]  # 1 MiB each
before = resident()
del pieces[:-1]
print((before - resident()) < 32 * 2**20)
give_back()
print((before - resident()) < 32 * 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
def test_weights_leave_and_temporaries_stay_until_they_are_given_back() -> None:
    found = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )

    assert found.stdout.split() == ["False", "True", "True", "False"]

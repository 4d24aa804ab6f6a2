"""What every test gets: no network, one thread for each worker, golden texts.

Nothing is seeded here. A test that needs randomness makes its own ``torch.Generator``.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the texts under tests/golden instead of comparing with them",
    )


def pytest_configure(config):
    # Hugging Face libraries read these once, when a test file first imports them, so a fixture
    # would be too late. Subprocesses inherit them.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    # Sums depend on the number of threads, so commands run as the tests themselves do.
    os.environ["OMP_NUM_THREADS"] = "1"
    # A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Runs compute on a GPU where there is one, and results of a GPU are others.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Tests need no GPU: kernels run in Triton's interpreter, which is chosen at decoration.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    # Workers run side by side: more threads than cores make every test slower. One thread also
    # fixes the order of each sum, so results do not depend on the machine.
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``check_golden(name, text)``: the text is the frozen one of tests/golden/<name>."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN_DIR / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        assert path.is_file(), f"{path} is missing; if the text is right, run --update-golden"
        assert text == path.read_text(encoding="utf-8"), (
            f"{name} differs; if the new text is right, run --update-golden and review the diff"
        )

    return check

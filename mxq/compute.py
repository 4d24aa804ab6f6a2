"""Where a run computes: on the CPU, or on one CUDA GPU for each process.

Weights of the layer at hand, token batches and what is computed from them are on that device;
kept activations, calibration tokens, files and what passes between processes are on the host.
"""

import re

import torch

CPU = torch.device("cpu")

COMPUTE = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d*))?", re.ASCII)
"""The spellings of a compute device."""


def check_compute(wanted: str) -> None:
    """Raise ValueError unless the text spells a compute device."""
    if COMPUTE.fullmatch(wanted) is None:
        raise ValueError(f"compute {wanted!r} is unknown; choose auto, cpu, cuda or cuda:N")


def compute_device(wanted: str, *, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of this process.

    "auto" is a CUDA GPU where torch finds one, else the CPU. Of several processes each takes the
    GPU of its ``local_rank``, the number of the process on its machine.

    Raises:
        ValueError: If there is no such GPU.
    """
    check_compute(wanted)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and found == 0):
        return CPU
    number = wanted.removeprefix("cuda").removeprefix(":") if wanted != "auto" else ""
    if number and processes > 1:
        raise ValueError(
            f"--compute {wanted} names one GPU for {processes} processes; give --compute cuda, and "
            "each takes its own"
        )
    if found == 0:
        raise ValueError(
            f"--compute {wanted}: torch {torch.__version__} finds no CUDA GPU; give --compute cpu, "
            "or install a driver and a build of torch for it"
        )
    index = int(number) if number else local_rank
    if index >= found:
        what = f"process {local_rank} of this machine" if processes > 1 else f"--compute {wanted}"
        raise ValueError(
            f"{what} asks for GPU {index}, and torch finds {found} (0 to {found - 1}); give a "
            "lower number, start fewer processes, or give --compute cpu"
        )
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """The kind of a device as results record it: other kinds give other last bits."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_name(device)}"

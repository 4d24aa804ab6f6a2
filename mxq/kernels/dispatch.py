"""Whether kernels can run here, in which dialect, and where their files go."""

import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import triton

from mxq.kernels.spec import HOPPER_SHARED_BYTES, Dialect

OLDEST_CAPABILITY = (8, 0)
"""The first GPUs with bfloat16 matrix instructions and asynchronous copies."""

FP8_CAPABILITY = (8, 9)
"""The first GPUs with fp8 matrix instructions."""


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``), on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def default_dialect(device: torch.device) -> Dialect:
    """Inline PTX on an NVIDIA GPU, plain Triton elsewhere."""
    if is_interpreted():
        return "interpreted"
    return "ptx" if device.type == "cuda" and torch.version.hip is None else "plain"


def refusal(device: torch.device, dtype: torch.dtype, *, has_fp8: bool = False) -> str | None:
    """Why kernels cannot serve tensors there, or None if they can.

    ``has_fp8`` says that some weights are fp8.
    """
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, this model in {str(dtype).removeprefix('torch.')}"
    return None if is_interpreted() else _device_refusal(device, has_fp8)


def _device_refusal(device: torch.device, has_fp8: bool) -> str | None:
    if device.type != "cuda":
        return f"they need a GPU, the model is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    needed = FP8_CAPABILITY if has_fp8 else OLDEST_CAPABILITY
    if torch.version.hip is None and capability < needed:
        who = "for fp8 weights they" if has_fp8 else "they"
        found, least = (".".join(map(str, version)) for version in (capability, needed))
        return f"{who} need compute capability {least}, this GPU has {found}"
    return None


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter those of an H200, so that tables are alike."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=8)
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have on a GPU; in the interpreter that of an H200."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


@lru_cache(maxsize=1)
def kernel_folder() -> Path:
    """Where generated kernels are written: the user's cache, or a new folder where that fails."""
    folder = Path.home() / ".cache" / "mxq" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="mxq-kernels-"))

"""What timing the kernels of a GPU found: constants of branches, the times behind them, the errors.

A profile is an artifact (``mxq.storage``), one for each GPU and Triton version. Its numbers mean
something only with the device and the figures that they were fitted with, so it holds those too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from mxq.artifacts import KernelTiming
from mxq.counted import counted
from mxq.search.device import Device
from mxq.search.figures import BranchFigures, CompiledFigures
from mxq.search.kernel_cost import BranchConstants, KernelModel


@dataclass(frozen=True, slots=True)
class BranchProfile:
    """The constants of one branch and the timings they were fitted to.

    ``predicted_us[i]`` is what the constants fitted to all other timings say of ``timings[i]``.
    ``figures`` None means that the branch was fitted without a count of instructions.
    """

    constants: BranchConstants
    figures: BranchFigures | None
    timings: tuple[KernelTiming, ...]
    predicted_us: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless each timing has a prediction above 0."""
        if not self.timings or len(self.timings) != len(self.predicted_us):
            raise ValueError(
                f"{counted(len(self.predicted_us), 'prediction')} for "
                f"{counted(len(self.timings), 'timing')} of a branch"
            )
        if not all(0 < value < 1e9 for value in self.predicted_us):
            raise ValueError("a predicted time of a branch is not a time")

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error of each prediction."""
        return tuple(
            abs(predicted / timing.median_us - 1)
            for predicted, timing in zip(self.predicted_us, self.timings, strict=True)
        )


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """All branches that were timed on one GPU.

    ``gpu`` is the driver's name of it, ``launch_us`` the median of a launch without tiles and
    ``clocks_mhz`` the clocks under load.
    """

    gpu: str
    device: Device
    launch_us: float
    branches: Mapping[str, BranchProfile]
    date: str
    clocks_mhz: Mapping[str, float]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raise ValueError for a profile that prices nothing."""
        if not self.branches:
            raise ValueError(f"the profile of {self.gpu} holds no branch")
        if not 0 <= self.launch_us < 1e6:
            raise ValueError(f"a launch of {self.launch_us:g} us in the profile of {self.gpu}")
        if self.device.multiprocessor is None:
            raise ValueError(f"the profile of {self.gpu} has no multiprocessor")
        if "triton" not in self.versions:
            raise ValueError(f"the profile of {self.gpu} does not name its Triton version")

    @property
    def error(self) -> float:
        """Median relative error over all timings of all branches."""
        return median(error for branch in self.branches.values() for error in branch.errors)

    def describe(self) -> str:
        """Where the numbers come from, for a report."""
        return (
            f"measured on {self.gpu} on {self.date} with Triton {self.versions['triton']}, "
            f"{counted(len(self.branches), 'branch', 'branches')}, model error median "
            f"{100 * self.error:.1f} %"
        )

    def kernel_model(self, figures: CompiledFigures | None) -> KernelModel:
        """Tile times with this profile's constants; ``figures`` are for branches not timed here."""
        known = {} if figures is None else dict(figures.branches)
        for name, branch in self.branches.items():
            if branch.figures is not None:
                known[name] = branch.figures
        constants = {name: branch.constants for name, branch in self.branches.items()}
        return KernelModel(self.device, known, constants, self.launch_us)


def profile_name(gpu: str, triton: str) -> str:
    """The file name of the profile of a GPU and a Triton version."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{words}-triton{triton}.json"

"""Figures of compiled kernels: what the loop of each branch issues, read from its machine code.

They are known without a GPU. ``devices/kernels-sm<arch>.json`` holds those of one architecture;
``benchmarks/compile_kernels.py`` writes it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True, slots=True)
class BranchFigures:
    """One pass of a branch's loop: instructions that a warp issues, ``step`` inputs further.

    ``alu_instructions`` are those among them that only the integer and logic pipe takes, at half
    the rate.
    """

    loop_instructions: int
    alu_instructions: int
    step: int
    warps: int

    def __post_init__(self) -> None:
        """Raise ValueError for counts that no loop has."""
        if not 0 <= self.alu_instructions <= self.loop_instructions:
            raise ValueError(
                f"{self.alu_instructions} of {self.loop_instructions} instructions of a loop "
                "cannot be for the integer pipe"
            )
        if min(self.loop_instructions, self.step, self.warps) < 1:
            raise ValueError("a loop has at least one instruction, input and warp")


@dataclass(frozen=True, slots=True)
class CompiledFigures:
    """All branches that were compiled for one architecture; ``source`` says from what."""

    arch: int
    source: str
    branches: Mapping[str, BranchFigures]


def load_figures(arch: int, folder: Path = _FOLDER) -> CompiledFigures | None:
    """The committed figures for an architecture (90 is sm_90); None if there are none.

    Raises:
        ValueError: If the file is not of the form that ``benchmarks/compile_kernels.py`` writes.
    """
    path = folder / f"kernels-sm{arch}.json"
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        branches = {name: _branch(figures) for name, figures in fields["branches"].items()}
        source = f"Triton {fields['triton']}, ptxas {fields['ptxas']}"
        found = int(fields["arch"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold figures of compiled kernels ({type(error).__name__}: {error}); "
            "benchmarks/compile_kernels.py writes it"
        ) from error
    if found != arch:
        raise ValueError(f"{path} holds figures for sm_{found}")
    return CompiledFigures(arch, source, branches)


def _branch(fields: Mapping[str, Any]) -> BranchFigures:
    return BranchFigures(
        loop_instructions=int(fields["loop_instructions"]),
        alu_instructions=int(fields["alu_instructions"]),
        step=int(fields["step"]),
        warps=int(fields["warps"]),
    )

"""Figures of compiled kernels: registers, shared memory, programs that fit, and their loops."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mxq.kernels import offline
from mxq.kernels.offline import CompiledKernel, CompileFailure, KernelRequest
from mxq.kernels.sass import LoopFigures, loop_figures, parse_listing


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """What a compiled kernel needs of a multiprocessor, and its loops in order of address."""

    name: str
    arch: int
    triton: str
    ptxas: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    threads: int
    ctas_per_sm: int
    instructions: int
    loops: tuple[LoopFigures, ...]

    @property
    def matrix_loops(self) -> tuple[LoopFigures, ...]:
        """The innermost loops that hold matrix instructions."""
        return tuple(loop for loop in self.loops if loop.matrix and not loop.holds_matrix_loop)


def compile_figures(requests: Sequence[KernelRequest], python: Path) -> list[KernelFigures]:
    """Figures of all kernels, compiled by the Triton of an interpreter.

    Raises:
        ValueError: If a kernel does not compile; all that do not are named.
    """
    outcomes = compile_outcomes(requests, python)
    failures = [outcome for outcome in outcomes if isinstance(outcome, CompileFailure)]
    if failures:
        lines = [f"{failure.name} for sm_{failure.arch}: {failure.error}" for failure in failures]
        raise ValueError("\n".join(["these kernels do not compile:", *lines]))
    return [outcome for outcome in outcomes if isinstance(outcome, KernelFigures)]


def compile_outcomes(
    requests: Sequence[KernelRequest], python: Path
) -> list[KernelFigures | CompileFailure]:
    """As ``compile_figures``, with a failure in the place of each kernel that does not compile.

    Raises:
        ValueError: If the interpreter does not finish.
    """
    # -P: the script's folder is no place to import from.
    command = [str(python), "-P", str(Path(offline.__file__).resolve())]
    text = json.dumps([asdict(request) for request in requests])
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    values = zip(requests, json.loads(done.stdout), strict=True)
    return [
        CompileFailure(**value)
        if "error" in value
        else _figures_of(request, CompiledKernel(**value))
        for request, value in values
    ]


def outcome_from_json(value: Mapping[str, Any]) -> KernelFigures | CompileFailure:
    """Inverse of ``dataclasses.asdict`` for an outcome."""
    if "error" in value:
        return CompileFailure(**value)
    loops = tuple(LoopFigures(**loop) for loop in value["loops"])
    return KernelFigures(**{**value, "loops": loops})


def _figures_of(request: KernelRequest, compiled: CompiledKernel) -> KernelFigures:
    source = Path(request.source)
    listing = parse_listing(compiled.listing, source.name)
    return KernelFigures(
        name=request.name,
        arch=request.arch,
        triton=compiled.triton,
        ptxas=compiled.ptxas,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        local_bytes=compiled.local_bytes,
        shared_bytes=compiled.shared_bytes,
        threads=32 * request.num_warps,
        ctas_per_sm=ctas_per_sm(
            request.arch,
            registers=compiled.registers,
            shared_bytes=compiled.shared_bytes,
            num_warps=request.num_warps,
        ),
        instructions=len(listing.instructions),
        loops=loop_figures(listing, source.read_text(), request.num_warps),
    )


@dataclass(frozen=True, slots=True)
class OccupancyLimits:
    """What the programs on one multiprocessor share.

    From the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65536


OCCUPANCY_LIMITS = {
    80: OccupancyLimits(64, 32, 164 * 1024),
    89: OccupancyLimits(48, 24, 100 * 1024),
    90: OccupancyLimits(64, 32, 228 * 1024),
    100: OccupancyLimits(64, 32, 228 * 1024),
}

_RESERVED_BYTES = 1024  # of shared memory, for each program


def ctas_per_sm(arch: int, *, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that fit on one multiprocessor; 0 if not even one does."""
    limits = OCCUPANCY_LIMITS[arch]
    # A warp's registers are allocated by 256, the four quarters of a multiprocessor hold as many
    # warps each; shared memory is allocated by 128 bytes.
    warp_registers = -(-registers * 32 // 256) * 256
    warps = limits.registers // max(warp_registers, 256) // 4 * 4
    shared = -(-shared_bytes // 128) * 128 + _RESERVED_BYTES
    return min(
        warps // num_warps,
        limits.warps // num_warps,
        limits.programs,
        limits.shared_bytes // shared,
    )

"""Compile kernels for a GPU that is not here. A script, and the form of its input and output.

Any interpreter with Triton runs it, nothing else needs to be installed there:

    python -P mxq/kernels/offline.py < requests.json > outcomes.json

Both files are lists; ``mxq.kernels.figures`` writes the one and reads the other.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """One kernel to compile: function ``entry`` of the file ``source``, and its arguments' types.

    ``arch`` is 90 for sm_90. ``divisible`` names arguments that are multiples of 16, ``constants``
    holds the values of those whose type is "constexpr". ``max_registers`` None is no cap.
    """

    name: str
    source: str
    entry: str
    signature: Mapping[str, str]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    divisible: tuple[str, ...] = ()
    constants: Mapping[str, int | float | str | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What compiler and disassembler say; ``listing`` is the output of ``nvdisasm -c -g``."""

    triton: str
    ptxas: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    listing: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CompileFailure:
    """A kernel that did not compile, and what the compiler said first."""

    name: str
    arch: int
    error: str


def main() -> None:
    """Compile the requests of standard input with the Triton of this interpreter."""
    # Interpreted functions cannot be compiled, and no variable may choose another compiler.
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        if name != "TRITON_CACHE_DIR":
            del os.environ[name]
    requests = [KernelRequest(**value) for value in json.load(sys.stdin)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        # Triton prints the whole program to standard output if ptxas refuses it.
        with contextlib.redirect_stdout(sys.stderr):
            outcomes = [_compile(request, Path(folder) / "kernel.cubin") for request in requests]
    json.dump([asdict(outcome) for outcome in outcomes], sys.stdout)


def _compile(request: KernelRequest, cubin: Path) -> CompiledKernel | CompileFailure:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.errors import TritonError

    try:
        code, shared_bytes = _compile_for(request)
    except (TritonError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        return CompileFailure(request.name, request.arch, _first_lines(error))
    cubin.write_bytes(code)
    usage = _run_tool("cuobjdump", "--dump-resource-usage", cubin)
    return CompiledKernel(
        triton=triton.__version__,
        ptxas=get_ptxas(request.arch).version,
        registers=_usage(usage, request.entry, "REG"),
        stack_bytes=_usage(usage, request.entry, "STACK"),
        local_bytes=_usage(usage, request.entry, "LOCAL"),
        shared_bytes=shared_bytes,
        listing=_run_tool("nvdisasm", "-c", "-g", cubin),
    )


def _compile_for(request: KernelRequest) -> tuple[bytes, int]:
    """Machine code, and the bytes of shared memory that it is launched with."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_load(Path(request.source)), request.entry)
    names = list(function.arg_names)
    source = ASTSource(
        fn=function,
        signature={name: request.signature[name] for name in names},
        constexprs=dict(request.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in request.divisible},
    )
    options: dict[str, int] = {
        "num_warps": request.num_warps,
        "num_stages": request.num_stages,
    }
    if request.max_registers is not None:
        options["maxnreg"] = request.max_registers
    kernel = triton.compile(source, target=GPUTarget("cuda", request.arch, 32), options=options)
    return kernel.asm["cubin"], kernel.metadata.shared


def _load(path: Path) -> ModuleType:
    """The module of a file, run once."""
    name = f"kernel_source_{path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _run_tool(name: str, *arguments: str | Path) -> str:
    """Output of one of the CUDA tools that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    # What it warns of on standard error (a feature that is not used here) is left out.
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _usage(text: str, entry: str, key: str) -> int:
    found = re.search(rf"Function {entry}:\s.*?\b{key}:(\d+)", text, re.DOTALL)
    assert found is not None, text
    return int(found[1])


def _first_lines(error: BaseException) -> str:
    """What failed first: Triton wraps the reason, and ptxas repeats itself for every line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n".join([type(error).__name__, *lines[:6]])[:1000]


if __name__ == "__main__":
    main()

"""Compile the kernels, without a GPU, and write down what became of them.

* ``benchmarks/results/kernels-compiled.json``, the table of docs/results.md: formats alone and
  mixes of them, the kernels for routing and those between products, each with two versions of
  Triton. tests/kernels/test_compiled.py holds the kernels to it;
* ``mxq/search/devices/kernels-sm90.json``, what the cost model reads: every format alone under
  every tile plan, with this environment's Triton.

    python benchmarks/compile_kernels.py          compile, print, and write both

scripts/test.sh makes the interpreter with the oldest Triton.
"""

import argparse
import ast
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxq.kernels.codegen import ENTRY_POINT, render, signature
from mxq.kernels.figures import KernelFigures, compile_figures
from mxq.kernels.offline import KernelRequest
from mxq.kernels.spec import (
    ROW_TILE,
    TILE_PLANS,
    Input,
    KernelSpec,
    TilePlan,
    WeightFormat,
    make_spec,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "kernels-compiled.json"
COST_ARCH = 90
COST_FIGURES = ROOT / "mxq" / "search" / "devices" / f"kernels-sm{COST_ARCH}.json"
COMMAND = "python benchmarks/compile_kernels.py"
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of a program (CUDA C++ Programming Guide, compute capabilities)."""
ARCHS = tuple(SHARED_BYTES)

BF16, FP8 = WeightFormat(16, "bf16"), WeightFormat(8, "fp8")
SIX_FORMATS = (
    BF16,
    *(WeightFormat(bits, "bf16", 128) for bits in (8, 4, 3, 2)),
    WeightFormat(8, "int8"),
)
"""A mix of wide and narrow formats, and of both kinds of input."""

OTHER_FORMATS = (
    WeightFormat(6, "bf16", 64),
    WeightFormat(5, "bf16", 32),
    WeightFormat(4, "bf16"),
    WeightFormat(4, "int8"),
    WeightFormat(3, "int8", 128),
    WeightFormat(8, "int8", 128),
    FP8,
)

FORMATS_OF_LARGE_TILES = (*SIX_FORMATS, WeightFormat(4, "int8"), FP8)


@dataclass(frozen=True, slots=True)
class Case:
    """A generated kernel to compile; ``plan`` says how its tiles are shaped."""

    name: str
    arch: int
    plan: TilePlan
    spec: KernelSpec

    def request(self, folder: Path) -> KernelRequest:
        """The kernel's text in a folder, ready to compile."""
        path = folder / f"{self.name.replace('/', '-')}.py"
        path.write_text(render(self.spec))
        types = signature(self.spec)
        return KernelRequest(
            self.name,
            str(path),
            ENTRY_POINT,
            types,
            self.arch,
            num_warps=self.spec.num_warps,
            max_registers=self.spec.max_registers,
            divisible=tuple(types),
        )


def oldest_python() -> Path:
    """The interpreter that scripts/test.sh makes for compiling alone."""
    lines = (ROOT / "scripts" / "oldest-triton.txt").read_text().splitlines()
    (pin,) = [line for line in lines if line.startswith("triton==")]
    return ROOT / ".venv" / pin.replace("==", "-") / "bin" / "python"


def gemm_cases() -> Iterator[Case]:
    """On sm_90 every format alone and two mixes, under each plan; on the others mixes."""
    for plan in TILE_PLANS:
        is_decode = plan.name == "decode"
        for form in every_format() if is_decode else FORMATS_OF_LARGE_TILES:
            yield _case(90, plan, str(form), [form])
        for arch in ARCHS:
            if arch == 90 or is_decode:
                # sm_80 has no instruction for fp8.
                others = [form for form in OTHER_FORMATS if arch > 80 or form != FP8]
                yield _case(arch, plan, "others", others)
            if arch in (89, 90) or is_decode or plan.name == "prefill":
                yield _case(arch, plan, "six", SIX_FORMATS)


def _case(arch: int, plan: TilePlan, name: str, formats: Sequence[WeightFormat]) -> Case:
    spec = make_spec(formats, plan, shared_bytes=SHARED_BYTES[arch])
    return Case(f"sm_{arch}/{plan.name}/{name}", arch, plan, spec)


def every_format() -> Iterator[WeightFormat]:
    """All formats; those with 4-bit inputs are those with int8 inputs in all but name."""
    yield from (BF16, FP8)
    groups: Mapping[Input, Sequence[int | None]] = {
        "bf16": (32, 64, 128, None),
        "int8": (128, None),
    }
    for kind, group_sizes in groups.items():
        for group_size in group_sizes:
            for w_bits in (8, 6, 5, 4, 3, 2):
                yield WeightFormat(w_bits, kind, group_size)


def cost_cases() -> Iterator[Case]:
    """Every format alone under each plan; those that ``gemm_cases`` has too have the same names."""
    int4 = (
        WeightFormat(form.w_bits, "int4", form.group_size)
        for form in every_format()
        if form.input == "int8" and form.w_bits <= 4
    )
    forms = (*every_format(), *int4)
    for plan in TILE_PLANS:
        for form in forms:
            yield _case(COST_ARCH, plan, str(form), [form])


def static_requests() -> Iterator[KernelRequest]:
    """The kernels that are not generated, as layers of 64 experts use them."""
    for arch in (80, 90, 100):
        for name, (file, constants, num_warps, num_stages) in STATIC_KERNELS.items():
            entry, _, width = name.partition("/")
            # Tokens of many features are for sm_100 what a compiler has failed on.
            if width == WIDE and arch != 100:
                continue
            path = ROOT / "mxq" / "kernels" / file
            types = _argument_types(path, entry)
            yield KernelRequest(
                f"sm_{arch}/{name}",
                str(path),
                entry,
                types,
                arch,
                num_warps=num_warps,
                num_stages=num_stages,
                divisible=tuple(name for name in types if name.endswith("_ptr")),
                constants=constants,
            )


Constants = Mapping[str, int | float | str | bool]

WIDE = "14336"
"""Features of a token that do not fit in the registers of a program."""


def _rotated(features: int, groups: int) -> Constants:
    return {
        "K": features,
        "K_PAD": features,
        "GROUPS": groups,
        "ROTATION_BLOCK": 128,
        "ROTATION_SCALE": 128**-0.5,
        "INTERPRETED": False,
    }


_ROUTING, _ACTIVATION = "routing_kernels.py", "activation_kernels.py"
_SUMMED = {"N": 2048, "SLICES": 4, "BLOCK_N": 1024, "INTERPRETED": False}
_GATED = {"SLICES": 4, "GATED": True, "ACTIVATION": "silu"}

STATIC_KERNELS: Mapping[str, tuple[str, Constants, int, int]] = {
    "route_small_kernel": (_ROUTING, {"BLOCK": 32, "BLOCK_SCAN": 128}, 4, 3),
    "count_kernel": (_ROUTING, {"CHUNK": 256, "BLOCK_E": 32}, 4, 3),
    "scan_kernel": (_ROUTING, {"BLOCK_C": 128, "BLOCK_E": 16}, 4, 3),
    "scatter_kernel": (_ROUTING, {"CHUNK": 256, "BLOCK_SCAN": 32}, 8, 3),
    "tile_table_kernel": (_ROUTING, {"BLOCK_P": 128, "BLOCK_TILES": 32}, 4, 3),
    "prepare_kernel/2048": (_ACTIVATION, _rotated(2048, 16), 4, 1),
    "prepare_kernel/14336": (_ACTIVATION, _rotated(14336, 128), 16, 1),
    "gate_kernel/2048": (_ACTIVATION, {**_rotated(2048, 16), **_GATED}, 4, 1),
    "gate_kernel/14336": (_ACTIVATION, {**_rotated(14336, 128), **_GATED}, 16, 1),
    "sum_slices_kernel": (_ACTIVATION, {**_SUMMED, "PARTS": 2}, 4, 3),
    "combine_kernel": (_ACTIVATION, {**_SUMMED, "TOP_K": 4}, 4, 3),
}
"""File, constants, warps and stages of each kernel, as its wrapper passes them."""

_POINTER_TYPES = {
    "index_ptr": "*i64",
    "problems_ptr": "*i64",
    "partial_ptr": "*fp32",
    "int8_ptr": "*i8",
    "int4_ptr": "*i8",
    "fp8_ptr": "*u8",
    **{f"{kind}_scale_ptr": "*fp32" for kind in ("int8", "int4", "fp8")},
    **{f"{name}_ptr": "*bf16" for name in ("x", "z", "out", "plain", "rotated", "weights")},
}


def _argument_types(path: Path, entry: str) -> dict[str, str]:
    """Types of a kernel's arguments: by name, 32-bit integers where the table has none."""
    (function,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == entry
    ]
    types = {}
    for argument in function.args.args:
        name = argument.arg
        is_pointer = name.endswith("_ptr")
        default = "constexpr" if name.isupper() else "*i32" if is_pointer else "i32"
        types[name] = _POINTER_TYPES.get(name, default)
    return types


def row(figures: KernelFigures) -> dict[str, Any]:
    """What the table says of a kernel; loops are named after their device functions."""
    return {
        "registers": figures.registers,
        "stack_bytes": figures.stack_bytes,
        "shared_bytes": figures.shared_bytes,
        "ctas_per_sm": figures.ctas_per_sm,
        "loops": {
            loop.function: {"instructions": loop.instructions, "matrix": dict(loop.matrix)}
            for loop in figures.matrix_loops
        },
    }


ALU_WORDS = (
    *("FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP", "LOP3", "PLOP3"),
    *("PRMT", "SEL", "SHF", "VIADD", "VIMNMX"),
)
"""Opcodes of the integer and logic pipe, which takes half as many as the schedulers issue."""


def cost_row(figures: KernelFigures, plan: TilePlan) -> dict[str, int]:
    """What the cost model reads of a kernel with one format (``mxq.search.figures``)."""
    (loop,) = figures.matrix_loops
    assert loop.products is not None
    return {
        "loop_instructions": loop.instructions,
        "alu_instructions": sum(loop.opcodes.get(word, 0) for word in ALU_WORDS),
        "step": loop.products // (plan.tokens * ROW_TILE),
        "warps": plan.num_warps,
        "registers": figures.registers,
        "shared_bytes": figures.shared_bytes,
    }


def main() -> None:
    """Compile everything with both versions, side by side."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    of_cost = {case.name: case for case in cost_cases()}
    with tempfile.TemporaryDirectory() as name:
        cases = {case.name: case for case in gemm_cases()}
        both = [*(case.request(Path(name)) for case in cases.values()), *static_requests()]
        more = [case.request(Path(name)) for key, case in of_cost.items() if key not in cases]
        with ThreadPoolExecutor(2) as pool:
            current = pool.submit(compile_figures, [*both, *more], Path(sys.executable))
            oldest = pool.submit(compile_figures, both, oldest_python())
            results = [oldest.result(), current.result()[: len(both)]]
            branches = [kernel for kernel in current.result() if kernel.name in of_cost]
    for figures in results:
        for kernel in figures:
            print(kernel.triton, kernel.name, json.dumps(row(kernel)))
    TABLE.write_text(_table_text({figures[0].triton: figures for figures in results}))
    COST_FIGURES.write_text(_cost_text(branches, of_cost))
    print(f"wrote {TABLE.relative_to(ROOT)} and {COST_FIGURES.relative_to(ROOT)}")


def _table_text(results: Mapping[str, Sequence[KernelFigures]]) -> str:
    """JSON with one line for each kernel, so that a change shows as a line."""
    versions = []
    for version, kernels in sorted(results.items()):
        ptxas = {f"sm_{kernel.arch}": kernel.ptxas for kernel in kernels}
        lines = [f'   "{kernel.name}": {json.dumps(row(kernel))}' for kernel in kernels]
        body = ",\n".join(lines)
        versions.append(f'  "{version}": {{\n   "ptxas": {json.dumps(ptxas)},\n{body}\n  }}')
    joined = ",\n".join(versions)
    return f'{{\n "command": "{COMMAND}",\n "triton": {{\n{joined}\n }}\n}}\n'


def _cost_text(kernels: Sequence[KernelFigures], cases: Mapping[str, Case]) -> str:
    """JSON with one line for each branch, by the name that the cost model has for it."""
    lines = []
    for kernel in kernels:
        case = cases[kernel.name]
        (branch,) = case.spec.branches
        lines.append(f'  "{branch}": {json.dumps(cost_row(kernel, case.plan))}')
    head = {"arch": COST_ARCH, "triton": kernels[0].triton, "ptxas": kernels[0].ptxas}
    body = ",\n".join(sorted(lines))
    return f'{json.dumps(head)[:-1]}, "branches": {{\n{body}\n}}}}\n'


if __name__ == "__main__":
    main()

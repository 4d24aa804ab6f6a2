"""Write the compiled figures that the cost model reads: mxq/search/devices/kernels-sm90.json.

Every format alone under every tile plan, compiled for sm_90 by the Triton of this environment; the
instructions of its loop are counted in the machine code.

    python benchmarks/make_cost_figures.py
"""

import json
import sys
import tempfile
from pathlib import Path

from compile_kernels import FP8, Case, every_format

from mxq.kernels.figures import KernelFigures, compile_figures
from mxq.kernels.sass import LoopFigures
from mxq.kernels.spec import ROW_TILE, TILE_PLANS, TilePlan, WeightFormat, make_spec
from mxq.search.kernel_cost import branch_name

ARCH = 90
PATH = Path(__file__).resolve().parents[1] / "mxq" / "search" / "devices" / f"kernels-sm{ARCH}.json"

ALU_WORDS = (
    *("FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP", "LOP3", "PLOP3"),
    *("PRMT", "SEL", "SHF", "VIADD", "VIMNMX"),
)
"""Opcodes of the integer and logic pipe, which takes half as many as the schedulers issue."""


def main() -> None:
    """Compile all branches and write their figures."""
    int4 = [
        WeightFormat(form.w_bits, "int4", form.group_size)
        for form in every_format()
        if form.input == "int8" and form.w_bits <= 4
    ]
    forms = sorted({*every_format(), *int4, FP8})
    pairs = [(form, plan) for plan in TILE_PLANS for form in forms]
    cases = [
        Case(branch_name(form, plan), ARCH, plan, make_spec([form], plan)) for form, plan in pairs
    ]
    with tempfile.TemporaryDirectory() as name:
        requests = [case.request(Path(name)) for case in cases]
        figures = compile_figures(requests, Path(sys.executable))
    lines = [
        f"  {json.dumps(kernel.name)}: {json.dumps(_branch(kernel, plan))}"
        for kernel, (_, plan) in sorted(
            zip(figures, pairs, strict=True), key=lambda item: item[0].name
        )
    ]
    head = {"arch": ARCH, "triton": figures[0].triton, "ptxas": figures[0].ptxas}
    body = ",\n".join(lines)
    PATH.write_text(f'{json.dumps(head)[:-1]}, "branches": {{\n{body}\n}}}}\n')
    print(f"wrote {len(lines)} branches to {PATH}")


def _branch(kernel: KernelFigures, plan: TilePlan) -> dict[str, int]:
    loop = _loop(kernel)
    assert loop.products is not None
    return {
        "loop_instructions": loop.instructions,
        "alu_instructions": sum(loop.opcodes.get(word, 0) for word in ALU_WORDS),
        "step": loop.products // (plan.tokens * ROW_TILE),
        "warps": plan.num_warps,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
    }


def _loop(kernel: KernelFigures) -> LoopFigures:
    """The one loop that multiplies."""
    (loop,) = kernel.matrix_loops
    return loop


if __name__ == "__main__":
    main()

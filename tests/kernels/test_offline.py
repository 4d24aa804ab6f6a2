"""The parser of machine code on excerpts counted by hand, and one small kernel compiled."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mxq.kernels.figures import (
    CompileFailure,
    compile_figures,
    compile_outcomes,
    ctas_per_sm,
    outcome_from_json,
)
from mxq.kernels.offline import KernelRequest
from mxq.kernels.sass import find_loops, loop_figures, parse_listing

# A loop of four instructions between one that runs ahead of it and one that follows it, each with
# the matrix instruction of a peeled step. Lines 5 to 7 are the body of the loop in SOURCE.
ONE_LOOP = """
        .type           kernel,@function
kernel:
.text.kernel:
	//## File "/tmp/made/kernel.py", line 6
        /*0000*/                   HGMMA.64x16x16.F32.BF16 R32, R56, gdesc[UR16], R32 ;
        /*0010*/                   ISETP.LE.AND P0, PT, R93, UR13, PT ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
	//## File "/tmp/made/kernel.py", line 5
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0040*/                   LDS.U16 R41, [R3+UR6] ;
	//## File "/tmp/made/kernel.py", line 6
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R32, R56, gdesc[UR16], R32, gsb0 ;
	//## File "/usr/lib/triton/standard.py", line 4
        /*0060*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
	//## File "/tmp/made/kernel.py", line 6
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R32, R56, gdesc[UR16], R32 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""

SOURCE = """
def helper(w):
    return w
def multiply(x, w):
    for step in range(3):
        w = helper(x)
        x = w
    return w
"""

# The wait for a barrier stands behind the kernel (.L_x_3) and jumps back into the loop.
LOOP_WITH_A_DISTANT_WAIT = """
        /*0000*/                   UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR14], UPT ;
        /*0040*/                   BRA.U UP1, `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0070*/              @!P0 BRA `(.L_x_3) ;
        /*0080*/                   BRA `(.L_x_1) ;
"""

# An outer loop that picks one of two inner loops by a table of targets; the first one spills.
TWO_BRANCHES = """
.L_x_0:
        /*0000*/                   BRX R6 -0x10      (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        /*0010*/                   IMMA.16832.S8.S8.SAT R36, R44.ROW, R20.COL, R36 ;
        /*0020*/                   LDL.64 R4, [R1] ;
        /*0030*/                   STL [R1+0x8], R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   HMMA.16816.F32.BF16 R36, R32, R48, R36 ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""

# Divergent threads meet at .L_x_1, behind the code that an early BSYNC skips; then comes a loop.
LOOP_BEHIND_A_MEETING_POINT = """
        /*0000*/                   BSSY B0, `(.L_x_1) ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   BSYNC B0 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   CALL.REL.NOINC `(elsewhere) ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   NOP ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""

# A jump without a guard that depends on a register; only what it does not take leads to a loop.
LOOP_BEHIND_A_CONDITION = """
        /*0000*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_0:
        /*0010*/                   NOP ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   EXIT ;
"""

# A loop over lines 3 to 6 with one over 5 and 6 inside, which has most of the instructions.
NESTED_LINES = """
.L_x_0:
	//## File "/tmp/made/kernel.py", line 4
        /*0000*/                   NOP ;
.L_x_1:
	//## File "/tmp/made/kernel.py", line 6
        /*0010*/                   NOP ;
        /*0020*/                   NOP ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
	//## File "/tmp/made/kernel.py", line 4
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""

NESTED_SOURCE = """
def add(x):
    for i in range(3):
        x = x + i
        while x < 7:
            x = x + 1
    return x
"""

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def widen(w):
    return ((w.to(tl.int32) & 15) - 8).to(tl.bfloat16)


@triton.jit
def multiply_bf16(x_ptr, w_ptr, units):
    k = tl.arange(0, 64)
    w_at = w_ptr + tl.arange(0, 128)[:, None] * 64 + k[None, :]
    x_at = x_ptr + tl.arange(0, 16)[None, :] * 1024 + k[:, None]
    acc = tl.zeros((128, 16), dtype=tl.float32)
    for _ in tl.range(0, units, num_stages=3):
        acc = tl.dot(widen(tl.load(w_at)), tl.load(x_at), acc)
        w_at += 128 * 64
        x_at += 64
    return acc


@triton.jit
def multiply_int8(x_ptr, w_ptr, units):
    k = tl.arange(0, 128)
    w_at = w_ptr + tl.arange(0, 128)[:, None] * 128 + k[None, :]
    x_at = x_ptr + tl.arange(0, 16)[None, :] * 1024 + k[:, None]
    acc = tl.zeros((128, 16), dtype=tl.int32)
    for _ in tl.range(0, units, num_stages=3):
        acc = tl.dot(tl.load(w_at), tl.load(x_at), acc, out_dtype=tl.int32)
        w_at += 128 * 128
        x_at += 128
    return acc.to(tl.float32)


@triton.jit
def kernel(x_ptr, xq_ptr, w_ptr, y_ptr, units, BRANCH: tl.constexpr):
    for tile in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        if units % 3 == BRANCH:
            acc = multiply_bf16(x_ptr, w_ptr, units)
        else:
            acc = multiply_int8(xq_ptr, w_ptr, units)
        y_at = y_ptr + tile * 2048 + tl.arange(0, 128)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(y_at, acc)
"""
SIGNATURE = {
    "x_ptr": "*bf16",
    "xq_ptr": "*i8",
    "w_ptr": "*i8",
    "y_ptr": "*fp32",
    "units": "i32",
    "BRANCH": "constexpr",
}


def loops_of(text: str, source: str = ""):
    return loop_figures(parse_listing(text, "kernel.py"), source, num_warps=4)


def kernel_request(folder: Path, text: str = KERNEL, **changes) -> KernelRequest:
    path = folder / "kernel.py"
    path.write_text(text)
    pointers = tuple(name for name in SIGNATURE if name.endswith("_ptr"))
    fields = {"num_warps": 4, "max_registers": 128, "divisible": pointers, "arch": 90, **changes}
    constants = {"BRANCH": 1}
    return KernelRequest("small", str(path), "kernel", SIGNATURE, constants=constants, **fields)


def test_a_loop_is_its_own_instructions_without_peeled_steps():
    (loop,) = loops_of(ONE_LOOP)
    assert loop.instructions == 4
    assert loop.matrix == {"HGMMA.64x16x16.F32.BF16": 1}
    assert loop.opcodes == {
        "BRA": 1,
        "HGMMA": 1,
        "LDGSTS": 1,
        "LDGSTS.128": 1,
        "LDS": 1,
        "LDS.U16": 1,
    }


def test_a_loop_is_named_after_the_for_that_its_lines_are_in():
    (loop,) = loops_of(ONE_LOOP, SOURCE)
    assert (loop.function, loop.line) == ("multiply", 5)


def test_a_loop_without_lines_of_the_source_has_no_name():
    (loop,) = loops_of(ONE_LOOP.replace("/kernel.py", "/other.py"), SOURCE)
    assert (loop.function, loop.line) == ("", 0)


def test_a_wait_moved_behind_the_kernel_belongs_to_its_loop_and_makes_no_other():
    loop, wait = loops_of(LOOP_WITH_A_DISTANT_WAIT)
    assert (loop.instructions, wait.instructions) == (7, 2)
    assert (loop.depth, wait.depth) == (1, 2)
    assert not loop.holds_matrix_loop
    assert loop.products is None  # the instruction's name does not tell its shape


def test_a_jump_by_table_leads_to_every_branch():
    outer, first, second = loops_of(TWO_BRANCHES)
    assert (outer.instructions, first.instructions, second.instructions) == (10, 4, 2)
    assert (outer.depth, first.depth, second.depth) == (1, 2, 2)
    assert [loop.holds_matrix_loop for loop in (outer, first, second)] == [True, False, False]


def test_spills_are_counted_in_every_loop_around_them():
    assert [loop.local for loop in loops_of(TWO_BRANCHES)] == [2, 2, 0]


def test_products_by_hand():
    outer, first, second = loops_of(TWO_BRANCHES)
    int8, fp8, bf16 = 4 * 16 * 8 * 32, 64 * 16 * 32, 4 * 16 * 8 * 16  # four warps, one group
    assert (first.products, second.products) == (int8, fp8)
    assert outer.products == int8 + fp8 + bf16


def test_a_meeting_point_of_threads_is_reached_and_a_call_comes_back():
    listing = parse_listing(LOOP_BEHIND_A_MEETING_POINT, "kernel.py")
    assert find_loops(listing) == [frozenset({6, 7})]


def test_a_jump_that_depends_on_a_register_may_not_be_taken():
    assert [loop.instructions for loop in loops_of(LOOP_BEHIND_A_CONDITION)] == [2]


def test_nested_loops_are_named_after_their_own_lines():
    outer, inner = loops_of(NESTED_LINES, NESTED_SOURCE)
    assert (outer.function, outer.line) == ("add", 3)
    assert (inner.function, inner.line) == ("add", 5)


def test_an_endless_loop_that_is_not_reached_is_none():
    assert len(loops_of(ONE_LOOP)) == 1  # .L_x_2 jumps to itself


def test_a_jump_to_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match="target of BRX R6 -0x10 is not in the listing"):
        parse_listing("        /*0000*/                   BRX R6 -0x10 ;", "kernel.py")


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "fit"),
    [
        (90, 128, 0, 4, 4),  # 65536 / (128 x 128)
        (90, 129, 0, 4, 3),  # a warp takes 136 x 32: 15 warps, in fours 12
        (90, 129, 0, 2, 6),
        (90, 32, 55296, 4, 4),  # 228 KiB / (54 + 1) KiB
        (90, 32, 0, 4, 16),  # 64 warps
        (89, 32, 0, 4, 12),  # 48 warps
        (89, 32, 48 * 1024, 4, 2),  # 100 KiB / 49 KiB
        (90, 32, 0, 1, 32),  # the limit on programs
        (90, 255, 98304, 8, 1),  # 8 warps in fours of 65536 / 8192
        (80, 32, 164 * 1024, 4, 0),
    ],
)
def test_programs_on_a_multiprocessor_by_hand(arch, registers, shared_bytes, num_warps, fit):
    assert fit == ctas_per_sm(
        arch, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps
    )


def test_a_small_kernel_has_the_loops_that_its_source_has(tmp_path):
    (figures,) = compile_figures([kernel_request(tmp_path)], Path(sys.executable))
    outer, *inner = figures.loops
    assert outer.function == "kernel"
    assert outer.holds_matrix_loop
    assert figures.matrix_loops == tuple(inner)
    words = {loop.function: {name.split(".")[0] for name in loop.matrix} for loop in inner}
    assert words == {"multiply_bf16": {"HGMMA"}, "multiply_int8": {"IGMMA"}}
    # Each pass multiplies a tile of 128 x 16 by the loop's step along K.
    products = {loop.function: loop.products for loop in inner}
    assert products == {"multiply_bf16": 128 * 16 * 64, "multiply_int8": 128 * 16 * 128}
    assert figures.registers <= 128
    assert figures.ctas_per_sm == 4
    # Three stages of weights (128 x 64 bytes) and tokens (16 x 64 bfloat16), or of 128 int8 each.
    assert figures.shared_bytes >= 2 * 128 * 128


def test_figures_survive_json(tmp_path):
    (figures,) = compile_figures([kernel_request(tmp_path, arch=80)], Path(sys.executable))
    assert outcome_from_json(json.loads(json.dumps(asdict(figures)))) == figures


def test_a_kernel_that_does_not_compile_is_named_with_the_reason(tmp_path):
    broken = kernel_request(tmp_path, KERNEL.replace("& 15", "& unheard_of"))
    (failure,) = compile_outcomes([broken], Path(sys.executable))
    assert isinstance(failure, CompileFailure)
    with pytest.raises(ValueError, match=r"(?s)small for sm_90: .*unheard_of is not defined"):
        compile_figures([broken], Path(sys.executable))


def test_what_ptxas_says_is_the_reason(tmp_path):
    # Triton prints the whole program then, which must not get into the output.
    asm = 'tl.inline_asm_elementwise("nonsense $0, $1;", "=r,r", [w], tl.int32, True, 1)'
    broken = kernel_request(tmp_path, KERNEL.replace("(w.to(tl.int32) & 15)", asm))
    (failure,) = compile_outcomes([broken], Path(sys.executable))
    assert isinstance(failure, CompileFailure)
    assert "nonsense" in failure.error


def test_an_interpreter_without_triton_is_reported(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named triton >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"(?s)offline.py failed:.*no module named triton"):
        compile_figures([kernel_request(tmp_path)], python)

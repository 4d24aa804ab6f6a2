"""Text of the device functions that branches share: dots, scales, rounding, the final store.

Each has a plain form; PTX has its own where two or four numbers fit a register, and the interpreter
where its arithmetic of bfloat16 is not that of a GPU.
"""

import re

from mxq.kernels.spec import KernelSpec


def render_helpers(spec: KernelSpec, branches: str) -> str:
    """The functions that the text of the branches calls, and those that they call."""
    texts = {**_PLAIN_HELPERS, **(_PTX_HELPERS if spec.dialect == "ptx" else {})}
    if spec.dialect == "interpreted":
        texts |= _INTERPRETED_HELPERS
    texts["store_tile"] = _STORE.format(bias=_BIAS if spec.has_bias else "")
    used = [name for name in texts if name == "to_bf16" or re.search(rf"\b{name}\b", branches)]
    return "\n\n".join(texts[name].strip("\n") + "\n" for name in used)


_STORE = '''
@triton.jit
def store_tile(
    out,
    y_ptr,
    partial_ptr,
    bias_ptr,
    stride_y,
    stride_slice,
    problem_ptr,
    tile_ptr,
    BM: tl.constexpr,
):
    """Write [128, BM] float32 results: rounded, or one slice of a sum over K."""
    # Read here, not before the loop: registers are short there.
    row0 = tl.load(tile_ptr + 2)
    nrows = tl.load(tile_ptr + 3)
    slices = tl.load(tile_ptr + 7)
    n = tl.load(problem_ptr + 2)
    column = tl.load(problem_ptr + 5)
    n0 = tl.load(tile_ptr + 4)
    n_N = tl.arange(0, 128)
    m_M = tl.arange(0, BM)
    # Rows past the expert's tokens and columns past the weight's outputs stay untouched.
    inside = (m_M < nrows)[None, :] & (n_N < n - n0)[:, None]
    # The start of a tile can pass 2**31, a place inside it cannot.
    start = row0.to(tl.int64) * stride_y + column + n0
    place = m_M[None, :] * stride_y + n_N[:, None]
{bias}    if slices >> 8 == 1:
        tl.store(y_ptr + start + place, to_bf16(out), mask=inside)
    else:
        start += (slices & 0xFF) * stride_slice
        tl.store(partial_ptr + start + place, out, mask=inside)
'''

_BIAS = """    bias_off = tl.load(problem_ptr + 7)
    if (bias_off >= 0) & ((slices & 0xFF) == 0):
        # A bias is as long as the padded weight, so the last tile reads inside it.
        out += tl.load(bias_ptr + bias_off + n0 + n_N)[:, None]
"""

_PLAIN_HELPERS = {
    "to_bf16": '''
@triton.jit
def to_bf16(x):
    """Round float32 to bfloat16, to nearest, ties to even."""
    return x.to(tl.bfloat16)
''',
    "low_float": '''
@triton.jit
def low_float(meta):
    """The float16 scale in the low half of a metadata word, as float32."""
    return (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
''',
    "low_bf16": '''
@triton.jit
def low_bf16(meta):
    """The float16 scale in the low half of a metadata word, rounded to bfloat16."""
    return to_bf16((meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
''',
    "high_bf16": '''
@triton.jit
def high_bf16(meta):
    """The bfloat16 offset in the high half of a metadata word."""
    return (meta >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
''',
    "high_int8": '''
@triton.jit
def high_int8(meta):
    """The zero point in the high half of a metadata word."""
    return (meta >> 16).to(tl.int8)
''',
    "scale_bf16": '''
@triton.jit
def scale_bf16(w, scale):
    """Product of bfloat16, rounded once."""
    return to_bf16(w.to(tl.float32) * scale.to(tl.float32))
''',
    "add_bf16": '''
@triton.jit
def add_bf16(w, offset):
    """Sum of bfloat16, rounded once."""
    return to_bf16(w.to(tl.float32) + offset.to(tl.float32))
''',
    "subtract_int8": '''
@triton.jit
def subtract_int8(w, zero_N):
    """Codes minus the zero point of their row, as int8."""
    return w - zero_N[:, None]
''',
    "dot_bf16": '''
@triton.jit
def dot_bf16(w, x, acc):
    """Weights times tokens, summed in float32."""
    return tl.dot(w, x, acc)
''',
    "dot_int8": '''
@triton.jit
def dot_int8(w, x, acc):
    """Weights times tokens, summed in int32."""
    return tl.dot(w, x, acc, out_dtype=tl.int32)
''',
    "dot_fp8": '''
@triton.jit
def dot_fp8(w, x, acc):
    """Weights times tokens; Hopper sums in 14 bits, so every step is added in float32."""
    return tl.dot(w, x, acc, max_num_imprecise_acc=128)
''',
}

_PTX_HELPERS = {
    "scale_bf16": '''
@triton.jit
def scale_bf16(w, scale):
    """Product of bfloat16, rounded once; two at a time."""
    return tl.inline_asm_elementwise(
        asm="""{
        .reg .b32 none;
        mov.b32 none, 0x80008000;
        fma.rn.bf16x2 $0, $1, $2, none;
        }""",
        constraints="=r,r,r",
        args=[w, scale],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )
''',
    "add_bf16": '''
@triton.jit
def add_bf16(w, offset):
    """Sum of bfloat16, rounded once; two at a time."""
    return tl.inline_asm_elementwise(
        asm="""{
        .reg .b32 one;
        mov.b32 one, 0x3F803F80;
        fma.rn.bf16x2 $0, $1, one, $2;
        }""",
        constraints="=r,r,r",
        args=[w, offset],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )
''',
    "subtract_int8": '''
@triton.jit
def subtract_int8(w, zero_N):
    """Codes minus the zero point of their row, as int8: four at a time, without a borrow."""
    return tl.inline_asm_elementwise(
        asm="""{
        or.b32 $0, $1, 0x80808080;
        sub.u32 $0, $0, $2;
        xor.b32 $0, $0, 0x80808080;
        }""",
        constraints="=&r,r,r",
        args=[w, tl.broadcast_to(zero_N[:, None], (128, 128))],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )
''',
}

_INTERPRETED_HELPERS = {
    "to_bf16": '''
@triton.jit
def to_bf16(x):
    """Round float32 to bfloat16, to nearest, ties to even; the interpreter's cast cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
''',
    "dot_bf16": '''
@triton.jit
def dot_bf16(w, x, acc):
    """Weights times tokens in float32, which holds the products exactly."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
''',
    "dot_fp8": '''
@triton.jit
def dot_fp8(w, x, acc):
    """Weights times tokens in float32, which holds the products exactly."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
''',
}

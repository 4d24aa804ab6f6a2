"""Write the Triton source of a group GEMM that has exactly the branches a layer needs.

``render`` is pure and is what golden tests pin. ``build`` writes the file first and imports it
second, because ``@triton.jit`` reads its own source and so refuses functions made by ``exec``.

Each program computes one tile of a table, heaviest first, and the tile's branch number picks the
loop. The grid is a bound on the tiles, so nothing has to be known on the host; programs beyond the
end of the table stop at once. (A persistent loop over tiles gains nothing here, since Triton drains
the load pipeline between tiles, and its loop-invariant addresses of all branches cost registers.)

A loop multiplies weights (the left operand, unpacked in registers) by tokens, so
its result is [128 outputs, tokens]; weights are read once whatever the number of tokens.
"""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from mxq.kernels.dequant import function_name, planes_of, render_unpack, takes_offset
from mxq.kernels.spec import Branch, Input, KernelSpec, WeightFormat

ENTRY_POINT = "group_gemm"

TILE_FIELDS = ("branch", "problem", "row0", "nrows", "n0", "unit0", "units", "slices")
"""Columns of the tile table; the last one is ``slice | slices << 8``."""

PROBLEM_FIELDS = ("w_off", "meta_off", "n", "n_pad", "k_pad", "column", "expert", "bias_off")
"""Columns of the problem table."""


def signature(spec: KernelSpec) -> dict[str, str]:
    """Argument names of the kernel with their Triton types, in order."""
    arguments = {
        "y_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "words_ptr": "*u8",
        "meta_ptr": "*i32",
        "bias_ptr": "*fp32",
        "problems_ptr": "*i64",
        "tiles_ptr": "*i32",
        "tile_count_ptr": "*i32",
        "rows_ptr": "*i32",
    }
    for kind in spec.inputs:
        arguments |= _input_arguments(kind)
    if any(branch.format.w_bits == 16 for branch in spec.branches):
        arguments["plain_ptr"] = "*bf16"
    return arguments | {"stride_y": "i32", "stride_x": "i32", "stride_slice": "i64"}


def render(spec: KernelSpec) -> str:
    """The module text, a function of nothing but the specification."""
    formats = sorted({branch.format for branch in spec.branches})
    unpacked = {function_name(form): form for form in formats if needs_unpack(form)}
    parts = [_HEADER.format(branches=", ".join(str(branch) for branch in spec.branches))]
    parts += [render_unpack(form, spec.dialect) for _, form in sorted(unpacked.items())]
    parts += [_helpers(spec)]
    parts += [_render_branch(branch, spec) for branch in spec.branches]
    parts.append(_render_entry(spec))
    return "\n".join(part.strip("\n") + "\n\n" for part in parts).rstrip("\n") + "\n"


def build(spec: KernelSpec, folder: Path) -> ModuleType:
    """Write the module of a kernel into a folder, if it is not there, and import it."""
    text = render(spec)
    name = f"mxq_kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may build the same kernel: each moves a whole file into place.
        part = path.with_name(f"{name}.{id(text):x}.part")
        part.write_text(text)
        part.replace(path)
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    loader.loader.exec_module(module)
    return module


def needs_unpack(form: WeightFormat) -> bool:
    """Whether the codes share bytes, or have to become bfloat16."""
    return form.is_integer and not (form.w_bits == 8 and form.arithmetic == "int8")


def _input_arguments(kind: Input) -> dict[str, str]:
    if kind == "bf16":
        return {"bf16_ptr": "*bf16"}
    if kind == "fp8":
        return {"fp8_ptr": "*fp8e4nv", "fp8_scale_ptr": "*fp32"}
    return {f"{kind}_ptr": "*i8", f"{kind}_scale_ptr": "*fp32", f"{kind}_sum_ptr": "*i32"}


def branch_name(branch: Branch) -> str:
    """Name of the device function of a branch."""
    return f"multiply_{branch.format}_{branch.tokens}"


def _branch_inputs(form: WeightFormat) -> list[str]:
    if form.w_bits == 16:
        return ["plain_ptr"]
    names = list(_input_arguments(form.input))
    # Grouped integer products take the zero point off in registers, before the sum.
    return [name for name in names if form.group_size is None or not name.endswith("_sum_ptr")]


def _render_branch(branch: Branch, spec: KernelSpec) -> str:
    form = branch.format
    lines = [
        *_start_lines(form),
        *_meta_lines(form),
        *_loop_lines(form, branch.stages),
        *_scale_lines(form),
        "store_tile(",
        "    out, y_ptr, partial_ptr, bias_ptr, stride_y, stride_slice, problem_ptr, tile_ptr, BM",
        ")",
    ]
    return _BRANCH.format(
        name=branch_name(branch),
        inputs=", ".join(_branch_inputs(form)),
        doc=f"Tile of {branch.tokens} tokens by 128 outputs, weights in {form}.",
        tokens=branch.tokens,
        body="\n".join(f"    {line}" if line else "" for line in lines),
    )


def _start_lines(form: WeightFormat) -> list[str]:
    """Pointers of the first step: the tokens' inputs, and the planes of packed rows."""
    x_ptr, step = _branch_inputs(form)[0], form.step
    lines = [
        "n_N = tl.arange(0, 128)",
        "# Rows beyond the tile read token 0 and are not stored.",
        "m_M = tl.arange(0, BM)",
        "token_M = tl.load(rows_ptr + row0 + m_M, mask=m_M < nrows, other=0).to(tl.int64)",
        f"k_K = tl.arange(0, {step})",
        f"x_KM = {x_ptr} + token_M[None, :] * stride_x + (unit0 * 128 + k_K)[:, None]",
        # A tile's part of a weight can start beyond 2**31 bytes.
        "unit = unit0.to(tl.int64)",
    ]
    if form.w_bits == 16:
        return [
            *lines,
            "w_NK = (words_ptr + w_off).to(tl.pointer_type(tl.bfloat16))",
            "w_NK += unit * (n_pad * 128) + (n0 + n_N)[:, None] * 64 + k_K[None, :]",
        ]
    if not needs_unpack(form):
        lines += ["w_NK = words_ptr + w_off + unit * (n_pad * 128)"]
        return [*lines, "w_NK += (n0 + n_N)[:, None] * 128 + k_K[None, :]"]
    planes = planes_of(form)
    for index in range(planes.count):
        plane = f" + n_pad * {index * planes.width}" if index else ""
        lines.append(f"w{index}_NB = words_ptr + w_off + unit * (n_pad * {form.step_bytes}){plane}")
        lines.append(
            f"w{index}_NB += (n0 + n_N)[:, None] * {planes.width}"
            f" + tl.arange(0, {planes.width})[None, :]"
        )
    return lines


def _meta_lines(form: WeightFormat) -> list[str]:
    """Scales and zeros: pointers of the first step, or the values of whole rows."""
    if form.w_bits == 16:
        return []
    base = "meta_ptr + meta_off"
    if form.group_size is None:
        lines = [f"scale_N = tl.load({base} + n0 + n_N).to(tl.float32, bitcast=True)"]
        if form.is_integer:
            lines.append(f"zero_N = tl.load({base} + n_pad + n0 + n_N)")
        if form.is_integer and form.input == "bf16":
            start = "0" if form.w_bits == 8 else "128"
            lines.append(f"offset_N = (-({start} + zero_N)).to(tl.float32).to(tl.bfloat16)")
        return lines
    groups = 128 // form.group_size
    if groups == 1:
        return [f"meta_N = {base} + unit * n_pad + n0 + n_N"]
    return [
        f"meta_NG = {base} + unit * ({groups} * n_pad) + (n0 + n_N)[:, None]",
        f"meta_NG += tl.arange(0, {groups})[None, :] * n_pad",
    ]


def _loop_lines(form: WeightFormat, depth: int) -> list[str]:
    grouped_int = form.is_integer and form.arithmetic == "int8" and form.group_size is not None
    integer = form.arithmetic == "int8" and not grouped_int
    steps = "units * 2" if form.step == 64 else "units"
    lines = [
        f"acc = tl.zeros((128, BM), dtype={'tl.int32' if integer else 'tl.float32'})",
        f"for _ in tl.range(0, {steps}, num_stages={depth}):",
    ]
    body = ["x = tl.load(x_KM)", f"x_KM += {form.step}", *_load_weight_lines(form)]
    if form.group_size is not None:
        body += _group_lines(form)
    if integer:
        body.append("acc = dot_int8(w, x, acc)")
    elif grouped_int:
        zeros = "tl.zeros((128, BM), dtype=tl.int32)"
        body.append(f"acc += dot_int8(w, x, {zeros}).to(tl.float32) * scale_N[:, None]")
    elif form.input == "fp8":
        body.append("acc = dot_fp8(w, x, acc)")
    else:
        body.append("acc = dot_bf16(w, x, acc)")
    return lines + [f"    {line}" for line in body]


def _load_weight_lines(form: WeightFormat) -> list[str]:
    """The step's weights as an operand, before the scales of groups."""
    if form.w_bits == 16:
        return ["w = tl.load(w_NK)", "w_NK += n_pad * 64"]
    if not needs_unpack(form):
        cast = "tl.float8e4nv" if form.input == "fp8" else "tl.int8"
        return [f"w = tl.load(w_NK).to({cast}, bitcast=True)", "w_NK += n_pad * 128"]
    lines = []
    arguments = [f"packed{index}" for index in range(planes_of(form).count)]
    for index, name in enumerate(arguments):
        lines.append(f"{name} = load_words(w{index}_NB)")
        lines.append(f"w{index}_NB += n_pad * {form.step_bytes}")
    if takes_offset(form) and form.group_size is None:
        arguments.append("offset_N[:, None]")
    elif takes_offset(form):
        lines += ["meta = tl.load(meta_N)", "meta_N += n_pad"]
        arguments.append("high_bf16(meta)[:, None]")
    return [*lines, f"w = {function_name(form)}({', '.join(arguments)})"]


def _group_lines(form: WeightFormat) -> list[str]:
    """Apply the scale of the step's group or groups, and the zero where it is not applied yet."""
    assert form.group_size is not None
    groups = 128 // form.group_size
    if form.arithmetic == "int8":
        lines = ["meta = tl.load(meta_N)", "meta_N += n_pad", "scale_N = low_float(meta)"]
        return lines if form.w_bits == 8 else [*lines, "w = subtract_int8(w, high_int8(meta))"]
    if takes_offset(form):
        return ["w = scale_bf16(w, low_bf16(meta)[:, None])"]
    if groups == 1:
        return [
            "meta = tl.load(meta_N)",
            "meta_N += n_pad",
            "w = add_bf16(w, high_bf16(meta)[:, None])",
            "w = scale_bf16(w, low_bf16(meta)[:, None])",
        ]
    return [
        "meta = tl.load(meta_NG)",
        f"meta_NG += n_pad * {groups}",
        f"w = tl.reshape(w, (128, {groups}, {form.group_size}))",
        "w = add_bf16(w, high_bf16(meta)[:, :, None])",
        "w = scale_bf16(w, low_bf16(meta)[:, :, None])",
        "w = tl.reshape(w, (128, 128))",
    ]


def _scale_lines(form: WeightFormat) -> list[str]:
    """From the accumulator to float32 outputs."""
    if form.input == "bf16":
        return [
            "out = acc * scale_N[:, None]"
            if form.w_bits < 16 and form.group_size is None
            else "out = acc"
        ]
    scale = f"{form.input}_scale_ptr"
    lines = [f"x_scale_M = tl.load({scale} + token_M)"]
    if form.group_size is not None:
        return [*lines, "out = acc * x_scale_M[None, :]"]
    if form.is_integer:
        lines += [
            "# The zero point's share is taken off once, by the first slice.",
            f"sum_M = tl.load({form.input}_sum_ptr + token_M)",
            "first = tl.where((tl.load(tile_ptr + 7) & 0xFF) == 0, 1, 0)",
            "acc -= (zero_N * first)[:, None] * sum_M[None, :]",
        ]
    return [*lines, "out = acc.to(tl.float32) * scale_N[:, None] * x_scale_M[None, :]"]


def _helpers(spec: KernelSpec) -> str:
    """Device functions that the branches share, only those that they call."""
    body = "".join(
        "\n".join(_loop_lines(b.format, 1) + _load_weight_lines(b.format)) for b in spec.branches
    )
    body += "\nstore_tile"
    texts = {**_PLAIN_HELPERS, **(_PTX_HELPERS if spec.dialect == "ptx" else {})}
    if spec.dialect == "interpreted":
        texts |= _INTERPRETED_HELPERS
    texts["store_tile"] = _STORE.format(bias=_BIAS if spec.has_bias else "")
    used = [name for name in texts if name == "to_bf16" or re.search(rf"\b{name}\b", body)]
    return "\n\n".join(texts[name].strip("\n") + "\n" for name in used)


def _render_entry(spec: KernelSpec) -> str:
    shared = "stride_y, stride_x, stride_slice"
    chain = []
    for index, branch in enumerate(spec.branches):
        word = "if" if index == 0 else "elif"
        last = index == len(spec.branches) - 1
        test = "else:" if last and index else f"{word} branch == {index}:"
        call = [
            f"{branch_name(branch)}(",
            f"    y_ptr, partial_ptr, words_ptr, meta_ptr, bias_ptr, rows_ptr, {shared},",
            f"    {', '.join(_branch_inputs(branch.format))},",
            "    problem_ptr, tile_ptr,",
            ")",
        ]
        chain += call if len(spec.branches) == 1 else [test, *(f"    {line}" for line in call)]
    return _ENTRY.format(
        entry=ENTRY_POINT,
        arguments="\n".join(f"    {name}," for name in signature(spec)),
        chain="\n".join(f"        {line}" for line in chain),
    )


_HEADER = '''
"""Group GEMM with the branches {branches}. Generated by mxq.kernels.codegen; do not edit."""

import triton
import triton.language as tl
'''

_BRANCH = '''
@triton.jit
def {name}(
    y_ptr, partial_ptr, words_ptr, meta_ptr, bias_ptr, rows_ptr, stride_y, stride_x, stride_slice,
    {inputs}, problem_ptr, tile_ptr,
):
    """{doc}"""
    BM: tl.constexpr = {tokens}
    row0 = tl.load(tile_ptr + 2)
    nrows = tl.load(tile_ptr + 3)
    n0 = tl.multiple_of(tl.load(tile_ptr + 4), 128)
    unit0 = tl.load(tile_ptr + 5)
    units = tl.load(tile_ptr + 6)
    w_off = tl.multiple_of(tl.load(problem_ptr), 128)
    meta_off = tl.multiple_of(tl.load(problem_ptr + 1), 32)
    n_pad = tl.multiple_of(tl.load(problem_ptr + 3).to(tl.int32), 128)
{body}
'''

_STORE = '''
@triton.jit
def store_tile(
    out, y_ptr, partial_ptr, bias_ptr, stride_y, stride_slice, problem_ptr, tile_ptr,
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

_ENTRY = '''
@triton.jit
def {entry}(
{arguments}
):
    """Multiply one tile of the table; programs beyond its end have nothing to do."""
    tile = tl.program_id(0)
    if tile < tl.load(tile_count_ptr):
        tile_ptr = tiles_ptr + tile * 8
        branch = tl.load(tile_ptr)
        problem_ptr = problems_ptr + tl.load(tile_ptr + 1) * 8
{chain}
'''

_PLAIN_HELPERS = {
    "to_bf16": '''
@triton.jit
def to_bf16(x):
    """Round float32 to bfloat16, to nearest, ties to even."""
    return x.to(tl.bfloat16)
''',
    "load_words": '''
@triton.jit
def load_words(bytes_NB):
    """Packed rows as words, [128, bytes / 4]."""
    BYTES: tl.constexpr = bytes_NB.shape[1]
    first_NW, _ = tl.split(tl.reshape(bytes_NB, (128, BYTES // 2, 2)))
    first_NW, _ = tl.split(tl.reshape(first_NW, (128, BYTES // 4, 2)))
    return tl.load(first_NW.to(tl.pointer_type(tl.int32)))
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
    "load_words": '''
@triton.jit
def load_words(bytes_NB):
    """Packed rows, [128, bytes]; four bytes of a thread are a word."""
    return tl.load(bytes_NB)
''',
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

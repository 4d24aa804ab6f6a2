"""Text of the loop of one branch: from the tile's numbers to a stored tile.

Names: n counts outputs, m tokens of the tile, k inputs; a suffix gives the dimensions of a tensor.
"""

from mxq.kernels.code_fields import function_name, planes_of, takes_offset
from mxq.kernels.spec import Branch, Input, WeightFormat


def branch_name(branch: Branch) -> str:
    """Name of the device function of a branch."""
    return f"multiply_{branch.format}_{branch.tokens}"


def branch_inputs(form: WeightFormat) -> list[str]:
    """Arguments that a branch reads its tokens from."""
    if form.w_bits == 16:
        return ["plain_ptr"]
    names = list(input_arguments(form.input))
    # Grouped integer products take the zero point off in registers, before the sum.
    return [name for name in names if form.group_size is None or not name.endswith("_sum_ptr")]


def branch_arguments(form: WeightFormat) -> list[str]:
    """Names that a branch is called with."""
    return [*_SHARED_ARGUMENTS, *branch_inputs(form), "problem_ptr", "tile_ptr"]


def render_branch(branch: Branch) -> str:
    """The device function of a branch."""
    form = branch.format
    lines = [
        *_place_lines(form),
        *_start_lines(form),
        *_meta_lines(form),
        *_loop_lines(form, branch.stages),
        *_scale_lines(form),
        f"store_tile({', '.join(_STORE_ARGUMENTS)})",
    ]
    return _BRANCH.format(
        name=branch_name(branch),
        arguments="\n".join(f"    {name}," for name in branch_arguments(form)),
        doc=f"Tile of {branch.tokens} tokens by 128 outputs, weights in {form}.",
        tokens=branch.tokens,
        body="\n".join(f"    {line}" if line else "" for line in lines),
    )


def _place_lines(form: WeightFormat) -> list[str]:
    """Where the weight starts; the rest of the problem is read when the tile is stored."""
    lines = ["w_off = tl.multiple_of(tl.load(problem_ptr), 128)"]
    if form.w_bits != 16:
        lines.append("meta_off = tl.multiple_of(tl.load(problem_ptr + 1), 32)")
    return [*lines, "n_pad = tl.multiple_of(tl.load(problem_ptr + 3).to(tl.int32), 128)"]


def _start_lines(form: WeightFormat) -> list[str]:
    """Pointers of the first step: the tokens' inputs, and the planes of packed rows."""
    x_ptr, step = branch_inputs(form)[0], form.step
    lines = [
        "n_N = tl.arange(0, 128)",
        "# Rows beyond the tile read token 0 and are not stored.",
        "m_M = tl.arange(0, BM)",
        "token_M = tl.load(rows_ptr + row0 + m_M, mask=m_M < nrows, other=0).to(tl.int64)",
        f"k_K = tl.arange(0, {step})",
        f"x_KM = {x_ptr} + token_M[None, :] * stride_x + (unit0 * 128 + k_K)[:, None]",
        "# A tile's part of a weight can start beyond 2**31 bytes.",
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
    lines += [
        f"w_ptr = words_ptr + w_off + unit * (n_pad * {form.step_bytes}) + n0 * {4 * planes.words}",
        "w_ptr = w_ptr.to(tl.pointer_type(tl.int32))",
    ]
    for index in range(planes.count):
        plane = f" + n_pad * {index * planes.words}" if index else ""
        row = f"n_N[:, None] * {planes.words} + tl.arange(0, {planes.words})[None, :]"
        lines.append(f"w{index}_NW = w_ptr{plane} + {row}")
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
        lines.append(f"{name} = tl.load(w{index}_NW)")
        lines.append(f"w{index}_NW += n_pad * {form.step_bytes // 4}")
    if takes_offset(form) and form.group_size is None:
        arguments.append("offset_N[:, None]")
    elif takes_offset(form):
        lines += ["meta = tl.load(meta_N)", "meta_N += n_pad"]
        arguments.append("high_bf16(meta)[:, None]")
    joined = ", ".join(arguments)
    if len(arguments) > _ARGUMENTS_ON_A_LINE:
        return [*lines, f"w = {function_name(form)}(", f"    {joined}", ")"]
    return [*lines, f"w = {function_name(form)}({joined})"]


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


def needs_unpack(form: WeightFormat) -> bool:
    """Whether the codes share bytes, or have to become bfloat16."""
    return form.is_integer and not (form.w_bits == 8 and form.arithmetic == "int8")


def input_arguments(kind: Input) -> dict[str, str]:
    """Arguments of a kind of input with their Triton types, its values first."""
    if kind == "bf16":
        return {"bf16_ptr": "*bf16"}
    if kind == "fp8":
        return {"fp8_ptr": "*fp8e4nv", "fp8_scale_ptr": "*fp32"}
    return {f"{kind}_ptr": "*i8", f"{kind}_scale_ptr": "*fp32", f"{kind}_sum_ptr": "*i32"}


_ARGUMENTS_ON_A_LINE = 6

_SHARED_ARGUMENTS = (
    "y_ptr",
    "partial_ptr",
    "words_ptr",
    "meta_ptr",
    "bias_ptr",
    "rows_ptr",
    "stride_y",
    "stride_x",
    "stride_slice",
)

_STORE_ARGUMENTS = (
    "out",
    "y_ptr",
    "partial_ptr",
    "bias_ptr",
    "stride_y",
    "stride_slice",
    "problem_ptr",
    "tile_ptr",
    "BM",
)

_BRANCH = '''
@triton.jit
def {name}(
{arguments}
):
    """{doc}"""
    BM: tl.constexpr = {tokens}
    row0 = tl.load(tile_ptr + 2)
    nrows = tl.load(tile_ptr + 3)
    n0 = tl.multiple_of(tl.load(tile_ptr + 4), 128)
    unit0 = tl.load(tile_ptr + 5)
    units = tl.load(tile_ptr + 6)
{body}
'''

"""Unpacking in plain Triton: whole words, every code by its own shift and mask."""

from collections.abc import Sequence

from mxq.kernels.code_fields import (
    FUNCTION,
    Planes,
    bf16_pairs,
    describe,
    function_name,
    indent,
    join_lines,
    low_bits_of,
    planes_of,
    takes_offset,
)
from mxq.kernels.spec import WeightFormat

_PARTS_ON_A_LINE = 4


def render_plain(form: WeightFormat) -> str:
    """The function of a format in plain Triton."""
    planes = planes_of(form)
    is_int8 = form.arithmetic == "int8"
    names = [f"x{index}" for index in range(planes.count)]
    values = _plain_int8(form.w_bits, planes) if is_int8 else _plain_bf16(form.w_bits, planes)
    lines = [f"v{index} = {value}" for index, value in enumerate(values)]
    side = 4 if is_int8 else 2  # codes beside each other in a word
    shape = f"(128, 4, {planes.words // 4}, {len(values) // side}, {side})"
    lines += [
        *join_lines([f"v{index}" for index in range(len(values))]),
        f"w = tl.permute(tl.reshape(w, {shape}), (0, 2, 3, 1, 4))",
        "w = tl.reshape(w, (128, 128))",
        f"return {_result(form)}",
    ]
    parameters = ", ".join([*names, "offset"] if takes_offset(form) else names)
    return FUNCTION.format(
        name=function_name(form), parameters=parameters, doc=describe(form), body=indent(lines)
    )


def _result(form: WeightFormat) -> str:
    if form.arithmetic == "int8":
        return "w.to(tl.int8)"
    terms = ["w.to(tl.float32)"]
    if takes_offset(form):
        terms.append("offset.to(tl.float32)")
    if form.w_bits != 8:
        terms.append("128.0")
    total = " + ".join(terms)
    return f"({total}).to(tl.bfloat16)" if len(terms) > 1 else f"{total}.to(tl.bfloat16)"


def _plain_bf16(bits: int, planes: Planes) -> list[str]:
    if bits == 8:
        return [_masked("x0", 8 * p + 16 * e, 0xFF) for p in range(2) for e in range(2)]
    values = []
    for pair in bf16_pairs(bits, planes):
        for e in range(2):
            parts = [
                _masked(f"x{word}", shift + pair.field + 16 * e, mask >> pair.field)
                for word, shift, mask in pair.parts
            ]
            values.append(_combined(parts))
    return values


def _plain_int8(bits: int, planes: Planes) -> list[str]:
    low_bits = low_bits_of(bits)
    high_bits, per_word = bits - low_bits, 8 // low_bits
    values = []
    for quad in range(planes.outputs):
        for e in range(4):
            start = low_bits * (quad % per_word) + 8 * e
            parts = [_masked(f"x{quad // per_word}", start, 2**low_bits - 1)]
            if high_bits:
                word = planes.count - 1 if high_bits == 1 else 4 + quad // 4
                start = (quad if high_bits == 1 else 2 * (quad % 4)) + 8 * e
                mask = (2**high_bits - 1) << low_bits
                parts.append(_masked(f"x{word}", start - low_bits, mask))
            values.append(_combined(parts))
    return values


def _masked(name: str, shift: int, mask: int) -> str:
    """Bits of a word, shifted to the right (to the left if ``shift`` is below 0)."""
    moved = f"({name} {'>>' if shift > 0 else '<<'} {abs(shift)})" if shift else name
    return f"{moved} & 0x{mask:X}"


def _combined(parts: Sequence[str]) -> str:
    """The OR of several parts, on lines of their own where they are many."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) <= _PARTS_ON_A_LINE:
        return " | ".join(f"({part})" for part in parts)
    return "(\n    " + "\n    | ".join(f"({part})" for part in parts) + "\n)"

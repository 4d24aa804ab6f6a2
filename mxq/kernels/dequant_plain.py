"""Unpacking in plain Triton: whole words, every code by its own shift and mask."""

from mxq.kernels.code_fields import (
    FUNCTION,
    Planes,
    bf16_pairs,
    describe,
    function_name,
    indent,
    joined,
    low_bits_of,
    planes_of,
    takes_offset,
)
from mxq.kernels.spec import WeightFormat


def render_plain(form: WeightFormat) -> str:
    """The function of a format in plain Triton."""
    planes = planes_of(form)
    is_int8 = form.arithmetic == "int8"
    names = [f"x{index}" for index in range(planes.count)]
    values = _plain_int8(form.w_bits, planes) if is_int8 else _plain_bf16(form.w_bits, planes)
    lines = [f"v{index} = {value}" for index, value in enumerate(values)]
    together = joined([f"v{index}" for index in range(len(values))])
    words = planes.width // 16
    inner = len(values) // (4 if is_int8 else 2)
    shape, order = (
        (f"(128, 4, {words}, {inner}, 4)", "(0, 2, 3, 1, 4)")
        if is_int8
        else (f"(128, 4, {words}, {inner}, 2)", "(0, 2, 3, 1, 4)")
    )
    lines += [
        f"w = tl.permute(tl.reshape({together}, {shape}), {order})",
        "w = tl.reshape(w, (128, 128))",
    ]
    if is_int8:
        lines.append("return w.to(tl.int8)")
    elif takes_offset(form):
        shift = "" if form.w_bits == 8 else " + 128.0"
        lines.append(f"return (w.to(tl.float32) + offset.to(tl.float32){shift}).to(tl.bfloat16)")
    else:
        shift = "" if form.w_bits == 8 else " + 128.0"
        lines.append(f"return (w.to(tl.float32){shift}).to(tl.bfloat16)")
    parameters = ", ".join([*names, "offset"] if takes_offset(form) else names)
    return FUNCTION.format(
        name=function_name(form), parameters=parameters, doc=describe(form), body=indent(lines)
    )


def _plain_bf16(bits: int, planes: Planes) -> list[str]:
    if bits == 8:
        return [f"(x0 >> {8 * p + 16 * e}) & 0xFF" for p in range(2) for e in range(2)]
    values = []
    for pair in bf16_pairs(bits, planes):
        for e in range(2):
            parts = [
                f"{_right(f'x{word}', shift + 16 * e)} & {mask:#x}"
                for word, shift, mask in pair.parts
            ]
            value = " | ".join(f"({part})" for part in parts)
            values.append(f"({value}) >> {pair.field}" if pair.field else value)
    return values


def _plain_int8(bits: int, planes: Planes) -> list[str]:
    low_bits = low_bits_of(bits)
    high_bits, per_word = bits - low_bits, 8 // low_bits
    values = []
    for quad in range(planes.outputs):
        for e in range(4):
            start = low_bits * (quad % per_word) + 8 * e
            value = f"({_right(f'x{quad // per_word}', start)} & {2**low_bits - 1:#x})"
            if high_bits:
                word = planes.count - 1 if high_bits == 1 else 4 + quad // 4
                start = (quad if high_bits == 1 else 2 * (quad % 4)) + 8 * e
                high = f"{_right(f'x{word}', start)} & {2**high_bits - 1:#x}"
                value += f" | (({high}) << {low_bits})"
            values.append(value)
    return values


def _right(name: str, shift: int) -> str:
    if shift == 0:
        return name
    return f"({name} >> {shift})" if shift > 0 else f"({name} << {-shift})"

"""Unpacking in inline PTX: one asm call for each word of a plane.

Operands and results are words. Asm on smaller types takes those that a thread's registers hold next
to each other, and the layout of a matrix operand has other rows there, not the rest of a word.
"""

import struct
from collections.abc import Sequence

from mxq.kernels.code_fields import (
    FUNCTION,
    MANTISSA_BITS,
    Pair,
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

_TYPES_ON_A_LINE = 4
_NAMES_ON_A_LINE = 13
_TARGETS_ON_A_LINE = 14


def render_ptx(form: WeightFormat) -> str:
    """The function of a format in inline PTX."""
    return _render_int8(form) if form.arithmetic == "int8" else _render_bf16(form)


def _render_bf16(form: WeightFormat) -> str:
    planes = planes_of(form)
    pairs = bf16_pairs(form.w_bits, planes)
    fields = sorted({pair.field for pair in pairs})
    regs = 2 * planes.outputs
    words = [f"${regs + index}" for index in range(planes.count)]
    names = [f"x{index}" for index in range(planes.count)]
    offset_of = {f: f"offset{f}" for f in fields}
    if takes_offset(form):
        # Operands follow the outputs: the words, then a register for each offset.
        offset_of = {f: f"${regs + planes.count + i}" for i, f in enumerate(fields)}
    asm = [
        *_constant_lines(form, fields),
        *(
            _wide_code_lines(offset_of[0])
            if form.w_bits == 8
            else _pair_lines(pairs, words, offset_of, skip=not takes_offset(form))
        ),
    ]
    offsets = [f"offset{f}" for f in fields] if takes_offset(form) else []
    return FUNCTION.format(
        name=function_name(form),
        parameters=", ".join([*names, "offset"] if offsets else names),
        doc=describe(form),
        body=indent(
            [
                *(line for f in fields if offsets for line in _offset_lines(f, planes)),
                *_asm_call(asm, [*names, *offsets], regs),
                *_PAIR_LINES,
                *_order_lines(planes, regs, 2),
            ]
        ),
    )


def _render_int8(form: WeightFormat) -> str:
    planes = planes_of(form)
    names = [f"x{index}" for index in range(planes.count)]
    words = [f"${planes.outputs + index}" for index in range(planes.count)]
    asm = _quad_lines(form.w_bits, planes, words)
    return FUNCTION.format(
        name=function_name(form),
        parameters=", ".join(names),
        doc=describe(form),
        body=indent(
            [
                *_asm_call(asm, names, planes.outputs),
                *_QUAD_LINES,
                *_order_lines(planes, planes.outputs, 4),
            ]
        ),
    )


def _constant_lines(form: WeightFormat, fields: Sequence[int]) -> list[str]:
    """Registers with the ratio of each field, and its offset where that is no operand."""
    lines = []
    for f in fields:
        lines += [f".reg .b32 ratio{f};", f"mov.b32 ratio{f}, {_bf16_twice(2.0**-f)};"]
        if not takes_offset(form):
            value = 0.0 if form.w_bits == 8 else 128.0 - 2.0 ** (MANTISSA_BITS - f)
            lines += [f".reg .b32 offset{f};", f"mov.b32 offset{f}, {_bf16_twice(value)};"]
    return lines


def _pair_lines(
    pairs: Sequence[Pair], words: Sequence[str], offset_of: dict[int, str], *, skip: bool
) -> list[str]:
    """Masks and ORs, then the multiply-adds; ``skip`` those that would add 0."""
    lines, temporaries = [], _Shifted(words)
    for index, pair in enumerate(pairs):
        (word, shift, mask), *more = pair.parts
        lines += temporaries.need(word, shift)
        source = temporaries.name(word, shift)
        lines.append(f"lop3.b32 ${index}, {source}, {_twice(mask)}, 0x43004300, 0xEA;")
        for word, shift, mask in more:
            lines += temporaries.need(word, shift)
            source = temporaries.name(word, shift)
            lines.append(f"lop3.b32 ${index}, {source}, {_twice(mask)}, ${index}, 0xEA;")
    for index, pair in enumerate(pairs):
        f = pair.field
        if f > 0 or not skip:
            lines.append(f"fma.rn.bf16x2 ${index}, ${index}, ratio{f}, {offset_of[f]};")
    return [*temporaries.declaration(), *lines]


def _wide_code_lines(offset: str) -> list[str]:
    """8-bit codes do not fit below the mantissa's end: high and low half apart, then joined."""
    lines = [
        ".reg .b32 a, b, c, h, sixteen, eight;",
        f"mov.b32 sixteen, {_bf16_twice(16.0)};",
        f"mov.b32 eight, {_bf16_twice(-136.0)};",
    ]
    lines += ["shr.b32 a, $2, 4;", "shr.b32 b, $2, 8;", "shr.b32 c, $2, 12;"]
    for out, low, high in (("$0", "$2", "a"), ("$1", "b", "c")):
        lines += [
            f"lop3.b32 {out}, {low}, 0x000F000F, 0x43004300, 0xEA;",
            f"lop3.b32 h, {high}, 0x000F000F, 0x43004300, 0xEA;",
            f"fma.rn.bf16x2 {out}, {out}, ratio0, {offset};",  # 128 + low - zero
            "fma.rn.bf16x2 h, h, ratio0, eight;",  # high - 8
            f"fma.rn.bf16x2 {out}, h, sixteen, {out};",
        ]
    return lines


def _quad_lines(bits: int, planes: Planes, words: Sequence[str]) -> list[str]:
    """Four codes of one int8 operand register each: a mask, and an OR where planes are two."""
    low_bits = low_bits_of(bits)
    per_word = 8 // low_bits
    lines, temporaries = [], _Shifted(words)
    for quad in range(planes.outputs):
        word, shift = quad // per_word, low_bits * (quad % per_word)
        lines += temporaries.need(word, shift)
        source = temporaries.name(word, shift)
        lines.append(f"and.b32 ${quad}, {source}, {_four_times(2**low_bits - 1)};")
        if bits > low_bits:
            high_bits = bits - low_bits
            high_word = planes.count - 1 if high_bits == 1 else 4 + quad // 4
            start = quad if high_bits == 1 else 2 * (quad % 4)
            lines += temporaries.need(high_word, start - low_bits)
            source = temporaries.name(high_word, start - low_bits)
            mask = _four_times((2**high_bits - 1) << low_bits)
            lines.append(f"lop3.b32 ${quad}, {source}, {mask}, ${quad}, 0xEA;")
    return [*temporaries.declaration(), *lines]


class _Shifted:
    """Temporaries that hold shifted words, each computed once."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._names: dict[tuple[int, int], str] = {}

    def need(self, word: int, shift: int) -> list[str]:
        """The line that computes a shifted word, if it is the first to ask for it."""
        if shift == 0 or (word, shift) in self._names:
            return []
        name = f"s{len(self._names)}"
        self._names[word, shift] = name
        operation = "shr" if shift > 0 else "shl"
        return [f"{operation}.b32 {name}, {self._words[word]}, {abs(shift)};"]

    def name(self, word: int, shift: int) -> str:
        return self._words[word] if shift == 0 else self._names[word, shift]

    def declaration(self) -> list[str]:
        names, most = list(self._names.values()), _NAMES_ON_A_LINE
        rows = (names[start : start + most] for start in range(0, len(names), most))
        return [f".reg .b32 {', '.join(row)};" for row in rows]


def _asm_call(asm: Sequence[str], args: Sequence[str], results: int) -> list[str]:
    """The call, and its results joined in order into words ``w``."""
    names = [f"r{index}" for index in range(results)]
    constraints = ",".join(["=&r"] * results + ["r"] * len(args))
    return [
        *_target_lines(names),
        '    asm="""{',
        *(f"        {line}" for line in asm),
        '    }""",',
        f'    constraints="{constraints}",',
        f"    args=[{', '.join(args)}],",
        *_dtype_lines(results),
        "    is_pure=True,",
        "    pack=1,",
        ")",
        *join_lines(names),
    ]


_PAIR_LINES = (
    "low = w.to(tl.int16).to(tl.bfloat16, bitcast=True)",
    "high = (w >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)",
    "w = tl.join(low, high)",
)
_QUAD_LINES = (
    "even = tl.join(w.to(tl.int8), (w >> 16).to(tl.int8))",
    "odd = tl.join((w >> 8).to(tl.int8), (w >> 24).to(tl.int8))",
    "w = tl.join(even, odd)",
)
# The compiler sees that a register is taken apart and put together again, and does neither.


def _order_lines(planes: Planes, results: int, side: int) -> list[str]:
    """From (row, thread, word, result, code) to (row, k), ``side`` codes beside each other."""
    shape = f"(128, 4, {planes.words // 4}, {results}, {side})"
    return [
        f"w = tl.permute(tl.reshape(w, {shape}), (0, 2, 3, 1, 4))",
        "return tl.reshape(w, (128, 128))",
    ]


def _target_lines(names: Sequence[str]) -> list[str]:
    """Start of the call, with as many names on a line as fit."""
    call = "tl.inline_asm_elementwise("
    if len(names) <= _TARGETS_ON_A_LINE:
        return [f"{', '.join(names)} = {call}"]
    return ["(", *[f"    {name}," for name in names], f") = {call}"]


def _dtype_lines(results: int) -> list[str]:
    if results == 1:
        return ["    dtype=tl.int32,"]
    if results <= _TYPES_ON_A_LINE:
        return [f"    dtype=({', '.join(['tl.int32'] * results)}),"]
    return ["    dtype=(", *["        tl.int32,"] * results, "    ),"]


def _offset_lines(field: int, planes: Planes) -> list[str]:
    """The offset of fields at that bit, for both halves of a word: -(2**(7-f) + zero)."""
    shift = 128.0 - 2.0 ** (MANTISSA_BITS - field)
    value = "offset" if shift == 0.0 else f"(offset + {shift})"
    return [
        f"half{field} = {value}.to(tl.uint16, bitcast=True).to(tl.int32)",
        f"offset{field} = tl.broadcast_to(half{field} * 0x10001, (128, {planes.words}))",
    ]


def _twice(mask: int) -> str:
    return f"0x{mask:04X}{mask:04X}"


def _four_times(mask: int) -> str:
    return f"0x{f'{mask:02X}' * 4}"


def _bf16_twice(value: float) -> str:
    """Two bfloat16 of a value that bfloat16 holds exactly, as the bits of a register."""
    bits = struct.unpack(">I", struct.pack(">f", value))[0]
    assert bits & 0xFFFF == 0, f"{value} is not a bfloat16"
    return _twice(bits >> 16)

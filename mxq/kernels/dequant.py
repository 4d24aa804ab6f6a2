"""Text of the device functions that turn packed words into matrix operands, in two dialects.

A word holds codes of one thread of the matrix instruction (see ``mxq.kernels.layout``), so a mask
and an OR give a register that already is a pair of bfloat16 or four int8 of its operand.

bfloat16 has 7 bits below its leading one, so ``0x4300 | q << f`` is the number ``128 + q * 2**f``
for any field that ends below bit 7. One fused multiply-add then gives ``q - zero`` exactly:
``(128 + q * 2**f) * 2**-f + offset``, with the offset ``-(2**(7-f) + zero)``. Every value on the
way is an integer below 256, which bfloat16 holds.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mxq.kernels.spec import Dialect, WeightFormat

_MANTISSA_BITS = 7
_PAIRS, _QUADS = 16, 8  # of a thread in one row of a unit: 128 codes / 4 threads, by 2 or by 4


@dataclass(frozen=True, slots=True)
class Planes:
    """How the packed rows of a unit are loaded: ``count`` tensors of ``width`` bytes a row.

    Each asm call takes one word of every plane and makes ``outputs`` tensors of 4 values.
    """

    count: int
    width: int
    outputs: int


def planes_of(form: WeightFormat) -> Planes:
    """The planes of a format whose codes have to be unpacked."""
    bits = form.w_bits
    values = 4 * _QUADS  # of one row and thread in a unit
    if bits in (3, 5, 6):
        return Planes(bits, 16, values // 4)
    return Planes(1, 16 * bits, values // bits // 4)


def function_name(form: WeightFormat) -> str:
    """Name of the device function that unpacks a format."""
    kind = "int8" if form.arithmetic == "int8" else "centred" if takes_offset(form) else "raised"
    return f"unpack_w{form.w_bits}_{kind}"


def takes_offset(form: WeightFormat) -> bool:
    """Whether the zero point is taken off while unpacking, at no cost beside it.

    A word must belong to one group, and the words of a row to one tensor: Triton would move the
    zeros of several planes through shared memory.
    """
    if form.arithmetic == "int8":
        return False
    return form.group_size is None or (form.group_size == 128 and planes_of(form).count == 1)


def render_unpack(form: WeightFormat, dialect: Dialect) -> str:
    """The device function that unpacks planes, [128, 128] in logical order.

    "centred": ``(planes..., offset) -> code - zero`` in bfloat16, with ``offset`` [128, 1] of
    ``-(128 + zero)``, or ``-zero`` for 8 bits. "raised": ``(planes...) -> 128 + code``, or
    ``code`` for 8 bits. "int8": ``(planes...) -> code``.
    """
    if dialect != "ptx":
        return _render_plain(form)
    return _render_ptx_int8(form) if form.arithmetic == "int8" else _render_ptx_bf16(form)


def _render_ptx_bf16(form: WeightFormat) -> str:
    planes = planes_of(form)
    pairs = _bf16_pairs(form.w_bits, planes)
    fields = sorted({pair.field for pair in pairs})
    regs = 2 * planes.outputs
    words = [f"${regs + index}" for index in range(planes.count)]
    names = [f"x{index}" for index in range(planes.count)]
    offset_of = {f: f"offset{f}" for f in fields}
    if takes_offset(form):
        # Operands follow the outputs: the words, then two registers for each offset.
        offset_of = {f: f"${regs + planes.count + 2 * i}" for i, f in enumerate(fields)}
    asm = [
        *_constant_lines(form, fields),
        *(
            _wide_code_lines(offset_of[0])
            if form.w_bits == 8
            else _pair_lines(pairs, words, offset_of, skip=not takes_offset(form))
        ),
    ]
    offsets = [_offset_line(f, planes) for f in fields] if takes_offset(form) else []
    args = [*names, *(f"offset{f}" for f in fields if offsets)]
    constraints = ",".join(["=&r"] * regs + ["r"] * (planes.count + 2 * len(offsets)))
    return _FUNCTION.format(
        name=function_name(form),
        parameters=", ".join([*names, "offset"] if offsets else names),
        doc=_doc(form),
        body=_indent(
            [
                *offsets,
                *_asm_call(asm, constraints, args, "tl.bfloat16", planes.outputs),
                *_order_lines(planes, "pairs"),
            ]
        ),
    )


def _render_ptx_int8(form: WeightFormat) -> str:
    planes = planes_of(form)
    names = [f"x{index}" for index in range(planes.count)]
    words = [f"${planes.outputs + index}" for index in range(planes.count)]
    constraints = ",".join(["=&r"] * planes.outputs + ["r"] * planes.count)
    asm = _quad_lines(form.w_bits, planes, words)
    return _FUNCTION.format(
        name=function_name(form),
        parameters=", ".join(names),
        doc=_doc(form),
        body=_indent(
            [
                *_asm_call(asm, constraints, names, "tl.int8", planes.outputs),
                *_order_lines(planes, "quads"),
            ]
        ),
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """Where two neighbouring codes are: ``(word, right shift, mask)`` parts that are ORed.

    After the shifts the code starts at bit ``field`` of each half of the word.
    """

    parts: tuple[tuple[int, int, int], ...]
    field: int


def _bf16_pairs(bits: int, planes: Planes) -> list[_Pair]:
    """The pairs that one asm call makes, in order of k."""
    if bits == 6:
        return [
            _Pair(((p // 4, 4 * (p % 4), 0x0F), (4 + p // 8, 2 * (p % 8) - 4, 0x30)), 0)
            for p in range(_PAIRS)
        ]
    count = 2 * planes.outputs
    fields_per_word = {2: 8, 3: 5, 4: 4, 5: 3, 8: 2}[bits]
    regular = _PAIRS - 1 if planes.count > 1 else count
    pairs = []
    for p in range(regular):
        word, start = p // fields_per_word, bits * (p % fields_per_word)
        shift = _shift_of(start, bits)
        field = start - shift
        pairs.append(_Pair(((word, shift, (2**bits - 1) << field),), field))
    if planes.count > 1:
        # The spare top bit of every word: bit b of the last pair is in word b.
        pairs.append(_Pair(tuple((b, 15 - b, 1 << b) for b in range(bits)), 0))
    return pairs


def _shift_of(start: int, bits: int) -> int:
    """The least shift that fields share and that brings this one below the mantissa's end."""
    per_shift = max(1, _MANTISSA_BITS // bits)
    return start - start % (per_shift * bits)


def _constant_lines(form: WeightFormat, fields: Sequence[int]) -> list[str]:
    """Registers with the ratio of each field, and its offset where that is no operand."""
    lines = []
    for f in fields:
        lines += [f".reg .b32 ratio{f};", f"mov.b32 ratio{f}, {_bf16_twice(2.0**-f)};"]
        if not takes_offset(form):
            value = 0.0 if form.w_bits == 8 else 128.0 - 2.0 ** (_MANTISSA_BITS - f)
            lines += [f".reg .b32 offset{f};", f"mov.b32 offset{f}, {_bf16_twice(value)};"]
    return lines


def _pair_lines(
    pairs: Sequence[_Pair], words: Sequence[str], offset_of: dict[int, str], *, skip: bool
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
    low_bits = {3: 2, 5: 4, 6: 4}.get(bits, bits)
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
        names = ", ".join(self._names.values())
        return [f".reg .b32 {names};"] if names else []


def _render_plain(form: WeightFormat) -> str:
    """The same function on whole words: every code by its own shift and mask."""
    planes = planes_of(form)
    is_int8 = form.arithmetic == "int8"
    names = [f"x{index}" for index in range(planes.count)]
    values = _plain_int8(form.w_bits, planes) if is_int8 else _plain_bf16(form.w_bits, planes)
    lines = [f"v{index} = {value}" for index, value in enumerate(values)]
    joined = _joined([f"v{index}" for index in range(len(values))])
    words = planes.width // 16
    inner = len(values) // (4 if is_int8 else 2)
    shape, order = (
        (f"(128, 4, {words}, {inner}, 4)", "(0, 2, 3, 1, 4)")
        if is_int8
        else (f"(128, 4, {words}, {inner}, 2)", "(0, 2, 3, 1, 4)")
    )
    lines += [
        f"w = tl.permute(tl.reshape({joined}, {shape}), {order})",
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
    return _FUNCTION.format(
        name=function_name(form), parameters=parameters, doc=_doc(form), body=_indent(lines)
    )


def _doc(form: WeightFormat) -> str:
    if form.arithmetic == "int8":
        return f"{form.w_bits}-bit codes, int8 [128, 128]."
    what = "code" if form.w_bits == 8 else "128 + code"
    what = "code - zero" if takes_offset(form) else what
    return f"{form.w_bits}-bit codes as {what}, bfloat16 [128, 128]."


def _plain_bf16(bits: int, planes: Planes) -> list[str]:
    if bits == 8:
        return [f"(x0 >> {8 * p + 16 * e}) & 0xFF" for p in range(2) for e in range(2)]
    values = []
    for pair in _bf16_pairs(bits, planes):
        for e in range(2):
            parts = [
                f"{_right(f'x{word}', shift + 16 * e)} & {mask:#x}"
                for word, shift, mask in pair.parts
            ]
            value = " | ".join(f"({part})" for part in parts)
            values.append(f"({value}) >> {pair.field}" if pair.field else value)
    return values


def _plain_int8(bits: int, planes: Planes) -> list[str]:
    low_bits = {3: 2, 5: 4, 6: 4}.get(bits, bits)
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


def _joined(names: Sequence[str]) -> str:
    """Nested joins whose new last dimensions, in order, count through the names."""
    if len(names) == 1:
        return names[0]
    return f"tl.join({_joined(names[0::2])}, {_joined(names[1::2])})"


def _order_lines(planes: Planes, kind: str) -> list[str]:
    """From (row, thread, word, byte, output) to (row, k)."""
    outputs, words = planes.outputs, planes.width // 16
    joined = _joined([f"r{index}" for index in range(outputs)])
    if kind == "pairs":  # k = 8 * (2 * output + byte // 2) + 2 * thread + byte % 2
        shape, order = f"(128, 4, {words}, 2, 2, {outputs})", "(0, 2, 5, 3, 1, 4)"
    else:  # k = 16 * output + 4 * thread + byte
        shape, order = f"(128, 4, {words}, 4, {outputs})", "(0, 2, 4, 1, 3)"
    return [
        f"w = tl.permute(tl.reshape({joined}, {shape}), {order})",
        "return tl.reshape(w, (128, 128))",
    ]


def _asm_call(
    asm: Sequence[str], constraints: str, args: Sequence[str], dtype: str, outputs: int
) -> list[str]:
    names = ", ".join(f"r{index}" for index in range(outputs))
    dtypes = dtype if outputs == 1 else f"({', '.join([dtype] * outputs)})"
    return [
        f"{names} = tl.inline_asm_elementwise(",
        '    asm="""{',
        *(f"        {line}" for line in asm),
        '    }""",',
        f'    constraints="{constraints}",',
        f"    args=[{', '.join(args)}],",
        f"    dtype={dtypes},",
        "    is_pure=True,",
        "    pack=4,",
        ")",
    ]


def _offset_line(field: int, planes: Planes) -> str:
    """The offset of fields at that bit, as wide as a plane: -(2**(7-f) + zero)."""
    shift = 128.0 - 2.0 ** (_MANTISSA_BITS - field)
    value = "offset" if shift == 0.0 else f"offset + {shift}"
    return f"offset{field} = tl.broadcast_to({value}, (128, {planes.width}))"


_FUNCTION = '''
@triton.jit
def {name}({parameters}):
    """{doc}"""
{body}
'''


def _indent(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _twice(mask: int) -> str:
    return f"0x{mask:04X}{mask:04X}"


def _four_times(mask: int) -> str:
    return f"0x{f'{mask:02X}' * 4}"


def _bf16_twice(value: float) -> str:
    """Two bfloat16 of a value that bfloat16 holds exactly, as the bits of a register."""
    bits = struct.unpack(">I", struct.pack(">f", value))[0]
    assert bits & 0xFFFF == 0, f"{value} is not a bfloat16"
    return _twice(bits >> 16)

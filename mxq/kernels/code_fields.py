"""Where the codes of a unit are in its packed words, for the text that takes them out again.

The counterpart of ``mxq.kernels.layout``, which puts them there; tests hold the two together.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from mxq.kernels.spec import WeightFormat

MANTISSA_BITS = 7
PAIRS, QUADS = 16, 8  # of a thread in one row of a unit: 128 codes / 4 threads, by 2 or by 4


@dataclass(frozen=True, slots=True)
class Planes:
    """How the packed rows of a unit are loaded: ``count`` tensors of ``words`` words a row.

    One word of every plane makes ``4 * outputs`` values.
    """

    count: int
    words: int
    outputs: int


def planes_of(form: WeightFormat) -> Planes:
    """The planes of a format whose codes have to be unpacked."""
    bits = form.w_bits
    values = 4 * QUADS  # of one row and thread in a unit
    if bits in (3, 5, 6):
        return Planes(bits, 4, values // 4)
    return Planes(1, 4 * bits, values // bits // 4)


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


@dataclass(frozen=True, slots=True)
class Pair:
    """Where two neighbouring codes are: ``(word, right shift, mask)`` parts that are ORed.

    After the shifts the code starts at bit ``field`` of each half of the word.
    """

    parts: tuple[tuple[int, int, int], ...]
    field: int


def bf16_pairs(bits: int, planes: Planes) -> list[Pair]:
    """The pairs that one asm call makes, in order of k."""
    if bits == 6:
        return [
            Pair(((p // 4, 4 * (p % 4), 0x0F), (4 + p // 8, 2 * (p % 8) - 4, 0x30)), 0)
            for p in range(PAIRS)
        ]
    count = 2 * planes.outputs
    fields_per_word = {2: 8, 3: 5, 4: 4, 5: 3, 8: 2}[bits]
    regular = PAIRS - 1 if planes.count > 1 else count
    pairs = []
    for p in range(regular):
        word, start = p // fields_per_word, bits * (p % fields_per_word)
        shift = _shift_of(start, bits)
        field = start - shift
        pairs.append(Pair(((word, shift, (2**bits - 1) << field),), field))
    if planes.count > 1:
        # The spare top bit of every word: bit b of the last pair is in word b.
        pairs.append(Pair(tuple((b, 15 - b, 1 << b) for b in range(bits)), 0))
    return pairs


def _shift_of(start: int, bits: int) -> int:
    """The least shift that fields share and that brings this one below the mantissa's end."""
    per_shift = max(1, MANTISSA_BITS // bits)
    return start - start % (per_shift * bits)


def low_bits_of(bits: int) -> int:
    """Bits of a code in the first plane of an int8 layout; the rest is in the last one."""
    return {3: 2, 5: 4, 6: 4}.get(bits, bits)


def join_lines(names: Sequence[str]) -> list[str]:
    """Joins into ``w`` whose new last dimensions, in order, count through the names."""
    lines, letter = [], "a"
    while len(names) > 1:
        half = len(names) // 2
        made = [f"{letter}{index}" for index in range(half)] if half > 1 else ["w"]
        for name, first, second in zip(made, names[:half], names[half:], strict=True):
            lines.append(f"{name} = tl.join({first}, {second})")
        names, letter = made, chr(ord(letter) + 1)
    return lines if names[0] == "w" else [*lines, f"w = {names[0]}"]


def describe(form: WeightFormat) -> str:
    """Docstring of a device function that unpacks."""
    if form.arithmetic == "int8":
        return f"{form.w_bits}-bit codes, int8 [128, 128]."
    what = "code" if form.w_bits == 8 else "128 + code"
    what = "code - zero" if takes_offset(form) else what
    return f"{form.w_bits}-bit codes as {what}, bfloat16 [128, 128]."


FUNCTION = '''
@triton.jit
def {name}({parameters}):
    """{doc}"""
{body}
'''


def indent(lines: Sequence[str]) -> str:
    """Lines of a function's body."""
    return textwrap.indent("\n".join(lines), "    ")

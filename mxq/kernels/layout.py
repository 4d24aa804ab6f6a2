"""Kernel order: where each bit of each code lies, so that a thread reads its own codes in a row.

A weight [N, K] is padded to multiples of 128 both ways and cut into units of 128 inputs. Its bytes
are ``[unit][plane][row][t][word][4]``: lane ``t`` of four holds, in whole words, the codes that it
multiplies. With ``c`` codes side by side in a word (2 for bf16 products, 4 for int8 products) they
come in *runs*: code ``e`` of run ``r`` of lane ``t`` is input ``4*c*r + c*t + e`` of the unit, the
order in which a tensor core takes its first operand. One shift and one mask of a word then give
whole registers of that operand. ``Layout.fields`` is that map as data, read by the functions here
and by the generator of the kernels. Types that need no unpacking are *plain*: 128 bytes of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxq.kernels.spec import UNIT, WeightFormat
from mxq.numerics import QuantizedWeight
from mxq.scheme import WORD_BITS, Scheme

LANES = 4
"""Lanes of a tensor core instruction that share an output row."""

CHUNK_WEIGHTS = 2**20
"""Weights reordered at a time, so that little is needed beside codes and result."""


@dataclass(frozen=True, slots=True)
class Field:
    """``bits`` bits of the codes of a run, from bit ``code_bit`` of each code on.

    They lie in word ``word`` of plane ``plane``, those of code ``e`` at bit
    ``shift + e * Layout.lane_bits``.
    """

    run: int
    code_bit: int
    bits: int
    plane: int
    word: int
    shift: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The kernel order of one weight format.

    A plane has ``words`` words for each row and lane of a unit. ``codes_per_word`` counts codes
    side by side. A plain layout has no fields; its bytes are those of the codes, xor ``flip``.
    """

    name: str
    w_bits: int
    code_dtype: torch.dtype
    codes_per_word: int = 1
    planes: int = 1
    words: int = 8
    fields: tuple[Field, ...] = ()
    flip: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether codes are stored as they are multiplied."""
        return not self.fields

    @property
    def lane_bits(self) -> int:
        """Bits from a code in a word to the next one beside it."""
        return WORD_BITS // self.codes_per_word

    @property
    def runs(self) -> int:
        """Runs of codes that a lane holds of a unit."""
        return UNIT // (LANES * self.codes_per_word)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one row in one plane of a unit (of a step of 128 bytes if plain)."""
        return LANES * self.words * WORD_BITS // 8


def padded(features: int) -> int:
    """The next multiple of 128: rows and inputs as kernels see them."""
    return -(-features // UNIT) * UNIT


def weight_bytes(layout: Layout, out_features: int, in_features: int) -> int:
    """Bytes of a weight in kernel order."""
    return padded(out_features) * padded(in_features) * layout.w_bits // 8


def layout_of(format: WeightFormat, fragment: str = "hopper") -> Layout:
    """Kernel order of a format under the fragment map of a GPU generation.

    Raises:
        ValueError: If there is no such fragment map.
    """
    if fragment not in FRAGMENTS:
        raise ValueError(f"no fragment map {fragment!r}; choose one of {', '.join(FRAGMENTS)}")
    return FRAGMENTS[fragment](format)


def to_kernel_order(codes_NK: Tensor, layout: Layout) -> Tensor:
    """Bytes, uint8, of a weight's codes; padding is code 0.

    Raises:
        ValueError: If the codes are of another type, or too large for the format.
    """
    _check_codes(codes_NK, layout)
    n, k = codes_NK.shape
    codes_NK = codes_NK.contiguous()
    size = weight_bytes(layout, n, k)
    # Code 0 is all zero bits, but for the flip.
    bytes_ = torch.full((size,), layout.flip, dtype=torch.uint8, device=codes_NK.device)
    view = _rows_view(bytes_, layout, n, k)
    for rows in _chunks(n, k):
        codes = torch.nn.functional.pad(codes_NK[rows].view(torch.uint8), _tail(layout, k))
        if layout.is_plain:
            part = (codes ^ layout.flip).reshape(codes.shape[0], -1, UNIT).transpose(0, 1)
        else:
            part = _fill_words(codes, layout)
        view[:, :, rows] = part.reshape(view[:, :, rows].shape)
    return bytes_


def from_kernel_order(
    bytes_: Tensor, layout: Layout, out_features: int, in_features: int
) -> Tensor:
    """Codes [N, K]; inverse of ``to_kernel_order``.

    Raises:
        ValueError: If the bytes are not as many as that shape has.
    """
    n, k = out_features, in_features
    if bytes_.dtype != torch.uint8 or bytes_.numel() != weight_bytes(layout, n, k):
        raise ValueError(
            f"{bytes_.numel()} bytes of {bytes_.dtype} are not a weight [{n}, {k}] in the order "
            f"{layout.name}, which has {weight_bytes(layout, n, k)} bytes of torch.uint8"
        )
    codes_NK = torch.empty(n, k, dtype=layout.code_dtype, device=bytes_.device)
    row_bytes = codes_NK.view(torch.uint8)
    view = _rows_view(bytes_, layout, n, k)
    for rows in _chunks(n, k):
        part = view[:, :, rows]
        if layout.is_plain:
            codes = part[:, 0].transpose(0, 1).flatten(1) ^ layout.flip
        else:
            codes = _read_words(part, layout)
        row_bytes[rows] = codes[:, : row_bytes.shape[1]]
    return codes_NK


def meta_shape(format: WeightFormat, out_features: int, in_features: int) -> tuple[int, int]:
    """Words of metadata, [G, N] padded: a word for each group, or a scale and a zero for a row."""
    if format.w_bits == 16:
        return 0, padded(out_features)
    groups = 2 if format.group_size is None else padded(in_features) // format.group_size
    return groups, padded(out_features)


def pack_meta(q: QuantizedWeight, format: WeightFormat) -> Tensor:
    """Scales and zeros of a weight as kernels read them, int32 [words].

    A group is one word: the float16 scale in the low half; in the high half what is added to a
    code, as bf16, or for int8 products the zero point. A row has two words: scale as float32, zero.
    """
    n, k = q.codes_NK.shape
    meta_GN = torch.zeros(meta_shape(format, n, k), dtype=torch.int32, device=q.codes_NK.device)
    if q.scale_NG is None:
        return meta_GN.flatten()
    zero_NG = _stored_zeros(q, format)
    if format.group_size is None:
        meta_GN[0, :n] = q.scale_NG[:, 0].to(torch.float32).view(torch.int32)
        meta_GN[1, :n] = zero_NG[:, 0]
        return meta_GN.flatten()
    if format.input == "bf16":
        added = (-_magic(format) - zero_NG).to(torch.bfloat16)
        zero_NG = added.view(torch.int16).to(torch.int32)
    low_NG = q.scale_NG.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    meta_GN[: low_NG.shape[1], :n] = (low_NG | (zero_NG << 16)).T
    return meta_GN.flatten()


def unpack_meta(
    meta: Tensor, scheme: Scheme, format: WeightFormat, out_features: int, in_features: int
) -> tuple[Tensor | None, Tensor | None]:
    """Scales float16 [N, G] and zeros uint8 [N, G], None where the scheme has none."""
    n, k = out_features, in_features
    if format.w_bits == 16:
        return None, None
    groups = scheme.groups(k)
    words_NG = meta.reshape(meta_shape(format, n, k))[:, :n].T
    if format.group_size is None:
        scale_NG = words_NG[:, :1].contiguous().view(torch.float32).to(torch.float16)
        zero_NG = words_NG[:, 1:]
    else:
        words_NG = words_NG[:, :groups]
        scale_NG = (words_NG & 0xFFFF).to(torch.int16).view(torch.float16)
        zero_NG = words_NG >> 16
        if format.input == "bf16":
            added = zero_NG.to(torch.int16).view(torch.bfloat16)
            zero_NG = -_magic(format) - added.to(torch.int32)
    if scheme.kind == "fp8" or scheme.symmetric:
        return scale_NG.contiguous(), None
    return scale_NG.contiguous(), (zero_NG + _code_offset(format)).to(torch.uint8).contiguous()


def _magic(format: WeightFormat) -> int:
    """What unpacking leaves on a code: 128, the bf16 whose low bits a code can be or-ed into."""
    return 0 if format.w_bits == 8 else 128


def _code_offset(format: WeightFormat) -> int:
    """What int8 products of 8-bit codes have taken off each code, to fit the type."""
    return 128 if format.w_bits == 8 and format.arithmetic == "int8" else 0


def _stored_zeros(q: QuantizedWeight, format: WeightFormat) -> Tensor:
    """Zero points int32 [N, G] in terms of the stored codes."""
    assert q.scale_NG is not None
    if q.zero_NG is not None:
        return q.zero_NG.to(torch.int32) - _code_offset(format)
    zero = 2 ** (q.scheme.w_bits - 1) if format.is_integer else 0
    stored = zero - _code_offset(format)
    return torch.full_like(q.scale_NG, stored, dtype=torch.int32)


def _check_codes(codes_NK: Tensor, layout: Layout) -> None:
    if codes_NK.dtype != layout.code_dtype or codes_NK.ndim != 2:
        raise ValueError(
            f"the order {layout.name} is of codes [N, K] of {layout.code_dtype}, "
            f"not {list(codes_NK.shape)} of {codes_NK.dtype}"
        )
    # A wider code would be cut to a wrong one, not spill into its neighbour.
    if not layout.is_plain and codes_NK.numel() and int(codes_NK.max()) >= 2**layout.w_bits:
        raise ValueError(f"a code of {int(codes_NK.max())} does not fit in {layout.w_bits} bits")


def _chunks(n: int, k: int) -> list[slice]:
    rows = max(1, CHUNK_WEIGHTS // max(k, 1))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _tail(layout: Layout, k: int) -> tuple[int, int]:
    """Padding of a row of codes, in bytes."""
    return 0, (padded(k) - k) * layout.code_dtype.itemsize


def _rows_view(bytes_: Tensor, layout: Layout, n: int, k: int) -> Tensor:
    """The bytes as [units, planes, rows, ...], int32 words [.., lane, word] unless plain."""
    if layout.is_plain:
        return bytes_.view(-1, 1, padded(n), UNIT)
    units = padded(k) // UNIT
    return bytes_.view(torch.int32).view(units, layout.planes, padded(n), LANES, layout.words)


def _fill_words(codes_NK: Tensor, layout: Layout) -> Tensor:
    """Words int32 [units, planes, N, lane, word] of whole units of codes."""
    side_by_side = _by_run(codes_NK, layout)
    shape = (layout.planes, layout.words, *side_by_side.shape[1:])
    words = torch.zeros(shape, dtype=torch.int32, device=codes_NK.device)
    for field in layout.fields:
        piece = (side_by_side[field.run] >> field.code_bit) & _mask(field, layout)
        words[field.plane, field.word] |= piece << field.shift
    return words.permute(2, 0, 3, 4, 1)


def _read_words(words: Tensor, layout: Layout) -> Tensor:
    """Codes uint8 [N, K] of whole units; inverse of ``_fill_words``."""
    units, _, n, _, _ = words.shape
    by_word = words.permute(1, 4, 0, 2, 3).contiguous()
    shape = (layout.runs, units, n, LANES)
    side_by_side = torch.zeros(shape, dtype=torch.int32, device=words.device)
    for field in layout.fields:
        piece = (by_word[field.plane, field.word] >> field.shift) & _mask(field, layout)
        side_by_side[field.run] |= piece << field.code_bit
    return _by_row(side_by_side, layout)


def _mask(field: Field, layout: Layout) -> int:
    ones = 2**field.bits - 1
    return sum(ones << (layout.lane_bits * e) for e in range(layout.codes_per_word))


def _by_run(codes_NK: Tensor, layout: Layout) -> Tensor:
    """Codes of a run beside each other in an int32, [runs, units, N, lane]."""
    n = codes_NK.shape[0]
    # 8 bytes at a time: a pair of each lane, or a quad of two lanes.
    eights = codes_NK.view(torch.int64).view(n, -1, layout.runs, layout.codes_per_word // 2)
    moved = eights.permute(2, 1, 0, 3).contiguous()
    if layout.codes_per_word == 4:
        return moved.view(torch.int32)
    pairs = moved.view(torch.int16).to(torch.int32)
    return (pairs & 0xFF) | ((pairs & 0xFF00) << 8)


def _by_row(side_by_side: Tensor, layout: Layout) -> Tensor:
    """Inverse of ``_by_run``."""
    n = side_by_side.shape[2]
    if layout.codes_per_word == 2:
        side_by_side = (side_by_side | (side_by_side >> 8)).to(torch.int16)
    eights = side_by_side.view(torch.int64).permute(2, 1, 0, 3)
    return eights.contiguous().view(torch.uint8).view(n, -1)


def _hopper(format: WeightFormat) -> Layout:
    """The order of wgmma, and of mma: its first operand, 16 or 8 bits wide."""
    if not format.is_integer:
        dtype = torch.bfloat16 if format.w_bits == 16 else torch.float8_e4m3fn
        return Layout(f"plain_{format}", format.w_bits, dtype)
    if format.arithmetic == "bf16":
        return _packed("wgmma16", format.w_bits, 2, _pair_fields(format.w_bits))
    if format.w_bits == 8:
        return Layout("plain_int8", 8, torch.uint8, flip=0x80)
    return _packed("wgmma8", format.w_bits, 4, _quad_fields(format.w_bits))


FRAGMENTS: Mapping[str, Callable[[WeightFormat], Layout]] = {"hopper": _hopper}
"""Fragment maps by the GPU generation that they are made for."""


def _packed(name: str, bits: int, codes_per_word: int, fields: tuple[Field, ...]) -> Layout:
    """Powers of two fill one plane; other widths have a plane for each word."""
    words = max(field.word for field in fields) + 1
    if bits in (2, 4, 8):
        return Layout(f"{name}_w{bits}", bits, torch.uint8, codes_per_word, 1, words, fields)
    apart = tuple(replace(field, plane=field.word, word=0) for field in fields)
    return Layout(f"{name}_w{bits}", bits, torch.uint8, codes_per_word, words, 1, apart)


def _pair_fields(bits: int) -> tuple[Field, ...]:
    """Pairs for bf16 products: a half word of 16 bits for each code of a pair."""
    if bits == 6:
        return _fields(4, 0, 16, 16) + _fields(2, 4, 16, 16, first_word=4)
    if bits in (3, 5):
        # Five or three codes leave bit 15 of a half free: it takes a bit of the last pair.
        spare = tuple(Field(15, bit, 1, 0, bit, 15) for bit in range(bits))
        return _fields(bits, 0, 15, 16) + spare
    return _fields(bits, 0, 16, 16)


def _quad_fields(bits: int) -> tuple[Field, ...]:
    """Quads for int8 products: a byte for each code of a quad, so widths are sums of 1, 2, 4."""
    parts = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}[bits]
    fields: tuple[Field, ...] = ()
    for part in parts:
        first_word = max((field.word + 1 for field in fields), default=0)
        code_bit = 0 if not fields else parts[0]
        fields += _fields(part, code_bit, 8, 8, first_word=first_word)
    return fields


def _fields(
    bits: int, code_bit: int, runs: int, lane_bits: int, first_word: int = 0
) -> tuple[Field, ...]:
    """A part of the codes of consecutive runs, as many runs to a word as fit."""
    per_word = lane_bits // bits
    return tuple(
        Field(run, code_bit, bits, 0, first_word + run // per_word, bits * (run % per_word))
        for run in range(runs)
    )

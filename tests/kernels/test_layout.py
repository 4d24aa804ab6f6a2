"""Kernel order: against slow loops over the written map, an emulated kernel, and there and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import SCHEMES, codes_of, random_weight, same_bits

from mxq.kernels.layout import (
    from_kernel_order,
    layout_of,
    meta_shape,
    pack_meta,
    padded,
    to_kernel_order,
    unpack_meta,
    weight_bytes,
)
from mxq.kernels.spec import WeightFormat, format_of
from mxq.numerics import QuantizedWeight
from mxq.scheme import WEIGHT_BITS, Scheme

PACKED = [WeightFormat(bits, "bf16", 128) for bits in WEIGHT_BITS]
PACKED += [WeightFormat(bits, "int8") for bits in WEIGHT_BITS if bits != 8]
PLAIN = [WeightFormat(8, "int8"), WeightFormat(8, "fp8"), WeightFormat(16, "bf16")]

properties = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def run_of(count, first):
    return [first + b for b in range(count)]


# Where bit b of a code lies, as (plane, word, bit of the word): the map as it is written down.
# Pair p of bf16 products has its codes e = 0, 1 in half words, quad o of int8 ones in bytes.
PAIR_BITS = {
    8: lambda p, e: [(0, p // 2, bit) for bit in run_of(8, 8 * (p % 2) + 16 * e)],
    4: lambda p, e: [(0, p // 4, bit) for bit in run_of(4, 4 * (p % 4) + 16 * e)],
    2: lambda p, e: [(0, p // 8, bit) for bit in run_of(2, 2 * (p % 8) + 16 * e)],
    3: lambda p, e: (
        [(p // 5, 0, bit) for bit in run_of(3, 3 * (p % 5) + 16 * e)]
        if p < 15
        else [(b, 0, 15 + 16 * e) for b in range(3)]
    ),
    5: lambda p, e: (
        [(p // 3, 0, bit) for bit in run_of(5, 5 * (p % 3) + 16 * e)]
        if p < 15
        else [(b, 0, 15 + 16 * e) for b in range(5)]
    ),
    6: lambda p, e: (
        [(p // 4, 0, bit) for bit in run_of(4, 4 * (p % 4) + 16 * e)]
        + [(4 + p // 8, 0, bit) for bit in run_of(2, 2 * (p % 8) + 16 * e)]
    ),
}
QUAD_BITS = {
    4: lambda o, e: [(0, o // 2, bit) for bit in run_of(4, 8 * e + 4 * (o % 2))],
    2: lambda o, e: [(0, o // 4, bit) for bit in run_of(2, 8 * e + 2 * (o % 4))],
    3: lambda o, e: (
        [(o // 4, 0, bit) for bit in run_of(2, 8 * e + 2 * (o % 4))] + [(2, 0, 8 * e + o)]
    ),
    5: lambda o, e: (
        [(o // 2, 0, bit) for bit in run_of(4, 8 * e + 4 * (o % 2))] + [(4, 0, 8 * e + o)]
    ),
    6: lambda o, e: (
        [(o // 2, 0, bit) for bit in run_of(4, 8 * e + 4 * (o % 2))]
        + [(4 + o // 4, 0, bit) for bit in run_of(2, 8 * e + 2 * (o % 4))]
    ),
}


def slow_words(codes_NK, form):
    """``{(unit, plane, row, t, word): value}`` by one loop over all codes and their bits."""
    words = {}
    for n, row in enumerate(codes_NK.tolist()):
        for k, code in enumerate(row):
            unit, k_in = divmod(k, 128)
            if form.arithmetic == "bf16":
                p, t, e = k_in // 8, k_in % 8 // 2, k_in % 2
                places = PAIR_BITS[form.w_bits](p, e)
            else:
                o, t, e = k_in // 16, k_in % 16 // 4, k_in % 4
                places = QUAD_BITS[form.w_bits](o, e)
            for b, (plane, word, bit) in enumerate(places):
                key = unit, plane, n, t, word
                words[key] = words.get(key, 0) + ((code >> b & 1) << bit)
    return words


@pytest.mark.parametrize("form", PACKED, ids=str)
def test_words_are_those_of_a_slow_loop_over_the_written_map(form):
    codes_NK = codes_of(form, 3, 200)
    layout = layout_of(form)
    found = np.frombuffer(to_kernel_order(codes_NK, layout).numpy().tobytes(), dtype="<u4")
    found = found.reshape(2, layout.planes, 128, 4, layout.words)
    expected = np.zeros_like(found)
    for place, value in slow_words(codes_NK, form).items():
        expected[place] = value
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", PACKED, ids=str)
def test_the_map_gives_every_bit_of_a_unit_one_place(form):
    layout = layout_of(form)
    codes = [(f.run, f.code_bit + b) for f in layout.fields for b in range(f.bits)]
    places = [
        (f.plane, f.word, f.shift + e * layout.lane_bits + b)
        for f in layout.fields
        for e in range(layout.codes_per_word)
        for b in range(f.bits)
    ]
    assert sorted(codes) == [(r, b) for r in range(layout.runs) for b in range(form.w_bits)]
    sizes = (layout.planes, layout.words, 32)
    assert sorted(places) == list(np.ndindex(*sizes))


@properties
@given(
    st.sampled_from(PACKED + PLAIN), st.integers(1, 300), st.integers(1, 400), st.integers(0, 2**31)
)
def test_any_weight_comes_back_bit_for_bit(form, n, k, seed):
    codes_NK, layout = codes_of(form, n, k, seed), layout_of(form)
    ordered = to_kernel_order(codes_NK, layout)
    assert ordered.numel() == weight_bytes(layout, n, k) == padded(n) * padded(k) * form.w_bits // 8
    assert same_bits(from_kernel_order(ordered, layout, n, k), codes_NK)


@pytest.mark.parametrize("form", PACKED + PLAIN, ids=str)
def test_a_weight_larger_than_a_chunk_comes_back(form, monkeypatch):
    monkeypatch.setattr("mxq.kernels.layout.CHUNK_WEIGHTS", 700)  # 3 rows at a time, then 2
    codes_NK, layout = codes_of(form, 8, 200), layout_of(form)
    in_chunks = to_kernel_order(codes_NK, layout)
    assert same_bits(from_kernel_order(in_chunks, layout, 8, 200), codes_NK)
    monkeypatch.undo()
    assert torch.equal(in_chunks, to_kernel_order(codes_NK, layout))


@pytest.mark.parametrize("form", PACKED + PLAIN, ids=str)
def test_codes_need_not_be_contiguous(form):
    codes_NK = codes_of(form, 130, 6).T
    layout = layout_of(form)
    assert torch.equal(
        to_kernel_order(codes_NK, layout), to_kernel_order(codes_NK.contiguous(), layout)
    )


@pytest.mark.parametrize("form", PACKED, ids=str)
def test_padding_is_code_zero(form):
    layout = layout_of(form)
    whole = from_kernel_order(to_kernel_order(codes_of(form, 130, 140), layout), layout, 256, 256)
    assert not whole[130:].any()
    assert not whole[:, 140:].any()


def test_plain_bytes_by_hand():
    # Code 3 of an int8 product is 3 - 128 = -125, byte 0x83; the unit of input 130 is the second.
    codes_NK = torch.zeros(2, 130, dtype=torch.uint8)
    codes_NK[1, 129] = 3
    ordered = to_kernel_order(codes_NK, layout_of(WeightFormat(8, "int8")))
    assert ordered[128 * 128 + 1 * 128 + 1].item() == 0x83
    assert (ordered == 0x80).sum() == ordered.numel() - 1
    # A bf16 step is 64 inputs of two bytes: input 129 is element 1 of step 2. 1.0 is 0x3F80.
    weight_NK = torch.zeros(2, 130, dtype=torch.bfloat16)
    weight_NK[1, 129] = 1.0
    ordered = to_kernel_order(weight_NK, layout_of(WeightFormat(16, "bf16")))
    place = 2 * 128 * 128 + 1 * 128 + 2
    assert ordered[place : place + 2].tolist() == [0x80, 0x3F]
    assert ordered.count_nonzero() == 2


# --- The kernel's unpacking, emulated: shift and mask of words, then reshape, join and permute. ---


def loaded(form, codes_NK):
    """Words uint32 [N, unit * t * word] of each plane, as a program loads them (N is 128)."""
    layout = layout_of(form)
    ordered = to_kernel_order(codes_NK, layout).numpy().view("<u4")
    units = codes_NK.shape[1] // 128
    planes = ordered.reshape(units, layout.planes, 128, 4 * layout.words)
    return [planes[:, p].transpose(1, 0, 2).reshape(128, -1) for p in range(layout.planes)]


def halves(*registers):
    """16-bit values of registers side by side: the operand of a bf16 product, value for value."""
    return np.stack([part for r in registers for part in (r & 0xFFFF, r >> 16)], -1).reshape(
        128, -1
    )


def quarters(register):
    """The four bytes of each register side by side."""
    return np.stack([(register >> 8 * e) & 0xFF for e in range(4)], -1).reshape(128, -1)


def join(a, b):
    return np.stack([a, b], -1)


def unpack_w8a16(x):
    (r,) = [halves(x & 0x00FF00FF, (x >> 8) & 0x00FF00FF)]
    return r.reshape(128, -1, 4, 16, 2).transpose(0, 1, 3, 2, 4)


def unpack_w4a16(x):
    regs = [(x >> 4 * i) & 0x000F000F for i in range(4)]
    r = join(halves(*regs[:2]), halves(*regs[2:]))
    return r.reshape(128, -1, 4, 4, 2, 2, 2).transpose(0, 1, 3, 6, 4, 2, 5)


def unpack_w2a16(x):
    regs = [(x >> 2 * i) & 0x00030003 for i in range(8)]
    o = [halves(*regs[2 * i : 2 * i + 2]) for i in range(4)]
    r = join(join(o[0], o[2]), join(o[1], o[3]))
    return r.reshape(128, -1, 4, 2, 2, 2, 2, 2).transpose(0, 1, 3, 6, 7, 4, 2, 5)


def unpack_w4a8(x):
    r = join(quarters(x & 0x0F0F0F0F), quarters((x >> 4) & 0x0F0F0F0F))
    return r.reshape(128, -1, 4, 4, 4, 2).transpose(0, 1, 3, 5, 2, 4)


def unpack_w2a8(x):
    o = [quarters((x >> 2 * i) & 0x03030303) for i in range(4)]
    r = join(join(o[0], o[2]), join(o[1], o[3]))
    return r.reshape(128, -1, 4, 2, 4, 2, 2).transpose(0, 1, 3, 5, 6, 2, 4)


SINGLE_PLANE = {
    WeightFormat(8, "bf16", 128): unpack_w8a16,
    WeightFormat(4, "bf16", 128): unpack_w4a16,
    WeightFormat(2, "bf16", 128): unpack_w2a16,
    WeightFormat(4, "int8"): unpack_w4a8,
    WeightFormat(2, "int8"): unpack_w2a8,
}


@pytest.mark.parametrize("form", SINGLE_PLANE, ids=str)
def test_an_emulated_kernel_unpacks_one_plane_to_the_order_of_inputs(form):
    codes_NK = codes_of(form, 128, 256)
    (words,) = loaded(form, codes_NK)
    unpacked = SINGLE_PLANE[form](words).reshape(128, 256)
    np.testing.assert_array_equal(unpacked, codes_NK.numpy())


def spare_bits(w, bits):
    """Pair 15 from bits 15 and 31 of each word."""
    return sum(((w[b] >> (15 - b)) & (0x00010001 << b)) for b in range(bits))


REGISTERS = {  # one register for each run, by the expressions that kernels use
    WeightFormat(3, "bf16", 128): lambda w: [
        *((w[p // 5] >> 3 * (p % 5)) & 0x00070007 for p in range(15)),
        spare_bits(w, 3),
    ],
    WeightFormat(5, "bf16", 128): lambda w: [
        *((w[p // 3] >> 5 * (p % 3)) & 0x001F001F for p in range(15)),
        spare_bits(w, 5),
    ],
    WeightFormat(6, "bf16", 128): lambda w: [
        ((w[p // 4] >> 4 * (p % 4)) & 0x000F000F)
        | (((w[4 + p // 8] >> 2 * (p % 8)) & 0x00030003) << 4)
        for p in range(16)
    ],
    WeightFormat(3, "int8"): lambda w: [
        ((w[o // 4] >> 2 * (o % 4)) & 0x03030303) | (((w[2] >> o) & 0x01010101) << 2)
        for o in range(8)
    ],
    WeightFormat(5, "int8"): lambda w: [
        ((w[o // 2] >> 4 * (o % 2)) & 0x0F0F0F0F) | (((w[4] >> o) & 0x01010101) << 4)
        for o in range(8)
    ],
    WeightFormat(6, "int8"): lambda w: [
        ((w[o // 2] >> 4 * (o % 2)) & 0x0F0F0F0F)
        | (((w[4 + o // 4] >> 2 * (o % 4)) & 0x03030303) << 4)
        for o in range(8)
    ],
}


@pytest.mark.parametrize("form", REGISTERS, ids=str)
def test_registers_of_several_planes_are_the_runs_of_codes(form):
    codes_NK = codes_of(form, 128, 256)
    registers = REGISTERS[form](loaded(form, codes_NK))  # each [N, unit * t]
    split = halves if form.arithmetic == "bf16" else quarters
    runs = [split(r).reshape(128, 2, 4, -1) for r in registers]  # [N, unit, t, e]
    unpacked = np.stack(runs, 2).reshape(128, 256)  # [N, unit, run, t, e]
    np.testing.assert_array_equal(unpacked, codes_NK.numpy())


# --- Scales and zeros ---


@properties
@given(st.sampled_from(SCHEMES), st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**31))
def test_scales_and_zeros_come_back_bit_for_bit(scheme, n, groups, seed):
    k = groups * (scheme.group_size or 50)
    q, form = random_weight(scheme, n, k, seed), format_of(scheme)
    meta = pack_meta(q, form)
    assert meta.dtype == torch.int32
    assert meta.numel() == np.prod(meta_shape(form, n, k))
    scale_NG, zero_NG = unpack_meta(meta, scheme, form, n, k)
    for found, expected in ((scale_NG, q.scale_NG), (zero_NG, q.zero_NG)):
        assert (found is None) == (expected is None)
        assert expected is None or found.dtype == expected.dtype
        assert expected is None or torch.equal(found, expected)


@pytest.mark.parametrize(
    ("text", "zero", "word"),
    [
        # 1.5 is 0x3E00 as float16. -(128 + 5) is -133 = -1.0390625 * 2^7: bf16 0xC305.
        ("w4a16_g128_asym", 5, 0xC3053E00),
        # The zero of a symmetric grid is 2: -(128 + 2) is 0xC302.
        ("w2a16_g128_sym", None, 0xC3023E00),
        # 8 bits are unpacked without the 128: -3 is 0xC040.
        ("w8a16_g128_asym", 3, 0xC0403E00),
        ("w4a8_g128_asym", 5, 0x00053E00),
        ("w8a8_g128_sym", None, 0x00003E00),
    ],
)
def test_the_word_of_a_group_by_hand(text, zero, word):
    scheme = Scheme.parse(text)
    scale_NG = torch.tensor([[1.5]], dtype=torch.float16)
    zero_NG = None if zero is None else torch.tensor([[zero]], dtype=torch.uint8)
    q = QuantizedWeight(torch.zeros(1, 128, dtype=torch.uint8), scale_NG, zero_NG, scheme)
    meta = pack_meta(q, format_of(scheme))
    assert meta.shape == (128,)
    assert meta[0].item() & 0xFFFFFFFF == word
    assert not meta[1:].any()


@pytest.mark.parametrize(
    ("text", "zero", "stored"),
    [
        ("w4a16_grow_asym", 5, 5),
        ("w3a8_grow_sym", None, 4),
        ("w8a8_grow_asym", 5, -123),  # codes are stored 128 less, and so is their zero
        ("w8a8_grow_sym", None, 0),
        ("w8a16_grow_asym", 5, 5),
        ("fp8", None, 0),
    ],
)
def test_the_two_words_of_a_row_by_hand(text, zero, stored):
    scheme = Scheme.parse(text)
    scale_NG = torch.tensor([[1.5]], dtype=torch.float16)
    zero_NG = None if zero is None else torch.tensor([[zero]], dtype=torch.uint8)
    form = format_of(scheme)
    codes_NK = torch.zeros(1, 4, dtype=layout_of(form).code_dtype)
    meta = pack_meta(QuantizedWeight(codes_NK, scale_NG, zero_NG, scheme), form)
    # 1.5 is 0x3FC00000 as float32.
    assert (meta[0].item(), meta[128].item()) == (0x3FC00000, stored)
    assert meta.count_nonzero() == (1 if stored == 0 else 2)


# --- Mistakes ---


def test_an_unknown_fragment_map_says_which_there_are():
    with pytest.raises(ValueError, match="no fragment map 'volta'; choose one of hopper"):
        layout_of(WeightFormat(4, "bf16", 128), "volta")


def test_a_code_that_does_not_fit_is_refused():
    codes_NK = torch.full((1, 8), 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="a code of 4 does not fit in 2 bits"):
        to_kernel_order(codes_NK, layout_of(WeightFormat(2, "bf16", 128)))


def test_codes_of_another_type_are_refused():
    with pytest.raises(ValueError, match=r"plain_fp8 is of codes .* of torch.float8_e4m3fn, not"):
        to_kernel_order(torch.zeros(1, 8, dtype=torch.uint8), layout_of(WeightFormat(8, "fp8")))


def test_bytes_of_another_shape_are_refused():
    layout = layout_of(WeightFormat(4, "bf16", 128))
    with pytest.raises(ValueError, match=r"are not a weight \[8, 129\] in the order wgmma16_w4"):
        from_kernel_order(torch.zeros(64 * 128, dtype=torch.uint8), layout, 8, 129)

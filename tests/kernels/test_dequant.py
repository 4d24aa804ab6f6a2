"""Unpacking: the generated PTX and the plain text, run by an emulator on bytes in kernel order.

Expected values are the codes that were packed: every width, every operand type, every group form.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import Emulator, Value, bf16_bits, bf16_values, fused, parse_asm

from mxq.kernels.branches import needs_unpack
from mxq.kernels.code_fields import function_name, planes_of, takes_offset
from mxq.kernels.codegen import render
from mxq.kernels.dequant import render_unpack
from mxq.kernels.layout import layout_of, to_kernel_order
from mxq.kernels.spec import TILE_PLANS, WeightFormat, make_spec
from mxq.scheme import WEIGHT_BITS

GROUPS = (32, 64, 128, None)
FORMS = [WeightFormat(bits, "bf16", group) for bits in WEIGHT_BITS for group in GROUPS]
FORMS += [WeightFormat(bits, "int8", group) for bits in WEIGHT_BITS for group in (128, None)]
FORMS = [form for form in FORMS if needs_unpack(form)]
# Formats that share a device function are one case.
FUNCTIONS = {function_name(form): form for form in FORMS}
CENTRED = [form for form in FUNCTIONS.values() if takes_offset(form)]
RAISED = [form for form in FUNCTIONS.values() if not takes_offset(form)]  # or as they are: int8


def codes_of(form, kind):
    """Codes [128, 128]: random ones, or every code at every place of a row as rows go by."""
    if kind == "random":
        generator = torch.Generator().manual_seed(form.w_bits)
        return torch.randint(2**form.w_bits, (128, 128), generator=generator).to(torch.uint8)
    start = torch.arange(128)[:, None] + (128 if kind == "rising from 128" else 0)
    return ((start + torch.arange(128)) % 2**form.w_bits).to(torch.uint8)


def loaded(form, codes_NK):
    """The planes of one unit as a program loads them, in words."""
    planes = planes_of(form)
    packed = to_kernel_order(codes_NK, layout_of(form)).numpy()
    rows = packed.view("<i4").reshape(planes.count, 128, planes.words)
    return [Value(rows[i], "int32") for i in range(planes.count)]


def unpacked(form, codes_NK, zero_N, dialect):
    """What the device function makes of packed codes, as integers [128, 128]."""
    functions = Emulator().load(render_unpack(form, dialect))
    arguments = loaded(form, codes_NK)
    if takes_offset(form):
        offset_N = -(zero_N + (0 if form.w_bits == 8 else 128))
        arguments.append(Value(bf16_bits(offset_N), "bf16")[:, None])
    w = functions[function_name(form)](*arguments)
    assert w.shape == (128, 128)
    assert w.dtype == ("int8" if form.arithmetic == "int8" else "bf16")
    return w.bits.astype(int) if w.dtype == "int8" else bf16_values(w.bits)


@pytest.mark.parametrize("dialect", ["ptx", "plain"])
@pytest.mark.parametrize("kind", ["random", "rising", "rising from 128"])
@pytest.mark.parametrize("form", RAISED, ids=function_name)
def test_codes_come_out_as_they_were_packed(form, kind, dialect):
    codes_NK = codes_of(form, kind)
    raised = 128 if form.arithmetic == "bf16" and form.w_bits != 8 else 0
    found = unpacked(form, codes_NK, None, dialect)
    np.testing.assert_array_equal(found, codes_NK.numpy().astype(int) + raised)


@pytest.mark.parametrize("dialect", ["ptx", "plain"])
@pytest.mark.parametrize("form", CENTRED, ids=function_name)
def test_every_zero_point_is_taken_off_every_code(form, dialect):
    # Rows have the zero points 0, 1, ... in turn, and each row has every code of up to 7 bits.
    for first in range(0, 2**form.w_bits, 128):
        zero_N = (np.arange(128) + first) % 2**form.w_bits
        for kind in ("random", "rising", "rising from 128"):
            codes_NK = codes_of(form, kind)
            expected = codes_NK.numpy().astype(int) - zero_N[:, None]
            np.testing.assert_array_equal(unpacked(form, codes_NK, zero_N, dialect), expected)


@pytest.mark.parametrize("form", FUNCTIONS.values(), ids=function_name)
def test_an_output_never_takes_the_register_of_an_input_that_is_still_needed(form):
    emulator = Emulator()
    functions = emulator.load(render_unpack(form, "ptx"))
    arguments = loaded(form, codes_of(form, "random"))
    if takes_offset(form):
        arguments.append(Value(np.zeros((128, 1), np.uint16), "bf16"))
    functions[function_name(form)](*arguments)
    (asm,) = emulator.asms
    assert set(asm.must_be_early) <= set(asm.marked_early)


def test_formats_that_share_a_function_unpack_alike():
    for form in FORMS:
        same = FUNCTIONS[function_name(form)]
        for dialect in ("ptx", "plain"):
            assert render_unpack(form, dialect) == render_unpack(same, dialect)


# --- The arithmetic that branches share, in PTX ---

HELPED = make_spec(
    [WeightFormat(3, "bf16", 64), WeightFormat(4, "int8", 128)], TILE_PLANS[0], dialect="ptx"
)


def helper(name):
    emulator = Emulator()
    return emulator, emulator.load(render(HELPED))[name]


def as_torch(value):
    return torch.from_numpy(value.bits.astype(np.int16)).view(torch.bfloat16)


def test_scales_are_multiplied_with_one_rounding():
    generator = torch.Generator().manual_seed(0)
    # Products of two bfloat16 are exact in float32, so torch rounds once here.
    w = torch.randint(-255, 256, (128, 128), generator=generator).to(torch.bfloat16)
    patterns = torch.randint(1, 0x7C00, (128, 1), generator=generator)
    patterns |= torch.randint(2, (128, 1), generator=generator) << 15  # its sign, which 0 takes too
    scale = patterns.to(torch.int16).view(torch.float16).to(torch.bfloat16)
    emulator, scale_bf16 = helper("scale_bf16")
    arguments = [Value(x.view(torch.int16).numpy().view(np.uint16), "bf16") for x in (w, scale)]
    found, expected = as_torch(scale_bf16(*arguments)), w * scale.float()
    assert torch.equal(found.view(torch.int16), expected.to(torch.bfloat16).view(torch.int16))
    assert emulator.asms[0].must_be_early == []


def test_offsets_are_added_to_every_raised_code():
    raised = Value(bf16_bits(128 + np.arange(128)[None, :] + np.zeros((128, 1))), "bf16")
    offset = Value(bf16_bits(-(128 + np.arange(128)))[:, None], "bf16")
    emulator, add_bf16 = helper("add_bf16")
    expected = np.arange(128)[None, :] - np.arange(128)[:, None]
    np.testing.assert_array_equal(bf16_values(add_bf16(raised, offset).bits), expected)
    assert emulator.asms[0].must_be_early == []


def test_zero_points_are_subtracted_from_four_codes_at_a_time_without_a_borrow():
    # All pairs of a code and a zero point of 6 bits; neighbours differ, so a borrow would show.
    codes = np.tile(np.arange(128) % 64, (128, 1)).astype(np.int8)
    zero_N = (np.arange(128) % 64).astype(np.int8)
    emulator, subtract_int8 = helper("subtract_int8")
    found = subtract_int8(Value(codes, "int8"), Value(zero_N, "int8")).bits
    np.testing.assert_array_equal(found, codes.astype(int) - zero_N[:, None])
    (asm,) = emulator.asms
    assert asm.must_be_early == asm.marked_early == ["$0"]


# --- The emulator itself ---


def nearest_bf16(exact):
    """The bfloat16 nearest to a fraction, ties to the even bit pattern, among all finite ones."""
    bits = np.concatenate([np.arange(0x7F80), 0x8000 + np.arange(0x7F80)])
    values = bf16_values(bits)
    near = np.argsort(np.abs(values - float(exact)), kind="stable")[:6]
    key = lambda i: (abs(Fraction(float(values[i])) - exact), bits[i] & 1)  # noqa: E731
    return values[min(near, key=key)]


def test_the_emulated_multiply_add_rounds_once():
    rng = np.random.default_rng(0)
    # Exponents near each other give ties, far ones sums that float64 does not hold.
    mantissas, exponents = rng.integers(0, 128, (3, 300)), rng.integers(-30, 31, (3, 300))
    signs = rng.integers(0, 2, (3, 300))
    exponents[:, :150] //= 10
    bits = (signs << 15) | ((exponents + 127) << 7) | mantissas
    a, b, c = bf16_values(bits)
    found = bf16_values(bf16_bits(fused(a, b, c)))
    for i in range(300):
        exact = Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i])
        assert found[i] == nearest_bf16(exact), (a[i], b[i], c[i])


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1 + 2**-8, 0x3F80),  # a tie: to the even one, 1
        (1 + 3 * 2**-8, 0x3F82),
        (2.0**-134, 0x0000),  # half of the least subnormal number
        (-(2.0**-133), 0x8001),
        (-0.0, 0x8000),
        (3.3e38, 0x7F78),
    ],
)
def test_bits_of_bf16_by_hand(value, bits):
    assert bf16_bits(value) == bits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ mov.b32 a, 1; mov.b32 $0, a; }", "mov.b32 a, 1"),
        ("{ .reg .b32 a; mov.b32 $0, a; }", "a is read before"),
        ("{ .reg .b32 a; mov.b32 a, $1; }", "never written"),
    ],
)
def test_a_wrong_text_is_refused_by_the_emulator(text, message):
    with pytest.raises(AssertionError, match=message):
        parse_asm(text, "=r,r")


def test_the_emulator_finds_an_output_that_would_overwrite_an_input():
    asm = parse_asm("{ mov.b32 $0, 1; sub.u32 $0, $0, $1; }", "=r,r")
    assert asm.must_be_early == ["$0"]
    assert parse_asm("{ sub.u32 $0, $1, 1; }", "=r,r").must_be_early == []

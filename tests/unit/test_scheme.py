"""Schemes: one spelling each, storage counted by hand, and what is refused."""

import re
from itertools import product

import pytest

from mxq.scheme import ACTIVATION_BITS, GROUP_SIZES, WEIGHT_BITS, Scheme, parse_schemes

SPELLINGS = [
    f"w{w}a{a}_g{group}_{grid}"
    for w, a, group, grid in product(
        WEIGHT_BITS, ACTIVATION_BITS, (*GROUP_SIZES, "row"), ("sym", "asym")
    )
    if w <= a
]


def test_there_are_as_many_integer_schemes_as_counted_by_hand():
    # Weights of 2, 3, 4 bits go with 3 widths of activations, 5, 6, 8 with two: 15 pairs; times
    # 4 groups, times 2 grids.
    assert len(SPELLINGS) == 15 * 4 * 2


@pytest.mark.parametrize("text", [*SPELLINGS, "fp8", "bf16"])
def test_every_spelling_round_trips(text):
    assert str(Scheme.parse(text)) == text


def test_fields_of_a_spelling_by_hand():
    assert Scheme.parse("w3a8_grow_sym") == Scheme(3, 8, None, symmetric=True)
    assert Scheme.parse("w4a16_g64_asym") == Scheme(4, 16, 64, symmetric=False)
    assert Scheme.parse("fp8") == Scheme(8, 8, None, symmetric=True, kind="fp8")


def test_an_integer_scheme_is_not_the_float_scheme_of_the_same_numbers():
    assert Scheme.parse("w8a8_grow_sym") != Scheme.parse("fp8")


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        # 2 rows x (256 codes x 4 bit + 2 groups x (16-bit scale + 4-bit zero)) = 2 x 1064
        ("w4a16_g128_asym", (2, 256), 2128),
        # 3 rows x (64 codes x 3 bit + 2 groups x 16-bit scale) = 3 x 224
        ("w3a16_g32_sym", (3, 64), 672),
        # 5 rows x (7 codes x 8 bit + 1 group x (16 + 8)) = 5 x 80
        ("w8a8_grow_asym", (5, 7), 400),
        # a group that is only begun is stored: 1 row x (65 x 2 + 2 groups x (16 + 2))
        ("w2a16_g64_asym", (1, 65), 166),
        # 2 rows x (10 codes x 8 bit + 16-bit scale)
        ("fp8", (2, 10), 192),
        ("bf16", (3, 5), 240),
    ],
)
def test_storage_bits_by_hand(text, shape, bits):
    assert Scheme.parse(text).storage_bits(*shape) == bits


def test_activation_bits_store_nothing():
    plain, rounded = Scheme.parse("w4a16_g32_sym"), Scheme.parse("w4a4_g32_sym")
    assert plain.storage_bits(8, 64) == rounded.storage_bits(8, 64)


def test_groups_divide_or_do_not():
    assert Scheme.parse("w4a16_g64_asym").fits(192)
    assert not Scheme.parse("w4a16_g128_asym").fits(192)
    assert all(Scheme.parse(text).fits(191) for text in ("w4a16_grow_asym", "fp8", "bf16"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w7a16_g128_asym", "weight bits of 7 is not supported; choose one of 2, 3, 4, 5, 6, 8"),
        ("w4a6_g128_asym", "activation bits of 6 is not supported; choose one of 4, 8, 16"),
        ("w4a16_g48_sym", "group size of 48 is not supported; choose one of 32, 64, 128, row"),
        ("w8a4_grow_sym", "weights of 8 bits need activations of at least that"),
    ],
)
def test_refused_fields_are_named_with_the_menu(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "w4", "W4A16_G128_ASYM", "w4a16_g128", "w4a16_g32_sym ", "fp16", "w-4a16_g32_sym"],
)
def test_wrong_spellings_are_shown_the_form(text):
    with pytest.raises(ValueError, match=r"is not of the form w<bits>a<bits>_g<size\|row>") as e:
        Scheme.parse(text)
    assert str(e.value).startswith(f"scheme {text!r} ")


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_float_formats_have_no_options(kind):
    with pytest.raises(ValueError, match=rf"{kind} has no options; write Scheme.parse\('{kind}'\)"):
        Scheme(8, 16, None, symmetric=True, kind=kind)


def test_lists_of_schemes_are_sorted_and_each_once():
    found = parse_schemes(" w8a16_g128_sym,w4a16_g128_asym , w8a16_g128_sym,")
    assert [str(scheme) for scheme in found] == ["w4a16_g128_asym", "w8a16_g128_sym"]
    assert parse_schemes(["w8a16_g128_sym", "w4a16_g128_asym"]) == found


@pytest.mark.parametrize("texts", ["", " , ", []])
def test_an_empty_list_of_schemes_is_refused(texts):
    with pytest.raises(ValueError, match=r"no scheme given; name at least one, e\.g\. 'w4a"):
        parse_schemes(texts)


def test_a_row_sorts_before_groups_and_wide_groups_before_narrow_ones():
    row, wide, narrow = "w4a16_grow_asym", "w4a16_g128_asym", "w4a16_g32_asym"
    found = parse_schemes([narrow, "w5a16_grow_asym", row, wide])
    assert [str(scheme) for scheme in found] == [row, wide, narrow, "w5a16_grow_asym"]


def test_schemes_of_all_kinds_and_groups_sort_without_error():
    # None and int do not compare in Python: a row and a group scheme of the same bits must.
    assert len(parse_schemes([*SPELLINGS, "fp8", "bf16"])) == len(SPELLINGS) + 2

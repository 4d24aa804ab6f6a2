"""Formats, refusals and tile plans: what a kernel is made of."""

import pytest

from mxq.kernels.spec import (
    TILE_PLANS,
    Branch,
    KernelSpec,
    WeightFormat,
    format_of,
    make_spec,
    single_specs,
    stages,
    tile_plan,
)
from mxq.scheme import Scheme

DECODE, MIDDLE, PREFILL = TILE_PLANS
BF16 = WeightFormat(16, "bf16")
W4 = WeightFormat(4, "bf16", 128)
W8A8 = WeightFormat(8, "int8")


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("w4a16_g128_asym", "w4a16_g128"),
        ("w4a16_g128_sym", "w4a16_g128"),
        ("w3a16_grow_asym", "w3a16_grow"),
        ("w8a8_grow_sym", "w8a8_grow"),
        ("w4a4_grow_sym", "w4a4_grow"),
        ("w2a8_g128_asym", "w2a8_g128"),
        ("fp8", "fp8"),
        ("bf16", "bf16"),
    ],
)
def test_a_format_is_its_scheme_without_the_symmetry(scheme, form):
    assert str(format_of(Scheme.parse(scheme))) == form


def test_four_bit_inputs_are_computed_as_int8():
    assert format_of(Scheme.parse("w4a4_grow_sym")).arithmetic == "int8"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            "w4a8_g32_asym",
            "no kernel computes w4a8_g32_asym: integer products are rescaled once for 128 inputs; "
            "use g128 or grow with 4- and 8-bit inputs",
        ),
        (
            "w8a8_g128_asym",
            "no kernel computes w8a8_g128_asym: code minus zero does not fit in int8; use a "
            "symmetric grid or grow",
        ),
    ],
)
def test_a_scheme_without_kernel_is_refused_with_the_reason_and_a_way_out(scheme, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        format_of(Scheme.parse(scheme))
    assert str(caught.value) == message


def test_bytes_of_a_step_by_hand():
    # 128 codes of 4 bits; 64 bfloat16, which take half a unit in a step
    assert (W4.step, W4.step_bytes) == (128, 64)
    assert (BF16.step, BF16.step_bytes) == (64, 128)


@pytest.mark.parametrize(
    ("form", "plan", "shared_kib", "depth"),
    [
        # weights 128 x 128 B and tokens 16 x 64 x 2 B are 18 KiB; 60 KiB hold 3 steps
        (BF16, DECODE, 227, 3),
        # 128 x 64 B and 16 x 128 x 2 B are 12 KiB: 4 fit
        (W4, DECODE, 227, 4),
        # 128 x 128 B and 128 x 128 B are 32 KiB; 112 KiB hold 3, half of 99 KiB holds 1
        (W8A8, PREFILL, 227, 3),
        (W8A8, PREFILL, 99, 2),
        # 8 KiB and 64 x 128 x 2 B are 24 KiB: 4 in 96 KiB, 3 in half of 163 KiB
        (W4, MIDDLE, 227, 4),
        (W4, MIDDLE, 163, 3),
    ],
)
def test_a_pipeline_is_as_deep_as_its_bytes_allow(form, plan, shared_kib, depth):
    assert stages(form, plan, shared_kib * 1024) == depth


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [(1.0, "decode"), (24.0, "decode"), (24.1, "middle"), (96.0, "middle"), (97.0, "prefill")],
)
def test_the_plan_follows_the_tokens_of_an_expert(tokens, plan):
    assert tile_plan(tokens).name == plan


def test_a_kernel_has_one_branch_for_each_format_once():
    spec = make_spec([W8A8, W4, W4, BF16], DECODE)
    assert [str(branch) for branch in spec.branches] == [
        "w4a16_g128/16",
        "w8a8_grow/16",
        "bf16/16",
    ]
    assert spec.inputs == ("bf16", "int8")


def test_single_kernels_hold_all_tile_shapes_of_their_format():
    branches = (Branch(W4, 16, 4), Branch(W8A8, 16, 3), Branch(W4, 32, 3))
    singles = single_specs(KernelSpec(branches, num_warps=4))
    assert [spec.branches for spec in singles] == [(branches[0], branches[2]), (branches[1],)]


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ((), "a kernel needs at least one branch"),
        ((Branch(W4, 16, 4), Branch(W4, 16, 3)), "a branch is there twice: w4a16_g128/16"),
    ],
    ids=["none", "twice"],
)
def test_a_kernel_without_branches_or_with_one_twice_is_refused(branches, message):
    with pytest.raises(ValueError, match=message):
        KernelSpec(branches, num_warps=4)

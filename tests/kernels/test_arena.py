"""The arena: what goes in comes out bit for bit, the table by hand, mistakes named."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import SCHEMES, random_weight, same_bits

from mxq.kernels.arena import (
    PROBLEM_FIELDS,
    Problem,
    WeightSize,
    bias_of,
    group_weights,
    size_of,
    weight_of,
)
from mxq.kernels.spec import WeightFormat
from mxq.scheme import Scheme


def weight(text, n=5, k=128, seed=0):
    return random_weight(Scheme.parse(text), n, k, seed)


def grouped(problems):
    return group_weights(problems, [size_of(problem.weight) for problem in problems])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from(SCHEMES), st.integers(1, 140), st.booleans()), min_size=1),
    st.sampled_from([128, 256, 384]),
    st.integers(0, 2**31),
)
def test_any_weights_and_biases_come_back_bit_for_bit(cases, k, seed):
    problems = []
    for expert, (scheme, n, has_bias) in enumerate(cases):
        bias_N = torch.arange(n) + float(expert) if has_bias else None
        q = random_weight(scheme, n, k, seed + expert)
        problems.append(Problem(q, expert=expert, bias=bias_N))
    group = grouped(problems)
    for index, problem in enumerate(problems):
        back = weight_of(group, index)
        assert back.scheme == problem.weight.scheme
        for name in ("codes_NK", "scale_NG", "zero_NG"):
            mine, found = getattr(problem.weight, name), getattr(back, name)
            assert (mine is None) == (found is None), name
            assert mine is None or same_bits(mine, found), name
        bias_N = bias_of(group, index)
        assert (bias_N is None) == (problem.bias is None)
        assert bias_N is None or torch.equal(bias_N, problem.bias)


@pytest.mark.parametrize("k", [1, 50, 130])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size is None], ids=str)
def test_rows_need_no_multiple_of_128_inputs(scheme, k):
    q = random_weight(scheme, 3, k)
    back = weight_of(grouped([Problem(q)]), 0)
    assert same_bits(back.codes_NK, q.codes_NK)


def test_the_problem_table_by_hand():
    gate = Problem(weight("w4a16_g128_asym", n=130, k=256), column=0, expert=7)
    up = Problem(weight("w8a8_grow_sym", n=130, k=256), column=130, expert=7, bias=torch.ones(130))
    last = Problem(weight("fp8", n=1, k=256), column=4, expert=2, bias=torch.ones(1))
    group = grouped([gate, up, last])
    # 256 x 256 codes of 4 bits are 32768 bytes, of 8 bits 65536; [2 groups or 2 words, 256] meta.
    assert [dict(zip(PROBLEM_FIELDS, row, strict=True)) for row in group.problems.tolist()] == [
        {"w_off": 0, "meta_off": 0, "n": 130, "n_pad": 256, "k_pad": 256}
        | {"column": 0, "expert": 7, "bias_off": -1},
        {"w_off": 32768, "meta_off": 512, "n": 130, "n_pad": 256, "k_pad": 256}
        | {"column": 130, "expert": 7, "bias_off": 0},
        {"w_off": 98304, "meta_off": 1024, "n": 1, "n_pad": 128, "k_pad": 256}
        | {"column": 4, "expert": 2, "bias_off": 256},
    ]
    assert group.words.numel() == 98304 + 128 * 256
    assert group.meta.numel() == 1024 + 2 * 128
    assert group.bias.tolist() == [1.0] * 130 + [0.0] * 126 + [1.0] + [0.0] * 127
    w4, w8, fp8 = WeightFormat(4, "bf16", 128), WeightFormat(8, "int8"), WeightFormat(8, "fp8")
    assert group.formats == tuple(sorted([w4, w8, fp8]))
    assert [group.formats[i] for i in group.format_index.tolist()] == [w4, w8, fp8]
    assert (group.out_features, group.in_features) == (260, 256)
    assert group.schemes == tuple(p.weight.scheme for p in (gate, up, last))
    types = (group.words, group.meta, group.bias, group.problems, group.format_index)
    assert [t.dtype for t in types] == [
        torch.uint8,
        torch.int32,
        torch.float32,
        torch.int64,
        torch.int32,
    ]


def test_a_group_without_biases_has_an_empty_one():
    assert grouped([Problem(weight("bf16"))]).bias.shape == (0,)


def test_symmetric_and_asymmetric_weights_share_a_format():
    problems = [Problem(weight("w4a16_g128_asym")), Problem(weight("w4a16_g128_sym"), expert=1)]
    assert grouped(problems).formats == (WeightFormat(4, "bf16", 128),)


def test_weights_are_taken_one_by_one():
    alive = []

    def stream():
        for expert in range(4):
            q = weight("w4a16_g128_asym", seed=expert)
            alive.append(weakref.ref(q.codes_NK))
            yield Problem(q, expert=expert)
            del q
            assert alive[-1]() is None  # before the next one is made

    group_weights(stream(), [WeightSize(Scheme.parse("w4a16_g128_asym"), 5, 128)] * 4)
    assert len(alive) == 4


def test_no_weights_are_refused():
    with pytest.raises(ValueError, match="no weight was given; a product needs at least one"):
        group_weights([], [])


def test_inputs_of_two_widths_are_refused():
    problems = [Problem(weight("bf16", k=128)), Problem(weight("bf16", k=256), expert=1)]
    with pytest.raises(ValueError, match="of 128 and of 256 input features cannot share one input"):
        grouped(problems)


def test_a_scheme_without_a_kernel_is_refused_before_any_weight_is_read():
    sizes = [WeightSize(Scheme.parse("w4a8_g32_sym"), 5, 128)]
    with pytest.raises(ValueError, match=r"no kernel computes w4a8_g32_sym: .* use g128 or grow"):
        group_weights(iter(()), sizes)


def test_groups_that_do_not_divide_the_inputs_are_refused():
    sizes = [WeightSize(Scheme.parse("w4a16_g128_sym"), 5, 130)]
    with pytest.raises(ValueError, match="130 input features, not a multiple of the group size"):
        group_weights(iter(()), sizes)


def test_a_weight_of_another_size_than_announced_is_refused():
    sizes = [WeightSize(Scheme.parse("w4a16_g128_sym"), 6, 128)]
    message = r"problem 0 is \[5, 128\] w4a16_g128_sym, announced as \[6, 128\] w4a16_g128_sym"
    with pytest.raises(ValueError, match=message):
        group_weights([Problem(weight("w4a16_g128_sym"))], sizes)


@pytest.mark.parametrize(
    ("given_problems", "message"),
    [(1, "got 1 problem for 2 sizes"), (3, "more problems were given than the 2 sizes")],
)
def test_another_number_of_weights_than_announced_is_refused(given_problems, message):
    problems = [Problem(weight("bf16"), expert=e) for e in range(given_problems)]
    with pytest.raises(ValueError, match=message):
        group_weights(problems, [size_of(problems[0].weight)] * 2)


def test_a_bias_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"a bias of shape \[4\], expected \[5\]"):
        grouped([Problem(weight("bf16"), bias=torch.zeros(4))])


def test_columns_that_overlap_are_refused():
    gate, up = Problem(weight("bf16")), Problem(weight("bf16"), column=4)
    message = "expert 0 write column 4; the second one must start at column 5 or after"
    with pytest.raises(ValueError, match=message):
        grouped([gate, up])
    grouped([gate, replace(up, expert=1)])  # another expert writes other rows

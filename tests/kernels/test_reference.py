"""The definition of a product: a slow loop, the decoded weights, and what the bounds allow."""

from dataclasses import replace

import pytest
import torch
from weights import SCHEMES

from mxq.kernels.arena import Problem, group_weights, size_of
from mxq.kernels.reference import error_bounds, group_gemm_torch, make_inputs_torch
from mxq.kernels.spec import format_of
from mxq.numerics import dequantize, fake_quantize_input, rotate
from mxq.quantizers import quantize_rtn
from mxq.scheme import Scheme

KINDS = ("bf16", "int8", "int4", "fp8")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_group(scheme, n=10, k=256, *, bias_N=None, seed=0):
    q = quantize_rtn(normal(n, k, seed=seed) + 0.2, scheme)
    problem = Problem(q, bias=bias_N)
    return q, group_weights([problem], [size_of(q)])


def routing(*counts):
    """Rows, starts and counts of experts that take the tokens 0, 1, 2, ... in turn."""
    starts = [sum(counts[:e]) for e in range(len(counts))]
    return torch.arange(sum(counts)), torch.tensor(starts), torch.tensor(counts)


def bf16(value):
    return torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item()


def slow_output(inputs, q, t, n):
    """One output by the written definition, in float64 and without the last rounding."""
    form, k = format_of(q.scheme), q.codes_NK.shape[1]
    codes = q.codes_NK[n].tolist() if form.is_integer else q.codes_NK[n].double().tolist()
    if form.w_bits == 16:
        return sum(w * x for w, x in zip(codes, inputs.plain_TK[t, :k].tolist(), strict=True))
    kind = {"int8": inputs.int8, "int4": inputs.int4, "fp8": inputs.fp8}.get(form.input)
    x = inputs.rotated_TK[t] if kind is None else kind.values_TK[t]
    x, xs = x[:k].double().tolist(), 1.0 if kind is None else kind.scale_T[t].item()
    if form.input == "fp8":
        return sum(a * b for a, b in zip(codes, x, strict=True)) * q.scale_NG[n, 0].item() * xs
    width, total = k // q.scale_NG.shape[1], 0.0
    for g, scale in enumerate(q.scale_NG[n].tolist()):
        zero = 2 ** (q.scheme.w_bits - 1) if q.zero_NG is None else q.zero_NG[n, g].item()
        for i in range(g * width, (g + 1) * width):
            w = (codes[i] - zero) * scale
            if form.input == "bf16" and form.group_size is not None:
                w = bf16((codes[i] - zero) * bf16(scale))
            total += w * x[i] * xs
    return total


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_outputs_are_those_of_a_slow_loop(scheme):
    q, group = one_group(scheme, n=3, bias_N=torch.tensor([1.0, -2.0, 0.5]))
    inputs = make_inputs_torch(normal(2, 256, seed=1), True, KINDS)
    y_SN = group_gemm_torch(inputs, group, *routing(2), dtype=torch.float32)
    slow = [
        [slow_output(inputs, q, t, n) + group.bias[n].item() for n in range(3)] for t in range(2)
    ]
    # The loop rounds almost nothing, so one of the two errors that the bound adds is enough.
    bound_SN = error_bounds(inputs, group, *routing(2), dtype=torch.float32).kernel_SN / 2
    assert ((y_SN.double() - torch.tensor(slow, dtype=torch.float64)).abs() <= bound_SN).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_decoded_weight_gives_the_same_within_its_bound(scheme, dtype):
    bias_N = normal(40, seed=5)
    q, group = one_group(scheme, n=40, bias_N=bias_N)
    inputs = make_inputs_torch(normal(6, 256, seed=1), True, KINDS)
    y_SN = group_gemm_torch(inputs, group, *routing(6), dtype=dtype)
    bound_SN = error_bounds(inputs, group, *routing(6), dtype=dtype).decoded_SN
    x_TK = inputs.plain_TK if scheme.kind == "bf16" else inputs.rotated_TK
    decoded_SN = fake_quantize_input(x_TK.float(), scheme) @ dequantize(q).T + bias_N
    assert y_SN.dtype == dtype
    assert ((y_SN.float() - decoded_SN).abs() <= bound_SN).all()
    # A bound that would also pass a wrong code says nothing: one step of one code is above it.
    if scheme.kind == "int" and scheme.group_size is None and dtype == torch.float32:
        x_decoded = fake_quantize_input(x_TK.float(), scheme)
        step_SN = x_decoded.abs().amax(1)[:, None] * q.scale_NG[:, 0].float()
        assert (bound_SN < step_SN).all()


def test_sums_of_small_integers_are_exact():
    # Codes, inputs and sums below 2^24 and a scale of 1: float32 has no rounding to do.
    scheme = Scheme.parse("w4a16_grow_asym")
    q, _ = one_group(scheme)
    q = replace(q, scale_NG=torch.ones_like(q.scale_NG))
    group = group_weights([Problem(q)], [size_of(q)])
    x_TK = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(0)).float()
    inputs = make_inputs_torch(x_TK, False, ("bf16",))
    expected = x_TK.long() @ (q.codes_NK.long() - q.zero_NG.long()).T
    y_SN = group_gemm_torch(inputs, group, *routing(3), dtype=torch.float32)
    assert torch.equal(y_SN.long(), expected)


def test_each_expert_writes_its_slots_and_columns_for_its_tokens():
    # Expert 0: gate and up; expert 1: no token; expert 2: one weight, the rest of the row stays 0.
    weights = [quantize_rtn(normal(n, 128, seed=n), Scheme.parse("bf16")) for n in (3, 4, 5, 6)]
    places = [(0, 0), (3, 0), (0, 1), (1, 2)]
    problems = [
        Problem(q, column, expert) for q, (column, expert) in zip(weights, places, strict=True)
    ]
    group = group_weights(problems, [size_of(q) for q in weights])
    x_TK = normal(4, 128, seed=9).bfloat16()
    inputs = make_inputs_torch(x_TK, True, ("bf16",))
    rows_S = torch.tensor([3, 1, 1, 0, 0, 0])  # slots 2.. are of expert 2; the last two unused
    starts_E, counts_E = torch.tensor([0, 2, 2]), torch.tensor([2, 0, 2])
    found = group_gemm_torch(inputs, group, rows_S, starts_E, counts_E, torch.float32)
    w = [q.codes_NK.float() for q in weights]
    x = x_TK.float()
    expected = torch.zeros(6, 7)
    expected[0:2, 0:3], expected[0:2, 3:7] = x[[3, 1]] @ w[0].T, x[[3, 1]] @ w[1].T
    expected[2:4, 1:7] = x[[1, 0]] @ w[3].T
    assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [128, 130])
def test_inputs_are_the_rotated_rounded_ones_padded_with_zeros(k):
    x_TK = normal(5, k).bfloat16()
    x_TK[2] = 0  # a token of zeros has a scale, and zeros
    inputs = make_inputs_torch(x_TK, True, KINDS)
    width = 128 if k == 128 else 256
    rotated_TK = rotate(x_TK.float()).bfloat16()
    assert torch.equal(inputs.plain_TK[:, :k], x_TK)
    assert torch.equal(inputs.rotated_TK[:, :k], rotated_TK)
    schemes = {"int8": "w8a8_grow_sym", "int4": "w4a4_grow_sym", "fp8": "fp8"}
    for kind, text in schemes.items():
        rounded = getattr(inputs, kind)
        decoded_TK = rounded.values_TK.float() * rounded.scale_T[:, None]
        expected_TK = fake_quantize_input(rotated_TK.float(), Scheme.parse(text))
        assert torch.equal(decoded_TK[:, :k], expected_TK), kind
        assert rounded.values_TK.shape == (5, width)
        assert not decoded_TK[:, k:].any()
        if kind == "fp8":
            assert rounded.sum_T is None
        else:
            assert torch.equal(rounded.sum_T.long(), rounded.values_TK.long().sum(1))
            assert rounded.sum_T.dtype == torch.int32
    assert not inputs.plain_TK[:, k:].any()
    assert not inputs.rotated_TK[:, k:].any()


def test_an_input_that_is_not_rotated_is_one_tensor_and_kinds_are_as_asked():
    inputs = make_inputs_torch(normal(2, 128), False, ("bf16", "int4"))
    assert inputs.rotated_TK is inputs.plain_TK
    assert inputs.int4 is not None
    assert (inputs.int8, inputs.fp8) == (None, None)
    rounded_only = make_inputs_torch(normal(2, 128), True, ("int8",))
    assert (rounded_only.plain_TK, rounded_only.rotated_TK) == (None, None)


@pytest.mark.parametrize(
    ("text", "kind"), [("w4a16_g128_sym", "bf16"), ("bf16", "bf16"), ("fp8", "fp8")]
)
def test_a_kind_of_input_that_is_not_there_is_named(text, kind):
    _, group = one_group(Scheme.parse(text))
    inputs = make_inputs_torch(normal(2, 256), False, ("int8",))
    message = rf"a weight needs the input as {kind}, but only \['int8'\] is there"
    with pytest.raises(ValueError, match=message):
        group_gemm_torch(inputs, group, *routing(2))


# --- The bound is worth something: each wrong kernel below is outside of it. ---


def outside(scheme, break_weight):
    """Whether outputs of a broken weight leave the bound of a kernel somewhere."""
    q, group = one_group(scheme, n=40)
    broken = break_weight(q)
    inputs = make_inputs_torch(normal(6, 256, seed=1), True, KINDS)
    right_SN = group_gemm_torch(inputs, group, *routing(6))
    wrong = group_weights([Problem(broken)], [size_of(broken)])
    wrong_SN = group_gemm_torch(inputs, wrong, *routing(6))
    bound_SN = error_bounds(inputs, group, *routing(6)).kernel_SN
    return bool(((wrong_SN.float() - right_SN.float()).abs() > bound_SN).any())


def one_code_off(q):
    codes_NK = q.codes_NK.clone()
    codes_NK[0, 77] ^= 1
    return replace(q, codes_NK=codes_NK)


def two_inputs_swapped(q):
    order = torch.arange(q.codes_NK.shape[1])
    order[[8, 9]] = order[[9, 8]]
    return replace(q, codes_NK=q.codes_NK[:, order])


def zero_one_off(q):
    return replace(q, zero_NG=q.zero_NG ^ 1)


@pytest.mark.parametrize("text", ["w2a16_g128_asym", "w3a16_grow_asym", "w4a4_grow_asym"])
@pytest.mark.parametrize("break_weight", [one_code_off, two_inputs_swapped, zero_one_off])
def test_a_wrong_weight_leaves_the_bound_of_a_kernel(text, break_weight):
    assert outside(Scheme.parse(text), break_weight)


def test_the_right_weight_does_not():
    assert not outside(Scheme.parse("w3a16_grow_asym"), lambda q: q)

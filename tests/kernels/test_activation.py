"""What runs between the products: kernels against their definitions, those against arithmetic."""

import pytest
import torch

from mxq.kernels.activation import combine, gate, prepare, sum_slices
from mxq.kernels.activation_reference import (
    ACTIVATIONS,
    combine_torch,
    gate_torch,
    sum_slices_torch,
)
from mxq.kernels.group_gemm import _width
from mxq.kernels.reference import make_inputs_torch
from mxq.kernels.routing_reference import route_reference
from mxq.numerics import fake_quantize_input, rotate
from mxq.scheme import Scheme

KINDS = ("bf16", "int8", "int4", "fp8")
BF16_STEP = 2.0**-7  # relative distance of neighbouring bfloat16 values, at most


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def equal(found, expected):
    """Same values; also the same zeros, since 0 and -0 are told apart by no product."""
    return found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


def assert_rounded_equal(found, expected):
    for kind in ("int8", "int4", "fp8"):
        one, two = getattr(found, kind), getattr(expected, kind)
        assert equal(one.values_TK, two.values_TK), kind
        assert equal(one.scale_T, two.scale_T), kind
        assert (one.sum_T is None) == (two.sum_T is None)
        assert one.sum_T is None or equal(one.sum_T, two.sum_T), kind


def assert_inputs_close(found, expected, rotated_from):
    """Equal but for the rotation, whose float32 sum may be rounded to the neighbour.

    The rounded kinds are compared with those of the rotated values that were found.
    """
    assert equal(found.plain_TK, expected.plain_TK)
    norm = rotated_from.float().norm(dim=-1, keepdim=True)
    bound = BF16_STEP * expected.rotated_TK.float().abs() + 2.0**-20 * norm
    assert ((found.rotated_TK.float() - expected.rotated_TK.float()).abs() <= bound).all()
    assert_rounded_equal(found, make_inputs_torch(found.rotated_TK, False, KINDS))


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
# Blocks of 128, 128, 64, 8, 4 and 1; widths that are no multiple of 128; 17 groups.
@pytest.mark.parametrize("features", [128, 1408, 192, 200, 36, 7, 2176])
@pytest.mark.parametrize("tokens", [1, 5])
def test_inputs_are_their_definition(tokens, features, rotated):
    x_TK = normal(tokens, features, seed=features).to(torch.bfloat16)
    found = prepare(x_TK, rotated, KINDS)
    assert_inputs_close(found, make_inputs_torch(x_TK, rotated, KINDS), x_TK)


@pytest.mark.parametrize("features", [256, 192, 72])
def test_the_rotation_is_that_of_the_weights(features):
    x_TK = normal(4, features, seed=1).to(torch.bfloat16)
    found = prepare(x_TK, True, ("bf16",)).rotated_TK[:, :features].float()
    exact = rotate(x_TK.double())
    # One rounding to bfloat16, and the float32 sum before it.
    bound = BF16_STEP / 2 * exact.abs() + 2.0**-20 * x_TK.double().norm(dim=-1, keepdim=True)
    assert ((found - exact).abs() <= bound).all()
    # The same in bfloat16 has the matrix rounded as well: 2^-9 of each of the block's terms.
    rough = rotate(x_TK).float()
    assert ((found - rough).abs() <= 2 * BF16_STEP * exact.abs() + 2.0**-8).all()


@pytest.mark.parametrize("scheme", ["w8a8_grow_sym", "w4a4_grow_sym", "fp8"])
def test_rounded_inputs_are_those_of_the_scheme(scheme):
    scheme = Scheme.parse(scheme)
    x_TK = normal(6, 256, seed=2).to(torch.bfloat16)
    x_TK[1] = 0.0
    x_TK[2] *= 1e-30
    x_TK[3, 7] = 3e38
    found = prepare(x_TK, False, KINDS)
    kind = found.fp8 if scheme.kind == "fp8" else getattr(found, f"int{scheme.a_bits}")
    decoded = kind.values_TK.float() * kind.scale_T[:, None]
    assert torch.equal(decoded.to(torch.bfloat16), fake_quantize_input(x_TK, scheme))


def test_halves_are_rounded_to_even():
    # The peak 127 makes the scale of int8 exactly 1.
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]
    found = prepare(torch.tensor([row + [0.0] * 120]).to(torch.bfloat16), False, ("int8",)).int8
    assert found.scale_T.tolist() == [1.0]
    assert found.values_TK[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 4]
    assert found.sum_T.tolist() == [127 + 0 + 2 + 2 + 0 - 2 - 2 + 4]


def test_fp8_values_are_those_of_torch_at_every_step():
    # The peak 448 makes the scale 1: all bfloat16 values from 2^-12 to 448, both signs.
    codes = torch.arange(0x3980, 0x43E1, dtype=torch.int32).to(torch.int16)
    x_K = codes.view(torch.bfloat16)
    x_TK = torch.cat([x_K, -x_K, torch.zeros(-2 * len(x_K) % 128)]).to(torch.bfloat16)[None]
    assert x_TK.float().abs().max() == 448
    found = prepare(x_TK, False, ("fp8",)).fp8.values_TK
    assert torch.equal(found.float(), x_TK.to(torch.float8_e4m3fn).float())


def test_only_what_is_asked_for_is_made():
    x_TK = normal(2, 256).to(torch.bfloat16)
    inputs = prepare(x_TK, False, ("bf16",))
    assert inputs.plain_TK.data_ptr() == inputs.rotated_TK.data_ptr() == x_TK.data_ptr()
    assert inputs.int8 is inputs.int4 is inputs.fp8 is None
    inputs = prepare(x_TK, True, ("bf16", "int4"), with_plain=False)
    assert inputs.plain_TK is None
    assert equal(inputs.int4.values_TK, make_inputs_torch(x_TK, True, ("int4",)).int4.values_TK)
    inputs = prepare(x_TK, True, ("fp8",))
    assert inputs.plain_TK is inputs.rotated_TK is None


def test_other_types_and_strides_are_taken():
    x_KT = normal(200, 3)
    expected = make_inputs_torch(x_KT.T.contiguous(), False, KINDS)
    found = prepare(x_KT.T, False, KINDS)
    assert equal(found.plain_TK, expected.plain_TK)
    assert_rounded_equal(found, expected)
    assert prepare(x_KT[:, :0].T, True, KINDS).int8.values_TK.shape == (0, 256)


def test_a_token_wider_than_a_program_is_refused():
    with pytest.raises(ValueError, match="32896 features; kernels take 32768 at most"):
        prepare(torch.zeros(1, 32896, dtype=torch.bfloat16), False, KINDS)


def split_case(slots, width, experts, parts, slices, seed=0):
    """Results of random experts, some slots unused; what is not written is NaN."""
    generator = torch.Generator().manual_seed(seed)
    experts_S = torch.randint(0, experts, (slots,), generator=generator).sort().values.int()
    experts_S[slots - 1 :] = -1
    splits = torch.randint(1, slices + 1, (experts * parts,), generator=generator).int()
    z_SN = normal(slots, width, seed=seed).to(torch.bfloat16)
    partial_CSN = normal(slices, slots, width, seed=seed + 1)
    for slot, expert in enumerate(experts_S.tolist()):
        for part in range(parts):
            columns = slice(part * width // parts, (part + 1) * width // parts)
            split = int(splits[expert * parts + part]) if expert >= 0 else 0
            if split != 1:
                z_SN[slot, columns] = torch.nan
            partial_CSN[split if split > 1 else 0 :, slot, columns] = torch.nan
    return z_SN, (partial_CSN if slices > 1 else None), splits, experts_S


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "gateless"])
@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("features", [128, 200])
def test_the_gate_is_its_definition(features, slices, gated, rotated):
    parts = 2 if gated else 1
    case = split_case(6, parts * features, 3, parts, slices, seed=slices)
    found = gate(*case, "silu", rotated, KINDS, gated=gated)
    h = gate_torch(sum_slices_torch(*case, parts), "silu", gated)
    # The kernel's exponential may move a value to the neighbour.
    plain = found.plain_TK[:, :features].float()
    assert ((plain - h.float()).abs() <= BF16_STEP * h.float().abs()).all()
    assert (plain != h.float()).sum() <= 0.01 * h.numel()
    expected = make_inputs_torch(found.plain_TK[:, :features], rotated, KINDS)
    assert_inputs_close(found, expected, found.plain_TK)
    assert (plain[-1] == 0).all(), "an unused slot"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_is_its_function(activation):
    z_SN = torch.cat([normal(2, 128, scale=3.0), normal(2, 128, seed=1)], 1).to(torch.bfloat16)
    z_SN[0, :4] = torch.tensor([0.0, -100.0, 100.0, -9.0])
    experts_S, splits = torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    for gated, z in ((True, z_SN), (False, z_SN[:, :128].contiguous())):
        found = gate(z, None, splits, experts_S, activation, False, ("bf16",), gated=gated)
        expected = gate_torch(z, activation, gated).float()
        bound = BF16_STEP * expected.abs() + 1e-6
        assert ((found.plain_TK.float() - expected).abs() <= bound).all()


def test_the_activations_by_hand():
    x = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    sigmoid, phi = 1 / (1 + torch.exp(-x)), 0.5 * (1 + torch.erf(x / 2**0.5))
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    expected = {
        "silu": x * sigmoid,
        "gelu": x * phi,
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(inner)),
        "relu": torch.tensor([0.0, 0.0, 1.0, 3.0]),
        "relu2": torch.tensor([0.0, 0.0, 1.0, 9.0]),
        "identity": x,
    }
    for name, values in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), values)


def test_an_unknown_activation_is_refused():
    case = split_case(2, 256, 1, 2, 1)
    with pytest.raises(ValueError, match="activation 'swish'; known are silu, gelu"):
        gate(*case, "swish", False, KINDS)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_the_sum_of_slices_is_its_definition(slices, parts):
    case = split_case(5, 2 * 136, 3, parts, slices, seed=slices)
    found = sum_slices(*case, parts=parts)
    assert torch.equal(found, sum_slices_torch(*case, parts))
    assert (found[-1] == 0).all()


def test_slices_are_rounded_once():
    # 1 + 2^-8 + 2^-8: rounded after each sum it would stay 1, in float32 it is the next value.
    partial = torch.tensor([1.0, 2.0**-8, 2.0**-8]).reshape(3, 1, 1).expand(3, 1, 128).contiguous()
    z_SN = torch.zeros(1, 128, dtype=torch.bfloat16)
    experts, splits = torch.zeros(1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    assert (sum_slices(z_SN, partial, splits, experts) == 1 + 2.0**-7).all()
    assert (sum_slices_torch(z_SN, partial, splits, experts) == 1 + 2.0**-7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_the_sum_of_experts_is_its_definition(top_k, slices, dtype):
    tokens, experts, width = 4, 5, 200
    generator = torch.Generator().manual_seed(top_k)
    index_TR = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    index_TR[0] = experts  # a token without any expert
    *_, slots_TR, experts_S = route_reference(index_TR, experts)
    z_SN, partial, splits, _ = split_case(tokens * top_k, width, experts, 1, slices)
    # Splits differ by expert: both sources hold numbers, and the definition picks.
    z_SN, partial = z_SN.nan_to_num(0.5), None if partial is None else partial.nan_to_num(0.25)
    weights_TR = normal(tokens, top_k, seed=3).to(dtype)
    weights_TR[slots_TR < 0] = torch.nan
    found = combine(z_SN, partial, splits, experts_S, slots_TR, weights_TR)
    summed = sum_slices_torch(z_SN, partial, splits, experts_S)
    assert torch.equal(found, combine_torch(summed, slots_TR, weights_TR))
    assert (found[0] == 0).all()


def test_the_sum_of_experts_by_hand():
    z_SN = torch.tensor([[1.0], [10.0], [100.0]]).expand(3, 128).to(torch.bfloat16).contiguous()
    slots = torch.tensor([[2, 0], [-1, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 2.0], [7.0, 0.25]])
    ones, experts = torch.ones(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    for found in (
        combine(z_SN, None, ones, experts, slots, weights),
        combine_torch(z_SN, slots, weights),
    ):
        assert found[:, 0].tolist() == [0.5 * 100 + 2 * 1, 0.25 * 10]


def test_results_of_another_type_are_refused():
    z_SN, partial, splits, experts_S = split_case(3, 256, 2, 1, 2)
    with pytest.raises(ValueError, match=r"results are torch\.float32; expected contiguous"):
        sum_slices(z_SN.float(), partial, splits, experts_S)
    with pytest.raises(
        ValueError, match=r"of shape \[2, 3, 128\]; expected contiguous torch.float32"
    ):
        sum_slices(z_SN, partial[..., :128].contiguous(), splits, experts_S)
    slots = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"weights are torch\.int64 of shape \[1, 3\]"):
        combine(z_SN, partial, splits, experts_S, slots, slots.long())


def test_the_stride_of_a_single_token_is_its_width():
    # Torch calls a row contiguous whatever its stride is; kernels are compiled for that number.
    x_TK = torch.zeros(128, 1, dtype=torch.bfloat16).T
    assert x_TK.is_contiguous()
    assert x_TK.stride(0) == 1
    assert _width(prepare(x_TK, False, ["bf16"])) == 128

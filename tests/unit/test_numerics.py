"""Grids, codes and rotations: values by hand, the clip search against a slow loop."""

import math

import pytest
import torch

from mxq.numerics import (
    SCALE_MAX,
    SCALE_MIN,
    QuantizedWeight,
    check_finite,
    check_groups,
    dequantize,
    fake_quantize_input,
    quantize_fp8,
    rotate,
    rotation_block,
    round_to_grid,
    search_grid,
    unrotate,
)
from mxq.quantizers import quantize_rtn
from mxq.scheme import Scheme

ASYM2, ASYM4 = Scheme.parse("w2a16_grow_asym"), Scheme.parse("w4a16_grow_asym")
SYM4 = Scheme.parse("w4a16_grow_sym")
GROUP32 = Scheme.parse("w3a16_g32_asym")
FP8 = Scheme.parse("fp8")
EPS = torch.finfo(torch.float32).eps  # 2^-23


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape, seed=0):
    return random(*shape, seed=seed) ** 3


def rtn(rows, scheme):
    return quantize_rtn(torch.tensor(rows), scheme)


# --- grids ------------------------------------------------------------------------------------


def test_an_asymmetric_grid_by_hand():
    # Range -1 to 2 in 3 steps of 1: zero point 1, and every weight is a point of the grid.
    q = rtn([[-1.0, 0.0, 1.0, 2.0]], ASYM2)
    assert (q.scale_NG.tolist(), q.zero_NG.tolist()) == ([[1.0]], [[1]])
    assert q.codes_NK.tolist() == [[0, 1, 2, 3]]


def test_a_symmetric_grid_by_hand():
    # The zero point is 8 and codes go from 0 to 15, so a step of 0.5 reaches from -4 to 3.5: all
    # five weights are exact there. The unclipped step is 8/15; clipping and refitting find 0.5.
    q = rtn([[-4.0, -3.5, 0.0, 1.5, 3.5]], SYM4)
    assert (q.scale_NG.tolist(), q.zero_NG) == ([[0.5]], None)
    assert q.codes_NK.tolist() == [[0, 1, 8, 11, 15]]


def test_groups_have_grids_of_their_own():
    q = rtn([[0.0, 7.0] * 16 + [-14.0, 0.0] * 16], GROUP32)
    assert (q.scale_NG.tolist(), q.zero_NG.tolist()) == ([[1.0, 2.0]], [[0, 7]])
    assert q.codes_NK.tolist() == [[0, 7] * 32]


def test_zero_point_is_a_code_even_if_no_weight_is_near_zero():
    # The range is widened to 0: 100 to 115 becomes 0 to 115, and its mirror image -115 to 0.
    high = torch.arange(100.0, 116.0)
    q = quantize_rtn(torch.stack([high, -high]), ASYM4)
    assert q.zero_NG.tolist() == [[0], [15]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_is_exact_on_every_grid(bits):
    w_NK = random(16, 64)
    w_NK[:, ::7] = 0.0
    for grid in ("sym", "asym"):
        q = quantize_rtn(w_NK, Scheme.parse(f"w{bits}a16_g32_{grid}"))
        assert not dequantize(q)[:, ::7].any()


def test_codes_round_to_nearest_even_and_stop_at_the_ends():
    # w / 0.5 + 4: -10 + 4 < 0, 0.5 + 4 -> 4, 1.5 + 4 -> 6, 2.98 + 4 -> 7, 40 + 4 > 15.
    w_NK = torch.tensor([[-5.0, 0.25, 0.75, 1.49, 20.0]])
    codes_NK = round_to_grid(w_NK, torch.tensor([[0.5]]), torch.tensor([[4.0]]), ASYM4)
    assert codes_NK.tolist() == [[0, 4, 6, 7, 15]]
    assert codes_NK.dtype == torch.uint8


def loss_on_grid(row, scale, zero, importance, top):
    """Weighted squared error of rounding a group to a grid, in float64."""
    codes = (row / scale + zero).round().clamp(0, top)
    return ((((codes - zero) * scale - row) ** 2) * importance).sum()


def shifted(*shape, seed=0):
    """Weights far from 0, which is in the range all the same."""
    return random(*shape, seed=seed) + 5


def best_clip(row, importance, scheme):
    """The least loss over clip ratios from 1 to 0.37, by a slow loop in float64."""
    top = 2**scheme.w_bits - 1
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    losses = []
    for ratio in (1.0 - 0.03 * step for step in range(0, 22, 3)):
        span = 2 * max(-low, high) if scheme.symmetric else high - low
        scale = (span * ratio / top).half().double()
        zero = 2 ** (scheme.w_bits - 1) if scheme.symmetric else (-low * ratio / scale).round()
        losses.append(loss_on_grid(row, scale, zero, importance, top))
    return min(losses), losses[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [random, heavy_tailed, shifted])
@pytest.mark.parametrize("text", ["w2a16_g32_asym", "w3a16_g32_sym", "w4a16_g32_asym"])
def test_no_clip_ratio_beats_the_search(text, make, weighted):
    scheme = Scheme.parse(text)
    w_NK = make(6, 64, seed=scheme.w_bits)
    importance_K = random(64, seed=9) ** 2 if weighted else None
    scale_NG, zero_NG = search_grid(w_NK, scheme, importance_K)
    h_GC = (torch.ones(64) if importance_K is None else importance_K).double().reshape(2, 32)
    for row, scale, zero in zip(w_NK.double().reshape(6, 2, 32), scale_NG, zero_NG, strict=True):
        for g in range(2):
            found = loss_on_grid(
                row[g], scale[g].double(), zero[g].double(), h_GC[g], 2**scheme.w_bits - 1
            )
            best, unclipped = best_clip(row[g], h_GC[g], scheme)
            # The search compares float32 sums of 32 squares, each good to about 32 eps.
            assert found <= best * (1 + 64 * EPS)
            assert best <= unclipped


def test_clipping_pays_where_one_weight_is_far_out():
    # Unclipped at 2 bits, -1 to 4 is a step of 5/3: every +-1 is off by 2/3, in all 31 x 4/9.
    row = torch.tensor([1.0, -1.0] * 15 + [1.0, 4.0]).double()
    _, unclipped = best_clip(row, torch.ones(32).double(), Scheme.parse("w2a16_g32_asym"))
    q = quantize_rtn(row.float()[None], Scheme.parse("w2a16_g32_asym"))
    assert (dequantize(q)[0] - row).square().sum() < 0.7 * unclipped


def test_importance_decides_what_is_exact():
    # Two bits cannot hold four unrelated weights; the important one is met to a float16 step.
    w_NK = torch.tensor([[0.31, -0.72, 1.0, 0.11]])
    scale_NG, zero_NG = search_grid(w_NK, ASYM2, torch.tensor([1e6, 1.0, 1.0, 1.0]))
    q = QuantizedWeight(round_to_grid(w_NK, scale_NG, zero_NG, ASYM2), scale_NG, zero_NG, ASYM2)
    assert abs(dequantize(q)[0, 0] - 0.31) <= 0.31 * 2**-11


def test_a_group_that_no_input_reached_is_searched_as_without_importance():
    w_NK = heavy_tailed(4, 64)
    importance_K = torch.cat([torch.zeros(32), random(32) ** 2])
    found, plain = search_grid(w_NK, GROUP32, importance_K), search_grid(w_NK, GROUP32)
    assert torch.equal(found[0][:, 0], plain[0][:, 0])
    assert torch.equal(found[1][:, 0], plain[1][:, 0])
    assert not torch.equal(found[0][:, 1], plain[0][:, 1])


def test_a_batch_has_the_grids_of_its_members():
    w_ENK, importance_EK = heavy_tailed(3, 4, 64), random(3, 64) ** 2
    scale_ENG, zero_ENG = search_grid(w_ENK, GROUP32, importance_EK)
    for e in range(3):
        scale_NG, zero_NG = search_grid(w_ENK[e], GROUP32, importance_EK[e])
        assert torch.equal(scale_ENG[e], scale_NG)
        assert torch.equal(zero_ENG[e], zero_NG)


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1.0, 1e4, 1e12])
def test_scales_are_positive_finite_float16_values(factor):
    for text in ("w2a16_g32_asym", "w8a16_g32_sym"):
        scale_NG, _ = search_grid(random(8, 64) * factor, Scheme.parse(text))
        assert torch.equal(scale_NG, scale_NG.half().float())
        assert ((scale_NG >= SCALE_MIN) & (scale_NG <= SCALE_MAX)).all()


@pytest.mark.parametrize("text", ["w2a16_g32_asym", "w4a16_g32_sym", "w8a16_grow_asym", "fp8"])
def test_a_group_of_zeros_stays_zero(text):
    assert not dequantize(quantize_rtn(torch.zeros(2, 64), Scheme.parse(text))).any()


def test_a_group_below_the_smallest_scale_becomes_zero():
    # Half of 2^-24, the smallest scale, is the largest weight that rounds to 0.
    assert not dequantize(quantize_rtn(random(2, 64).clamp(-1, 1) * 2**-26, ASYM4)).any()


@pytest.mark.parametrize("value", [-3.3, 0.017, 1000.0])
@pytest.mark.parametrize("text", ["w2a16_g32_asym", "w2a16_g32_sym", "w4a16_g32_sym", "fp8"])
def test_a_constant_group_is_kept_to_a_float16_step(value, text):
    # One code and a scale rounded to float16, off by half of a step of 2^-10. The scale of fp8 is
    # value / 448, which for small values is subnormal: half of a step of 2^-24.
    w_NK = torch.full((1, 32), value)
    error = (dequantize(quantize_rtn(w_NK, Scheme.parse(text))) - w_NK).abs().max()
    assert error <= max(abs(value) * 2**-11, 448 * 2**-25) * (1 + 4 * EPS)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_weight_within_the_grid_is_off_by_half_a_step_at_most(bits):
    scheme = Scheme.parse(f"w{bits}a16_g32_asym")
    w_NK = random(8, 64)
    scale_NG, zero_NG = search_grid(w_NK, scheme)
    scale_NK, zero_NK = (t.repeat_interleave(32, 1) for t in (scale_NG, zero_NG))
    inside = (w_NK >= -zero_NK * scale_NK) & (w_NK <= (2**bits - 1 - zero_NK) * scale_NK)
    q = QuantizedWeight(round_to_grid(w_NK, scale_NG, zero_NG, scheme), scale_NG, zero_NG, scheme)
    # Beside the half step, w / scale + zero is rounded at a size of at most 2^bits.
    limit_NK = scale_NK * (0.5 + 2**bits * EPS)
    assert inside.any()
    assert ((dequantize(q) - w_NK).abs() <= limit_NK)[inside].all()


# --- codes to weights -------------------------------------------------------------------------


def test_dequantize_by_hand():
    codes_NK = torch.tensor([[0, 5, 15, 8], [1, 2, 3, 4]], dtype=torch.uint8)
    scale_NG = torch.tensor([[0.5, 2.0], [1.0, 0.25]]).half()
    zero_NG = torch.tensor([[8, 15], [0, 4]], dtype=torch.uint8)
    q = QuantizedWeight(codes_NK, scale_NG, zero_NG, ASYM4)
    assert dequantize(q).tolist() == [[-4.0, -1.5, 0.0, -14.0], [1.0, 2.0, -0.25, 0.0]]


@pytest.mark.parametrize(("bits", "zero"), [(2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (8, 128)])
def test_a_symmetric_weight_has_its_zero_in_the_middle(bits, zero):
    codes_NK = torch.tensor([[0, zero, 2**bits - 1]], dtype=torch.uint8)
    scheme = Scheme.parse(f"w{bits}a16_grow_sym")
    q = QuantizedWeight(codes_NK, torch.ones(1, 1).half(), None, scheme)
    assert dequantize(q).tolist() == [[-zero, 0, zero - 1]]


def test_dequantize_leaves_the_codes_alone():
    q = rtn([[-1.0, 0.0, 1.0, 2.0]], ASYM2)
    dequantize(q)
    assert q.codes_NK.tolist() == [[0, 1, 2, 3]]


def test_a_bfloat16_weight_is_the_weight_rounded_once():
    w_NK = random(2, 8)
    q = quantize_rtn(w_NK, Scheme.parse("bf16"))
    assert torch.equal(dequantize(q), w_NK.bfloat16().float())


def test_one_of_a_batch_is_picked_with_its_grid():
    w_ENK = random(3, 4, 64)
    q = quantize_rtn(w_ENK, GROUP32)
    assert torch.equal(dequantize(q)[1], dequantize(q[1]))


def test_fp8_by_hand():
    # Peak 448 x 2: scale 2. e4m3 has steps of 2 from 16 to 32; 19 lies in the middle and goes to
    # the even mantissa (20 = 1.010b x 16), 17 to 16. Subnormal step: 2^-9.
    q = quantize_fp8(torch.tensor([[896.0, -38.0, 34.0, 2**-8]]), FP8)
    assert q.scale_NG.tolist() == [[2.0]]
    assert q.codes_NK.float().tolist() == [[448.0, -20.0, 16.0, 2**-9]]


def test_fp8_beyond_the_largest_scale_stops_at_the_largest_code():
    q = quantize_fp8(torch.tensor([[1e9, 1.0]]), FP8)
    assert q.codes_NK.float().tolist() == [[448.0, 0.0]]


# --- activations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "x_TK", "expected"),
    [
        # The peak is the code 127, so the step is 1: half steps go to even.
        ("w8a8_grow_sym", [[127.0, 1.4, -63.5, 2.5]], [[127.0, 1.0, -64.0, 2.0]]),
        # Each token has its own step: 1 and 0.5, the peak being the code 7.
        (
            "w4a4_grow_sym",
            [[7.0, 2.6, -3.4], [0.9, -3.5, 0.1]],
            [[7.0, 3.0, -3.0], [1.0, -3.5, 0.0]],
        ),
        # Peak 448: step 1, and 19 goes to the even mantissa, 20.
        ("fp8", [[448.0, 19.0, -17.0]], [[448.0, 20.0, -16.0]]),
    ],
)
def test_rounded_inputs_by_hand(text, x_TK, expected):
    found = fake_quantize_input(torch.tensor(x_TK), Scheme.parse(text))
    assert found.tolist() == expected


@pytest.mark.parametrize("text", ["w4a4_grow_sym", "w8a8_grow_asym", "fp8"])
def test_a_token_of_zeros_stays_zero(text):
    found = fake_quantize_input(torch.stack([torch.zeros(8), torch.ones(8)]), Scheme.parse(text))
    assert found[0].tolist() == [0.0] * 8


def test_inputs_of_16_bits_are_the_same_tensor():
    x_TK = random(2, 8)
    assert fake_quantize_input(x_TK, ASYM4) is x_TK


def test_rounded_inputs_keep_their_type():
    x_TK = random(2, 8).bfloat16()
    assert fake_quantize_input(x_TK, FP8).dtype == torch.bfloat16


# --- rotation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_features", "block"),
    [(1, 1), (7, 1), (48, 16), (96, 32), (128, 128), (384, 128), (4096, 128)],
)
def test_rotation_blocks_by_hand(in_features, block):
    assert rotation_block(in_features) == block


# Blocks of an even power of two have entries of 1/2, 1/4, 1/8: everything is exact.
@pytest.mark.parametrize("in_features", [7, 12, 48, 64])
def test_the_rotation_is_orthogonal_exactly_where_its_entries_are(in_features):
    matrix_KK = rotate(torch.eye(in_features))
    assert torch.equal(matrix_KK @ matrix_KK.T, torch.eye(in_features))


@pytest.mark.parametrize("in_features", [96, 128, 384])
def test_the_rotation_is_orthogonal(in_features):
    matrix_KK = rotate(torch.eye(in_features))
    # A sum of `block` products near 1/block, each with a relative error of a few eps.
    found = matrix_KK @ matrix_KK.T - torch.eye(in_features)
    assert found.abs().max() <= rotation_block(in_features) * EPS


@pytest.mark.parametrize("in_features", [7, 12, 48, 64])
def test_unrotate_is_the_exact_inverse_on_integers(in_features):
    x_TK = torch.arange(3.0 * in_features).reshape(3, in_features)
    assert torch.equal(unrotate(rotate(x_TK)), x_TK)
    assert torch.equal(rotate(unrotate(x_TK)), x_TK)


@pytest.mark.parametrize("in_features", [96, 384])
def test_unrotate_is_the_inverse(in_features):
    x_TK = random(5, in_features)
    block = rotation_block(in_features)
    # Two sums of `block` products; norms are kept, so errors are relative to the block's norm.
    limit = 2 * block * EPS * x_TK.norm(dim=-1).max()
    assert (unrotate(rotate(x_TK)) - x_TK).abs().max() <= limit


@pytest.mark.parametrize("in_features", [7, 96, 384])
def test_a_rotated_weight_on_a_rotated_input_keeps_the_product(in_features):
    w_NK, x_TK = random(6, in_features, seed=1), random(5, in_features, seed=2)
    found, expected = rotate(x_TK) @ rotate(w_NK).T, x_TK.double() @ w_NK.double().T
    # Each of the three products sums at most K terms whose squares add up to |x| |w|.
    limit_TN = 3 * in_features * EPS * x_TK.norm(dim=-1)[:, None] * w_NK.norm(dim=-1)[None]
    assert ((found - expected).abs() <= limit_TN).all()


def test_the_rotation_spreads_one_outlier_evenly_over_its_block():
    x_TK = torch.zeros(1, 192)  # three blocks of 64, entries of 1/8
    x_TK[0, 70] = 8.0
    assert rotate(x_TK).abs().tolist() == [[0.0] * 64 + [1.0] * 64 + [0.0] * 64]


def test_the_first_column_of_each_block_holds_the_signs_of_its_inputs():
    # The first column of a Hadamard matrix is all ones, so only the sign of the input is left.
    # REGRESSION: the signs are part of the checkpoint format, frozen as of version 0.1.0. They
    # are 1 - 2 x bit 16 of a multiplicative hash of index + 1 (numerics._signs).
    found_K = rotate(torch.eye(64))[:, 0] * 8
    text = "".join("+" if sign > 0 else "-" for sign in found_K.tolist())
    assert text == "-+---++++++---+--++++++--+-++---++-+-+----+-+++--+--++---+---+--"


def test_signs_depend_on_the_index_alone():
    # 7 inputs have blocks of 1: the rotation is the signs themselves.
    small_K, large_K = rotate(torch.ones(7)), rotate(torch.ones(4095))
    assert torch.equal(small_K, large_K[:7])


def test_signs_are_balanced():
    # 4095 fair coins: 5 standard deviations are 5 x sqrt(4095) = 320.
    assert abs(rotate(torch.ones(4095)).sum()) < 320


# --- checks -----------------------------------------------------------------------------------


def test_groups_that_do_not_divide_are_refused_with_a_way_out():
    message = (
        "layers.0.up has 96 input features, not a multiple of the group size 64 of "
        "w4a16_g64_sym; offer a smaller group or 'row'"
    )
    with pytest.raises(ValueError, match=message):
        check_groups(96, Scheme.parse("w4a16_g64_sym"), "layers.0.up")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_and_named(bad):
    with pytest.raises(ValueError, match="up: 1 of 3 values are NaN or infinite; the model or"):
        check_finite(torch.tensor([1.0, bad, 2.0]), "up")

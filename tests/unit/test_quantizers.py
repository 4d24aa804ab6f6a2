"""Quantizers: small cases by hand, GPTQ against a slow loop, and what theory says of both."""

import math

import pytest
import torch

from mxq.numerics import QuantizedWeight, dequantize, rotate, round_to_grid, search_grid
from mxq.quantizers import Method, per_matrix, quantize_gptq, quantize_rtn
from mxq.quantizers.choose import (
    BatchInputs,
    BlockInputs,
    Candidate,
    make_batch,
    make_inputs,
    quantize_batch,
    quantize_schemes,
)
from mxq.quantizers.gptq import COLUMN_BLOCK
from mxq.quantizers.moments import isotropic, rotate_moments, second_moments, shrink
from mxq.scheme import Scheme

EPS = torch.finfo(torch.float32).eps
ROW2 = Scheme.parse("w2a16_grow_asym")
RTN, GPTQ = Method("rtn", quantize_rtn), Method("gptq", quantize_gptq)
GROUP3 = Scheme.parse("w3a16_g32_asym")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens, k, seed=0):
    """Inputs with unequal powers and strong correlations, as activations have."""
    mix_KK = torch.eye(k) + 1.4 * random(k, k, seed=seed + 100) / k**0.5
    return (random(tokens, k, seed=seed) @ mix_KK) * random(k, seed=seed + 200).exp()


def moments_of(x_TK):
    return x_TK.T @ x_TK / len(x_TK)


def slightly_indefinite():
    """Eigenvalue -0.05 of a mean diagonal near 1: a damping of 0.01 is not enough, 0.1 is."""
    hessian_KK = moments_of(correlated_inputs(200, 64))
    values_K, vectors_KK = torch.linalg.eigh(hessian_KK / hessian_KK.diagonal().mean())
    values_K[0] = -0.05
    return vectors_KK @ torch.diag(values_K) @ vectors_KK.T


def output_loss(q, w_NK, hessian_KK):
    delta_NK = dequantize(q) - w_NK
    return float(((delta_NK @ hessian_KK) * delta_NK).sum())


# --- round to nearest -------------------------------------------------------------------------


def test_rtn_on_a_grid_without_error_by_hand():
    # Range 0 to 6 in 3 steps of 2: every weight is a point of the grid.
    q = quantize_rtn(torch.tensor([[0.0, 2.0, 4.0, 6.0]]), ROW2)
    assert q.codes_NK.tolist() == [[0, 1, 2, 3]]
    assert (q.scale_NG.tolist(), q.zero_NG.tolist()) == ([[2.0]], [[0]])


def test_rtn_refits_its_scale_by_least_squares():
    # Codes 0, 1, 2, 3 for 0, 1.1, 1.9, 3: the scale is (1.1 + 2x1.9 + 3x3) / (1 + 4 + 9) = 13.9/14.
    q = quantize_rtn(torch.tensor([[0.0, 1.1, 1.9, 3.0]]), ROW2)
    assert q.codes_NK.tolist() == [[0, 1, 2, 3]]
    assert q.scale_NG.item() == torch.tensor(13.9 / 14).half().item()


def test_codes_of_rtn_are_the_nearest_of_its_grid():
    w_NK, hessian_KK = random(4, 64), moments_of(random(99, 64))
    q = quantize_rtn(w_NK, GROUP3, hessian_KK)
    grid_C = torch.arange(8.0)
    scale_NK = q.scale_NG.float().repeat_interleave(32, 1)
    zero_NK = q.zero_NG.float().repeat_interleave(32, 1)
    points_NKC = (grid_C - zero_NK[..., None]) * scale_NK[..., None]
    nearest_NK = (points_NKC - w_NK[..., None]).abs().argmin(-1)
    assert torch.equal(q.codes_NK.long(), nearest_NK)


@pytest.mark.parametrize("quantizer", [quantize_rtn, quantize_gptq])
def test_a_group_that_does_not_divide_is_refused(quantizer):
    with pytest.raises(ValueError, match="the weight has 48 input features, not a multiple of"):
        quantizer(random(4, 48), GROUP3, torch.eye(48))


# --- GPTQ -------------------------------------------------------------------------------------


def slow_gptq(w_NK, scheme, hessian_KK):
    """Optimal brain surgeon, one column at a time, in float64.

    After a column is rounded, the rest moves by -error / [H^-1]_00 x [H^-1]_0:, where H is the
    damped Hessian of the columns that are left, inverted anew each time: no Cholesky factor. The
    damping is 1 % of the mean diagonal.
    """
    scale_NG, zero_NG = search_grid(w_NK, scheme, hessian_KK.diagonal())
    per_group = w_NK.shape[1] // scale_NG.shape[1]
    h, w = hessian_KK.double(), w_NK.double().clone()
    mean = h.diagonal().mean()
    h = h + 0.01 * mean * torch.eye(len(h))
    left = sorted(range(w.shape[1]), key=lambda k: -float(hessian_KK[k, k]))
    codes_NK = torch.empty(w.shape, dtype=torch.uint8)
    while left:
        k = left[0]
        scale_N, zero_N = (t[:, k // per_group].double() for t in (scale_NG, zero_NG))
        code_N = (w[:, k] / scale_N + zero_N).round().clamp(0, 2**scheme.w_bits - 1)
        codes_NK[:, k] = code_N.to(torch.uint8)
        inverse = torch.linalg.inv(h[left][:, left])
        error_N = w[:, k] - (code_N - zero_N) * scale_N
        w[:, left] -= error_N[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return codes_NK


# K beyond one block of columns and not a multiple of it; one group and several.
@pytest.mark.parametrize(
    ("text", "k"),
    [
        ("w2a16_grow_asym", 80),
        ("w3a16_g32_asym", 64),
        ("w4a16_g32_sym", 96),
        ("w4a16_grow_sym", 20),
        ("w8a16_g64_asym", 64),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_gptq_equals_a_slow_loop_code_for_code(text, k, seed):
    # Both round the same numbers, one in float32 and one in float64; a code could differ only for
    # a number within some 1e-5 of a tie, of which these seeds have none.
    scheme = Scheme.parse(text)
    w_NK, hessian_KK = random(6, k, seed=seed), moments_of(correlated_inputs(2 * k, k, seed))
    q = quantize_gptq(w_NK, scheme, hessian_KK)
    assert torch.equal(q.codes_NK, slow_gptq(w_NK, scheme, hessian_KK))


def test_the_slow_loop_sees_more_than_one_block_of_columns():
    assert COLUMN_BLOCK < 64


def test_gptq_keeps_the_grid_that_the_search_found():
    w_NK, hessian_KK = random(6, 64), moments_of(correlated_inputs(200, 64))
    scale_NG, zero_NG = search_grid(w_NK, GROUP3, hessian_KK.diagonal())
    q = quantize_gptq(w_NK, GROUP3, hessian_KK)
    assert torch.equal(q.scale_NG.float(), scale_NG)
    assert torch.equal(q.zero_NG.float(), zero_NG)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("text", ["w2a16_g32_asym", "w3a16_g64_sym", "w4a16_grow_asym"])
def test_gptq_is_worse_on_the_weight_and_better_on_the_output(text, seed):
    # Theory: on one grid, rounding to nearest is the best there is for the weight itself.
    scheme = Scheme.parse(text)
    w_NK, hessian_KK = random(16, 64, seed=seed), moments_of(correlated_inputs(256, 64, seed))
    rtn, gptq = (f(w_NK, scheme, hessian_KK) for f in (quantize_rtn, quantize_gptq))
    assert (dequantize(gptq) - w_NK).norm() > (dequantize(rtn) - w_NK).norm()
    assert output_loss(gptq, w_NK, hessian_KK) < output_loss(rtn, w_NK, hessian_KK)


@pytest.mark.parametrize("quantizer", [quantize_rtn, quantize_gptq])
def test_more_bits_lose_less(quantizer):
    w_NK, hessian_KK = random(16, 64), moments_of(correlated_inputs(256, 64))
    schemes = [Scheme.parse(f"w{bits}a16_g32_asym") for bits in (2, 3, 4, 5, 6, 8)]
    losses = [output_loss(quantizer(w_NK, s, hessian_KK), w_NK, hessian_KK) for s in schemes]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("quantizer", [quantize_rtn, quantize_gptq])
def test_a_batch_equals_its_matrices_one_by_one(quantizer):
    w_BNK = random(3, 8, 64)
    hessian_BKK = torch.stack([moments_of(correlated_inputs(200, 64, seed)) for seed in range(3)])
    # One member needs more damping than the others, and gets it alone.
    hessian_BKK[1] = slightly_indefinite()
    batch = quantizer(w_BNK, GROUP3, hessian_BKK)
    for index in range(3):
        single = quantizer(w_BNK[index], GROUP3, hessian_BKK[index])
        assert torch.equal(batch[index].codes_NK, single.codes_NK)
        assert torch.equal(batch[index].scale_NG, single.scale_NG)
        assert torch.equal(batch[index].zero_NG, single.zero_NG)


def test_inputs_that_never_occur_keep_their_nearest_codes():
    x_TK = correlated_inputs(200, 64)
    dead = [0, 5, 33, 63]
    x_TK[:, dead] = 0.0
    w_NK, hessian_KK = random(8, 64), moments_of(x_TK)
    q = quantize_gptq(w_NK, GROUP3, hessian_KK)
    scale_NG, zero_NG = search_grid(w_NK, GROUP3, hessian_KK.diagonal())
    nearest_NK = round_to_grid(w_NK, scale_NG, zero_NG, GROUP3)
    assert torch.equal(q.codes_NK[:, dead], nearest_NK[:, dead])
    assert not torch.equal(q.codes_NK, nearest_NK)


def test_independent_inputs_are_rounded_to_nearest():
    # A diagonal Hessian leaves nothing to make up for.
    hessian_KK = torch.diag(random(64).exp())
    w_NK = random(8, 64)
    gptq, rtn = (f(w_NK, GROUP3, hessian_KK) for f in (quantize_gptq, quantize_rtn))
    assert torch.equal(gptq.codes_NK, rtn.codes_NK)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_a_singular_hessian_still_helps(tokens):
    w_NK, hessian_KK = random(8, 64), moments_of(correlated_inputs(tokens, 64))
    rtn, gptq = (f(w_NK, GROUP3, hessian_KK) for f in (quantize_rtn, quantize_gptq))
    assert output_loss(gptq, w_NK, hessian_KK) < output_loss(rtn, w_NK, hessian_KK)


def test_a_hessian_of_zeros_is_rounding_to_nearest():
    w_NK = random(8, 64)
    gptq, rtn = quantize_gptq(w_NK, GROUP3, torch.zeros(64, 64)), quantize_rtn(w_NK, GROUP3)
    assert torch.equal(gptq.codes_NK, rtn.codes_NK)


def test_damping_is_raised_for_a_hessian_that_is_slightly_indefinite():
    w_NK = random(8, 64)
    q = quantize_gptq(w_NK, GROUP3, slightly_indefinite())
    assert (dequantize(q) - w_NK).norm() < w_NK.norm()


def test_a_hessian_that_no_damping_repairs_is_refused():
    hessian_KK = torch.zeros(64, 64)
    hessian_KK[0, 1] = hessian_KK[1, 0] = 1e9  # far larger than its diagonal
    hessian_KK += torch.eye(64)
    with pytest.raises(ValueError, match="are not positive definite, even damped"):
        quantize_gptq(random(8, 64), GROUP3, hessian_KK)


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="second moments of the inputs are not finite"):
        quantize_gptq(random(8, 64), GROUP3, torch.full((64, 64), math.nan))


@pytest.mark.parametrize("text", ["w3a16_g32_asym", "fp8", "bf16"])
def test_gptq_without_hessian_is_round_to_nearest(text):
    w_NK, scheme = random(8, 64), Scheme.parse(text)
    gptq, rtn = quantize_gptq(w_NK, scheme), quantize_rtn(w_NK, scheme)
    assert torch.equal(dequantize(gptq), dequantize(rtn))


def test_gptq_leaves_weight_and_hessian_as_they_were():
    w_BNK, hessian_BKK = random(2, 4, 64), moments_of(random(99, 64)).expand(2, 64, 64).clone()
    before = w_BNK.clone(), hessian_BKK.clone()
    quantize_gptq(w_BNK, GROUP3, hessian_BKK)
    assert torch.equal(w_BNK, before[0])
    assert torch.equal(hessian_BKK, before[1])


# --- quantizers of one's own ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["w3a16_g32_asym", "w3a16_g32_sym", "bf16"])
@pytest.mark.parametrize("with_hessian", [False, True])
def test_per_matrix_gives_each_matrix_with_its_hessian(text, with_hessian):
    scheme, seen = Scheme.parse(text), []

    def mine(w_NK, scheme, hessian_KK):
        seen.append((w_NK.shape, None if hessian_KK is None else hessian_KK[0, 0].item()))
        return quantize_rtn(w_NK, scheme, hessian_KK)

    w_BNK = random(2, 4, 64)
    hessian_BKK = torch.stack([torch.eye(64), 2 * torch.eye(64)]) if with_hessian else None
    q = per_matrix(mine)(w_BNK, scheme, hessian_BKK)
    assert seen == [((4, 64), h) for h in ((1.0, 2.0) if with_hessian else (None, None))]
    assert torch.equal(dequantize(q), dequantize(quantize_rtn(w_BNK, scheme, hessian_BKK)))
    assert (q.zero_NG is None) == (scheme.symmetric or scheme.kind == "bf16")


def test_per_matrix_takes_a_single_matrix_as_it_is():
    w_NK = random(4, 64)
    found = per_matrix(quantize_rtn)(w_NK, GROUP3, None)
    assert torch.equal(found.codes_NK, quantize_rtn(w_NK, GROUP3).codes_NK)


# --- the better of two on held-out inputs -----------------------------------------------------


def batch_of(w_BNK, judges):
    names = tuple(f"block {index}" for index in range(len(w_BNK)))
    hessian_BKK = torch.stack([moments_of(correlated_inputs(200, 64))] * len(w_BNK))
    return make_batch(names, w_BNK, BatchInputs(hessian_BKK, tuple(judges)))


def shifted(amount_by_block):
    """A quantizer that is exact but for a constant error in the first input of each block."""

    def mine(w_BNK, scheme, hessian_BKK):
        w_BNK = w_BNK.clone()
        w_BNK[:, :, 0] += torch.tensor(amount_by_block)[:, None]
        return QuantizedWeight(w_BNK, None, None, scheme)

    return mine


def test_the_quantizer_that_is_better_on_the_judges_is_kept_for_each_block():
    # Block 0 is exact, block 1 is off by 100 in an input that occurs, block 2 in one that does not.
    x_TK = correlated_inputs(20, 64)
    silent_TK = x_TK.clone()
    silent_TK[:, 0] = 0.0
    ones_T = torch.ones(20)
    batch = batch_of(random(3, 4, 64), [(x_TK, ones_T), (x_TK, ones_T), (silent_TK, ones_T)])
    found = quantize_batch(batch, GROUP3, Method("mine", shifted([0.0, 100.0, 100.0])))
    assert [c.quantizer for c in found] == ["mine", "rtn", "mine"]
    assert [c.block for c in found] == ["block 0", "block 1", "block 2"]
    rtn = quantize_rtn(batch.w_BNK, GROUP3, batch.inputs.hessian_BKK)
    assert torch.equal(found[1].dense(), dequantize(rtn)[1])


def test_judges_count_as_their_squared_routing_weights_say():
    # The error is in input 0, which occurs only in a token that the judge gives no weight.
    x_TK = torch.zeros(9, 64)
    x_TK[0, 0] = 1.0
    x_TK[1:] = random(8, 64)
    x_TK[1:, 0] = 0.0
    weight_T = torch.ones(9)
    weight_T[0] = 0.0
    batch = batch_of(random(2, 4, 64), [(x_TK, torch.ones(9)), (x_TK, weight_T)])
    found = quantize_batch(batch, GROUP3, Method("mine", shifted([100.0, 100.0])))
    assert [c.quantizer for c in found] == ["rtn", "mine"]


def test_without_inputs_the_weight_itself_is_judged():
    nothing = (torch.zeros(0, 64), torch.zeros(0))
    batch = batch_of(random(2, 4, 64), [nothing, nothing])
    found = quantize_batch(batch, GROUP3, Method("mine", shifted([0.0, 100.0])))
    assert [c.quantizer for c in found] == ["mine", "rtn"]


def test_gptq_is_kept_where_it_is_better_on_the_tokens_it_was_fitted_to():
    x_TK = correlated_inputs(256, 64)
    known = make_inputs([BlockInputs("up", x_TK, torch.ones(256), 256)], moments_of(x_TK))
    batch = make_batch(["up"], [random(16, 64)], known)
    found = quantize_batch(batch, Scheme.parse("w2a16_g32_asym"), GPTQ)
    assert found[0].quantizer == "gptq"


def test_a_quantizer_that_gives_nan_names_block_and_scheme():
    x_TK = random(9, 64)
    batch = batch_of(random(2, 4, 64), [(x_TK, torch.ones(9))] * 2)
    message = r"quantized block 1 \(w3a16_g32_asym\): 4 of 256 values are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        quantize_batch(batch, GROUP3, Method("mine", shifted([0.0, math.nan])))


def test_bfloat16_keeps_the_weight_of_the_unrotated_frame():
    w_BNK = random(2, 4, 64)
    plain = batch_of(w_BNK, [(random(9, 64), torch.ones(9))] * 2)
    batch = make_batch(plain.names, w_BNK, plain.inputs.turned)
    found = quantize_batch(batch, Scheme.parse("bf16"), GPTQ)
    assert [c.quantizer for c in found] == ["none", "none"]
    assert torch.equal(found[1].dense(), w_BNK[1].bfloat16().float())


# --- a batch from its inputs ------------------------------------------------------------------


def inputs(name="up", *, tokens=20, fit_rows=12, gate=1.0, k=64):
    gate_T = torch.full((tokens,), gate)
    return BlockInputs(name, random(tokens, k, seed=5), gate_T, fit_rows)


def test_held_out_tokens_judge_if_there_are_eight():
    known = make_inputs([inputs(fit_rows=12), inputs(fit_rows=13)], None)
    assert [len(x_TK) for x_TK, _ in known.judges] == [8, 20]


def test_the_hessian_weighs_each_token_by_its_squared_gate():
    # Tokens (1, 0) at gate 1 and (0, 1) at gate 3: weights 1 and 9 of 10. The prior of 0.125 x 2
    # tokens: (2 x diag(0.1, 0.9) + 0.25 x 4 I) / 2.25.
    x_TK, gate_T = torch.eye(2), torch.tensor([1.0, 3.0])
    known = make_inputs([BlockInputs("up", x_TK, gate_T, 2)], 4 * torch.eye(2))
    expected = torch.tensor([[(0.2 + 1) / 2.25, 0.0], [0.0, (1.8 + 1) / 2.25]])
    # Three roundings of positive numbers.
    assert torch.allclose(known.hessian_BKK[0], expected, rtol=4 * EPS, atol=0.0)
    assert known.judges[0][1].tolist() == [1.0, 9.0]


def test_only_fit_rows_enter_the_hessian():
    one = inputs()
    x_TK = one.x_TK.clone()
    x_TK[12:] = 1e6
    other = BlockInputs(one.name, x_TK, one.gate_T, one.fit_rows)
    found = [make_inputs([block], torch.eye(64)).hessian_BKK for block in (one, other)]
    assert torch.equal(*found)


def test_a_block_without_tokens_has_the_hessian_of_its_prior():
    nothing = BlockInputs("up", torch.zeros(0, 8), torch.zeros(0), 0)
    prior_KK = moments_of(random(20, 8))
    known = make_inputs([nothing], prior_KK)
    # (0 x 0 + n0 P) / (0 + n0): one product and one quotient.
    assert torch.allclose(known.hessian_BKK[0], prior_KK, rtol=2 * EPS, atol=0.0)
    assert torch.equal(make_inputs([nothing], None).hessian_BKK[0], torch.eye(8))


def test_values_that_are_not_finite_name_the_block():
    block, w_NK = inputs(), random(4, 64)
    w_NK[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"^up: 1 of"):
        make_batch(["up"], [w_NK], make_inputs([block], None))
    block.x_TK[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^inputs of up: 1"):
        make_inputs([block], None)


def test_some_blocks_of_a_batch_are_quantized_as_in_all_of_it():
    blocks = [inputs(name) for name in ("a", "b", "c")]
    for place, block in enumerate(blocks):
        block.x_TK[:, 3 * place] *= 9.0
    weights = [random(8, 64, seed=place) for place in range(3)]
    whole = make_inputs(blocks, None).turned
    found = quantize_batch(make_batch("abc", weights, whole), GROUP3, GPTQ)
    part = make_batch("ca", [weights[2], weights[0]], whole.select([2, 0]))
    some = quantize_batch(part, GROUP3, GPTQ)
    assert [candidate.block for candidate in some] == ["c", "a"]
    for one, other in zip(some, (found[2], found[0]), strict=True):
        assert torch.equal(one.dense(), other.dense())


@pytest.mark.parametrize("text", ["w4a16_g32_asym", "w8a8_grow_sym", "fp8"])
def test_a_rotated_candidate_acts_on_unrotated_inputs(text):
    # 4 bits and 8 x 8 bits are off by some percent, a rotation on one side only by 100.
    x_TK = random(9, 64)
    w_NK = random(4, 64)
    batch = make_batch(["up"], [w_NK], make_inputs([inputs()], None).turned)
    found = quantize_batch(batch, Scheme.parse(text), RTN)[0]
    expected = x_TK @ w_NK.T
    assert found.rotated
    assert (found.output(x_TK) - expected).norm() < 0.12 * expected.norm()
    if found.weight.scheme.a_bits == 16:
        limit = 64 * EPS * x_TK.norm(dim=-1).max() * found.dense().norm(dim=-1).max()
        assert (found.output(x_TK) - rotate(x_TK) @ dequantize(found.weight).T).abs().max() < limit


def test_inputs_are_rounded_as_the_scheme_says_by_hand():
    # Token (127, 1.4) at 8 bits is (127, 1); the weight (1, 10) is exact, so 137 and not 141.
    q = QuantizedWeight(
        torch.tensor([[1, 10]], dtype=torch.uint8),
        torch.ones(1, 1).half(),
        torch.zeros(1, 1, dtype=torch.uint8),
        Scheme.parse("w8a8_grow_asym"),
    )
    found = Candidate("up", q, "rtn", rotated=False).output(torch.tensor([[127.0, 1.4]]))
    assert found.tolist() == [[137.0]]


# --- moments ----------------------------------------------------------------------------------


def test_second_moments_by_hand():
    # Tokens (1, 2) with weight 1 and (3, 0) with weight 3: (1 + 27, 2, 4) / 4.
    found = second_moments(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 3.0]))
    assert found.tolist() == [[7.0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize("tokens", [0, 3])
def test_second_moments_without_weight_are_zero(tokens):
    assert not second_moments(torch.ones(tokens, 2), torch.zeros(tokens)).any()


def test_shrinkage_by_hand():
    # 8 inputs: the prior counts as 1 token, so (3 x 2 + 1 x 10) / 4 = 4.
    found = shrink(torch.full((8, 8), 2.0), 3, torch.full((8, 8), 10.0))
    assert torch.equal(found, torch.full((8, 8), 4.0))


def test_the_isotropic_prior_keeps_the_trace():
    assert isotropic(torch.tensor([[1.0, 7.0], [7.0, 3.0]])).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    assert isotropic(torch.zeros(2, 2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_rotated_moments_are_those_of_rotated_inputs():
    x_TK = random(50, 96)
    found, expected = rotate_moments(moments_of(x_TK)), moments_of(rotate(x_TK))
    # Three sums of at most 96 terms, none larger than the largest mean square of a block.
    assert (found - expected).abs().max() < 3 * 96 * EPS * moments_of(x_TK).diagonal().max()


def test_schemes_that_share_their_columns_are_as_each_alone():
    x_TK = random(60, 64)
    blocks = [BlockInputs(name, x_TK, torch.ones(60), 40) for name in ("a", "b")]
    known = make_inputs(blocks, moments_of(x_TK))
    batch = make_batch(["a", "b"], [random(8, 64)] * 2, known)
    schemes = [Scheme.parse(text) for text in ("w2a16_g32_asym", "bf16", "w3a16_grow_sym", "fp8")]
    functions = {"gptq": quantize_gptq, "rtn": quantize_rtn, "none": quantize_rtn}
    for scheme, found in zip(schemes, quantize_schemes(batch, schemes, GPTQ), strict=True):
        for index, candidate in enumerate(found):
            quantizer = functions[candidate.quantizer]
            expected = quantizer(batch.w_BNK, scheme, batch.inputs.hessian_BKK)[index]
            assert torch.equal(dequantize(candidate.weight), dequantize(expected))
    assert found[0].weight.scheme == schemes[-1]

"""Refinement of codes and scales, and fitting to the original model: by hand, and against loops."""

from dataclasses import replace

import pytest
import torch

from mxq.numerics import QuantizedWeight, dequantize, rotate
from mxq.quantizers import Method, quantize_gptq, quantize_refined, quantize_rtn, refine
from mxq.quantizers.choose import BlockInputs, make_batch, make_inputs, quantize_batch
from mxq.quantizers.target import Deviation, regress, trusted_share
from mxq.scheme import Scheme

ROW2, GROUP2 = Scheme.parse("w2a16_grow_asym"), Scheme.parse("w2a16_g64_asym")
SCHEMES = ["w2a16_g64_asym", "w3a16_g64_sym", "w2a16_grow_asym", "w8a16_g64_asym"]
REFINED = Method("refined", quantize_refined)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(seed=0, n=12, k=192):
    """A weight and second moments of correlated inputs of unequal power."""
    mix_KK = torch.eye(k) + 1.4 * random(k, k, seed=seed + 1) / k**0.5
    x_TK = (random(500, k, seed=seed + 2) @ mix_KK) * random(k, seed=seed + 3).exp()
    return random(n, k, seed=seed + 4), x_TK.T @ x_TK / len(x_TK)


def damped(hessian_KK):
    return hessian_KK + 0.05 * hessian_KK.diagonal().mean() * torch.eye(len(hessian_KK))


def loss_of_rows(w_hat_NK, w_NK, hessian_KK):
    delta_NK = (w_hat_NK - w_NK).double()
    return ((delta_NK @ hessian_KK.double()) * delta_NK).sum(-1)


def zeros_of(q):
    if q.zero_NG is not None:
        return q.zero_NG.double()
    return torch.full(q.scale_NG.shape, 2.0 ** (q.scheme.w_bits - 1), dtype=torch.float64)


def slow_refine(w_NK, q, hessian_KK, sweeps):
    """One column after the other in float64, the whole error matrix made anew for each step."""
    h, w = damped(hessian_KK).double(), w_NK.double()
    scale_NG, zero_NG = q.scale_NG.double(), zeros_of(q)
    size = w.shape[1] // scale_NG.shape[1]
    steps_NK = q.codes_NK.double() - zero_NG.repeat_interleave(size, 1)

    def slopes():
        return (steps_NK * scale_NG.repeat_interleave(size, 1) - w) @ h

    for _ in range(sweeps):
        for group in range(scale_NG.shape[1]):
            own = slice(group * size, (group + 1) * size)
            norm_N = ((steps_NK[:, own] @ h[own, own]) * steps_NK[:, own]).sum(1)
            scale_NG[:, group] -= (slopes()[:, own] * steps_NK[:, own]).sum(1) / norm_N
            scale_NG[:, group] = scale_NG[:, group].half().double()
            for k in range(own.start, own.stop):
                best_N = steps_NK[:, k] - slopes()[:, k] / (scale_NG[:, group] * h[k, k])
                code_N = (best_N.round() + zero_NG[:, group]).clamp(0, 2**q.scheme.w_bits - 1)
                steps_NK[:, k] = code_N - zero_NG[:, group]
    codes_NK = (steps_NK + zero_NG.repeat_interleave(size, 1)).to(torch.uint8)
    return QuantizedWeight(codes_NK, scale_NG.half(), q.zero_NG, q.scheme)


@pytest.mark.parametrize("text", SCHEMES)
def test_refinement_equals_a_slow_loop_code_for_code(text, monkeypatch):
    monkeypatch.setattr(refine, "SWEEPS", 2)
    w_NK, hessian_KK = problem()
    start = quantize_gptq(w_NK, Scheme.parse(text), hessian_KK)
    found = refine.refine(w_NK, start, hessian_KK)
    expected = slow_refine(w_NK, start, hessian_KK, 2)
    assert torch.equal(found.codes_NK, expected.codes_NK)
    assert torch.equal(found.scale_NG, expected.scale_NG)
    assert not torch.equal(found.codes_NK, start.codes_NK)
    assert not torch.equal(found.scale_NG, start.scale_NG)


@pytest.mark.parametrize("text", SCHEMES)
def test_every_sweep_loses_less(text, monkeypatch):
    w_NK, hessian_KK = problem(seed=10)
    q = quantize_gptq(w_NK, Scheme.parse(text), hessian_KK)
    monkeypatch.setattr(refine, "SWEEPS", 1)
    losses = []
    for _ in range(4):
        losses.append(loss_of_rows(dequantize(q), w_NK, damped(hessian_KK)).sum())
        q = refine.refine(w_NK, q, hessian_KK)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_no_single_code_is_better_in_the_end(monkeypatch):
    monkeypatch.setattr(refine, "SWEEPS", 60)
    w_NK, hessian_KK = problem(seed=20, n=3, k=64)
    q = quantize_refined(w_NK, GROUP2, hessian_KK)
    least_N = loss_of_rows(dequantize(q), w_NK, damped(hessian_KK))
    for k in range(64):
        for code in range(4):
            codes_NK = q.codes_NK.clone()
            codes_NK[:, k] = code
            other = dequantize(QuantizedWeight(codes_NK, q.scale_NG, q.zero_NG, q.scheme))
            assert (loss_of_rows(other, w_NK, damped(hessian_KK)) >= least_N * (1 - 1e-5)).all()


def test_a_weight_on_its_grid_stays():
    _, hessian_KK = problem(k=64)
    codes_NK = torch.arange(64).remainder(4).repeat(3, 1).to(torch.uint8)
    scale_NG, zero_NG = torch.full((3, 1), 0.25).half(), torch.ones(3, 1, dtype=torch.uint8)
    q = QuantizedWeight(codes_NK, scale_NG, zero_NG, GROUP2)
    found = refine.refine(dequantize(q), q, hessian_KK)
    assert torch.equal(found.codes_NK, codes_NK)
    assert torch.equal(found.scale_NG, scale_NG)
    assert torch.equal(found.zero_NG, zero_NG)


def test_a_row_of_zero_points_keeps_its_scale():
    # Every code is the zero point: no scale fits better than another.
    _, hessian_KK = problem(k=64)
    codes_NK, zero_NG = torch.ones(1, 64, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.uint8)
    q = QuantizedWeight(codes_NK, torch.full((1, 1), 0.5).half(), zero_NG, GROUP2)
    found = refine.refine(torch.zeros(1, 64), q, hessian_KK)
    assert found.scale_NG.item() == 0.5
    assert torch.equal(found.codes_NK, codes_NK)


def test_a_scale_stays_positive(monkeypatch):
    # All steps are 1 and the weight is below zero: only a scale of the other sign would fit, so
    # it waits for the codes.
    monkeypatch.setattr(refine, "SWEEPS", 1)
    codes_NK, zero_NG = torch.full((1, 64), 3, dtype=torch.uint8), torch.full((1, 1), 2)
    q = QuantizedWeight(codes_NK, torch.ones(1, 1).half(), zero_NG.to(torch.uint8), GROUP2)
    found = refine.refine(torch.full((1, 64), -4.0), q, torch.eye(64))
    assert found.scale_NG.item() == 1.0
    assert found.codes_NK.unique().tolist() == [0]


def test_a_batch_is_refined_as_its_matrices():
    w_NK, hessian_KK = problem(seed=30)
    other_NK, other_KK = problem(seed=40)
    both = torch.stack([w_NK, other_NK]), torch.stack([hessian_KK, other_KK])
    whole = quantize_refined(both[0], GROUP2, both[1])
    for place in range(2):
        alone = quantize_refined(both[0][place], GROUP2, both[1][place])
        assert torch.equal(whole[place].codes_NK, alone.codes_NK)
        assert torch.equal(whole[place].scale_NG, alone.scale_NG)


@pytest.mark.parametrize("text", ["fp8", "bf16"])
def test_formats_without_a_grid_are_left_alone(text):
    w_NK, hessian_KK = problem()
    found = quantize_refined(w_NK, Scheme.parse(text), hessian_KK)
    assert torch.equal(dequantize(found), dequantize(quantize_rtn(w_NK, Scheme.parse(text))))


def test_without_moments_nothing_is_refined():
    w_NK, _ = problem()
    found = quantize_refined(w_NK, GROUP2)
    assert torch.equal(found.codes_NK, quantize_rtn(w_NK, GROUP2).codes_NK)


def test_inputs_and_the_weight_are_left_as_they_were():
    w_NK, hessian_KK = problem()
    before = w_NK.clone(), hessian_KK.clone()
    q = quantize_gptq(w_NK, GROUP2, hessian_KK)
    codes_NK, scale_NG = q.codes_NK.clone(), q.scale_NG.clone()
    refine.refine(w_NK, q, hessian_KK)
    assert torch.equal(w_NK, before[0])
    assert torch.equal(hessian_KK, before[1])
    assert torch.equal(q.codes_NK, codes_NK)
    assert torch.equal(q.scale_NG, scale_NG)


def test_a_batch_that_shares_a_grid_is_refined_the_same():
    x_TK = random(900, 64, seed=1) @ (torch.eye(64) + 0.3 * random(64, 64, seed=3))
    inputs = make_inputs([BlockInputs("a", x_TK, torch.ones(900), 600)], None)
    w_NK = random(8, 64, seed=2)
    (found,) = quantize_batch(make_batch(["a"], [w_NK], inputs), GROUP2, REFINED)
    alone = quantize_refined(w_NK[None], GROUP2, inputs.hessian_BKK)[0]
    assert found.quantizer == "refined"
    assert torch.equal(found.weight.codes_NK, alone.codes_NK)
    assert torch.equal(found.weight.scale_NG, alone.scale_NG)


# --- the original model's inputs ----------------------------------------------------------------


def shifted(k=8, tokens=4000, seed=0):
    """Inputs, what the original model has in their place (x + A x), and A."""
    x_TK, a_KK = random(tokens, k, seed=seed), 0.3 * random(k, k, seed=seed + 1)
    return x_TK, x_TK + x_TK @ a_KK.T, a_KK


def test_the_regression_finds_how_inputs_differ():
    x_TK, origin_TK, a_KK = shifted()
    gate_T = random(len(x_TK), seed=5).square()
    moments_KK = (x_TK * gate_T[:, None]).T @ x_TK / gate_T.sum()
    found_KK = regress(x_TK, Deviation(x_TK, origin_TK), gate_T, moments_KK, 1.0)
    # Damped by 1 %.
    torch.testing.assert_close(found_KK, a_KK / 1.01, rtol=0.02, atol=0.005)
    half_KK = regress(x_TK, Deviation(x_TK, origin_TK), gate_T, moments_KK, 0.5)
    torch.testing.assert_close(half_KK, found_KK / 2)


def test_the_regression_weighs_tokens():
    x_TK = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    origin_TK = torch.tensor([[2.0, 0.0], [4.0, 0.0]])
    # Differences 1 and 3 with weights 3 and 1: mean 1.5.
    moments_KK = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found_KK = regress(x_TK, Deviation(x_TK, origin_TK), torch.tensor([3.0, 1.0]), moments_KK, 1.0)
    assert found_KK[0, 0].item() == pytest.approx(1.5 / 1.01)


def test_without_tokens_nothing_differs():
    nothing = torch.zeros(0, 4)
    wanted = Deviation(nothing, nothing)
    assert not regress(nothing, wanted, torch.zeros(0), torch.eye(4), 0.0).any()


def test_a_deviation_is_of_the_same_tokens():
    with pytest.raises(ValueError, match="96 tokens here, 192 there"):
        Deviation(torch.zeros(96, 4), torch.zeros(192, 4))


@pytest.mark.parametrize(("factor", "share"), [(1.0, 1.0), (0.25, 0.25), (-1.0, 0.0), (3.0, 1.0)])
def test_a_shift_is_trusted_as_far_as_it_is_confirmed(factor, share):
    x_TK, _, a_KK = shifted()
    origin_TK = x_TK + factor * (x_TK @ a_KK.T)
    found = trusted_share(a_KK, x_TK, Deviation(x_TK, origin_TK), torch.ones(len(x_TK)))
    assert found == pytest.approx(share, abs=1e-5)


def test_a_shift_of_nothing_is_not_trusted():
    x_TK = random(10, 4)
    assert trusted_share(torch.zeros(4, 4), x_TK, Deviation(x_TK, x_TK), torch.ones(10)) == 0.0


def test_a_block_is_fitted_to_its_output_on_the_originals_inputs():
    x_TK, origin_TK, _ = shifted(k=64)
    block = BlockInputs("a", x_TK, torch.ones(len(x_TK)), 3500, origin_TK)
    w_NK = random(4, 64, seed=9)
    batch = make_batch(["a"], [w_NK], make_inputs([block], None))
    # Uncompressed, the weight that is aimed at gives on x what the own one gives on the original's.
    wanted_TN = origin_TK @ w_NK.T
    error = (x_TK @ batch.w_BNK[0].T - wanted_TN).norm() / (x_TK @ w_NK.T - wanted_TN).norm()
    assert error < 0.03
    assert torch.equal(batch.plain_BNK[0], w_NK)


def lacking(k=64, n=4, share=0.5):
    """A block that reads x, and is to put out half of B x besides; B."""
    x_TK, b_NK = random(4000, k), random(n, k, seed=3)
    lack = Deviation(torch.ones(4000, n), 1 + x_TK @ b_NK.T, torch.full((4000,), share))
    gate_T = random(4000, seed=5)
    return BlockInputs("a", x_TK, gate_T, 3500, x_TK.clone(), lack), b_NK


def test_a_block_is_fitted_to_what_it_lacks_as_well():
    block, b_NK = lacking()
    inputs, w_NK = make_inputs([block], None), random(4, 64, seed=9)
    batch = make_batch(["a"], [w_NK], inputs)
    # Damped by as much again as there is, and trusted no further than that.
    found_NK = batch.w_BNK[0] - w_NK
    assert (found_NK - 0.25 * b_NK).norm() < 0.15 * (0.25 * b_NK).norm()
    assert torch.equal(batch.plain_BNK[0], w_NK)
    turned = make_batch(["a"], [w_NK], inputs.turned).w_BNK
    torch.testing.assert_close(turned, rotate(batch.w_BNK))


def test_a_lack_that_held_out_tokens_do_not_confirm_is_left():
    block, _ = lacking()
    origin_TN = block.lack.origin_TN.clone()
    origin_TN[3500:] = 2 - origin_TN[3500:]  # the other way round
    lack = Deviation(block.lack.now_TN, origin_TN, block.lack.share_T)
    inputs = make_inputs([replace(block, lack=lack)], None)
    assert not inputs.lack_BNK.any()


def test_some_blocks_of_a_batch_keep_their_own_lack():
    blocks = [replace(lacking(share=share)[0], name=str(share)) for share in (0.25, 0.5, 0.75)]
    whole = make_inputs(blocks, None)
    assert torch.equal(whole.select([2, 0]).lack_BNK, whole.lack_BNK[[2, 0]])
    assert not torch.equal(whole.lack_BNK[2], whole.lack_BNK[0])


def test_the_shift_is_taken_before_the_rotation():
    x_TK, origin_TK, _ = shifted(k=64)
    block = BlockInputs("a", x_TK, torch.ones(len(x_TK)), 3500, origin_TK)
    inputs, w_NK = make_inputs([block], None), random(4, 64, seed=9)
    plain = make_batch(["a"], [w_NK], inputs).w_BNK
    turned = make_batch(["a"], [w_NK], inputs.turned).w_BNK
    torch.testing.assert_close(turned, rotate(plain))


def test_bf16_keeps_the_weights_of_the_model():
    x_TK, origin_TK, _ = shifted(k=64)
    block = BlockInputs("a", x_TK, torch.ones(len(x_TK)), 3500, origin_TK)
    w_NK = random(4, 64, seed=9)
    batch = make_batch(["a"], [w_NK], make_inputs([block], None))
    (found,) = quantize_batch(batch, Scheme.parse("bf16"), REFINED)
    assert torch.equal(found.weight.codes_NK, w_NK.to(torch.bfloat16))


@pytest.mark.parametrize("tokens", [3500, 4000 - 7])
def test_without_held_out_tokens_no_shift_is_taken(tokens):
    x_TK, origin_TK, _ = shifted(k=64)
    block = BlockInputs("a", x_TK, torch.ones(len(x_TK)), tokens, origin_TK)
    assert bool(make_inputs([block], None).shift_BKK.any()) == (tokens == 3500)


def test_inputs_of_the_original_itself_shift_nothing():
    x_TK = random(400, 64)
    block = BlockInputs("a", x_TK, torch.ones(400), 350, x_TK.clone())
    w_NK = random(4, 64, seed=9)
    batch = make_batch(["a"], [w_NK], make_inputs([block], None))
    assert torch.equal(batch.w_BNK[0], w_NK)


def test_some_blocks_of_a_batch_keep_their_own_shift():
    blocks = [
        BlockInputs(name, x_TK, torch.ones(len(x_TK)), 3500, origin_TK)
        for name, seed in (("a", 1), ("b", 5), ("c", 9))
        for x_TK, origin_TK, _ in [shifted(64, seed=seed)]
    ]
    whole = make_inputs(blocks, None)
    assert torch.equal(whole.select([2, 0]).shift_BKK, whole.shift_BKK[[2, 0]])


def test_inputs_of_the_original_that_are_not_finite_name_the_block():
    x_TK, origin_TK, _ = shifted(k=64)
    origin_TK[5, 3] = torch.nan
    block = BlockInputs("a", x_TK, torch.ones(len(x_TK)), 3500, origin_TK)
    with pytest.raises(ValueError, match="inputs of a in the original model: 1 of"):
        make_inputs([block], None)

"""Refinement under second moments of inputs and of gradients: by hand, and against slow loops."""

from itertools import pairwise

import pytest
import torch
from tiny import save_tiny

from mxq import blocks
from mxq.artifacts import Provenance
from mxq.blocks import row_pieces
from mxq.choices import measure_settings
from mxq.config import MeasureOptions
from mxq.curvature import CurvatureFiles, joined
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.probes import SiteInputs
from mxq.models.source import open_source
from mxq.numerics import dequantize
from mxq.profiling.gradients import curvature_of
from mxq.quantizers import Method, descent, kronecker, quantize_kronecker, quantize_refined, refine
from mxq.quantizers.choose import BlockInputs, make_batch, make_inputs, quantize_batch
from mxq.quantizers.kronecker import refine_kronecker
from mxq.scheme import Scheme

SCHEMES = ["w2a16_g64_asym", "w3a16_g64_sym", "w2a16_grow_asym"]
KRONECKER = Method("kronecker", quantize_kronecker)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(width, seed):
    """Second moments of correlated values of unequal power."""
    mix = torch.eye(width) + 2 * random(width, width, seed=seed) / width**0.5
    values = (random(600, width, seed=seed + 1) @ mix) * random(width, seed=seed + 2).exp()
    return values.T @ values / len(values)


def problem(text, seed=0, n=24, k=128):
    """A weight, its refined form, and second moments of its inputs and gradients."""
    w_NK, hessian_KK, outer_NN = random(n, k, seed=seed), moments(k, seed + 1), moments(n, seed + 9)
    return w_NK, quantize_refined(w_NK, Scheme.parse(text), hessian_KK), hessian_KK, outer_NN


def damped(moments_KK, share):
    eye_KK = torch.eye(len(moments_KK), dtype=torch.float64)
    return moments_KK.double() + share * moments_KK.diagonal().double().mean() * eye_KK


def loss(q, w_NK, hessian_KK, outer_NN):
    """``tr(G E H E')`` of the damped moments, in float64."""
    error_NK = (dequantize(q) - w_NK).double()
    outer_NN = damped(outer_NN, kronecker.OUTER_DAMPING)
    return float(((outer_NN @ error_NK @ damped(hessian_KK, refine.DAMPING)) * error_NK).sum())


def refined_again(w_NK, q, hessian_KK, *outer):
    pieces = [outer_NN[None] for outer_NN in outer]
    return refine_kronecker(w_NK[None], q[None], hessian_KK[None], pieces)[0]


class Slow:
    """Sweeps in float64, the slope of the whole matrix made anew for each step."""

    def __init__(self, w_NK, q, hessian_KK, outer_NN, sweeps):
        self.h, self.g = (
            damped(hessian_KK, refine.DAMPING),
            damped(outer_NN, kronecker.OUTER_DAMPING),
        )
        self.w, self.scale_NG, self.top = w_NK.double(), q.scale_NG.double(), 2**q.scheme.w_bits - 1
        half = torch.full(q.scale_NG.shape, 2.0 ** (q.scheme.w_bits - 1), dtype=torch.float64)
        self.zero_NG = half if q.zero_NG is None else q.zero_NG.double()
        self.size = w_NK.shape[1] // q.scale_NG.shape[1]
        self.steps_NK = q.codes_NK.double() - self.of_columns(self.zero_NG)
        self.given_up = 0
        for sweep in range(sweeps):
            for group in range(q.scale_NG.shape[1]):
                own = slice(group * self.size, (group + 1) * self.size)
                self.fit(group, own)
                for k in range(own.start, own.stop):
                    self.round(group, k, first=k + sweep)

    def of_columns(self, grid_NG):
        return grid_NG.repeat_interleave(self.size, 1)

    def error(self, steps_NK, scale_NG):
        return steps_NK * self.of_columns(scale_NG) - self.w

    def slopes(self, steps_NK):
        return self.g @ self.error(steps_NK, self.scale_NG) @ self.h

    def loss(self, steps_NK, scale_NG):
        error_NK = self.error(steps_NK, scale_NG)
        return float(((self.g @ error_NK @ self.h) * error_NK).sum())

    def fit(self, group, own):
        codes_NC = self.steps_NK[:, own]
        norm_N = ((codes_NC @ self.h[own, own]) * codes_NC).sum(1) * self.g.diagonal()
        step_N = -(self.slopes(self.steps_NK)[:, own] * codes_NC).sum(1) / norm_N

        def moved(share):
            trial_NG = self.scale_NG.clone()
            trial_NG[:, group] += share * step_N
            return trial_NG

        # As far along as the loss falls, a parabola through three points; not beyond the step.
        at = [self.loss(self.steps_NK, moved(share)) for share in (0.0, 0.5, 1.0)]
        curve, slope = 2 * (at[2] - 2 * at[1] + at[0]), 4 * at[1] - 3 * at[0] - at[2]
        self.scale_NG = moved(min(1.0, -slope / (2 * curve)))
        self.scale_NG[:, group] = self.scale_NG[:, group].half().double()

    def best(self, row, group, k, steps_NK):
        """Steps of one row, if the others have those."""
        curve = self.scale_NG[row, group] * self.h[k, k] * self.g[row, row]
        zero = self.zero_NG[row, group]
        return (
            (steps_NK[row, k] - self.slopes(steps_NK)[row, k] / curve)
            .round()
            .clamp(-zero, self.top - zero)
        )

    def round(self, group, k, *, first):
        rows = range(len(self.w))
        changed_NK = self.steps_NK.clone()
        for row in rows:
            changed_NK[row, k] = self.best(row, group, k, self.steps_NK)
        for turn in range(descent.TURNS):
            trial_NK = changed_NK.clone()
            for row in rows:
                others_NK = changed_NK.clone()
                others_NK[row, k] = self.steps_NK[row, k]
                is_at_odds = self.best(row, group, k, others_NK) != changed_NK[row, k]
                if is_at_odds and ((row + first) >> turn) % 2 == 0:
                    self.given_up += int(trial_NK[row, k] != self.steps_NK[row, k])
                    trial_NK[row, k] = self.steps_NK[row, k]
            changed_NK = trial_NK
        if self.loss(changed_NK, self.scale_NG) < self.loss(self.steps_NK, self.scale_NG):
            self.steps_NK = changed_NK


@pytest.mark.parametrize("text", SCHEMES)
def test_sweeps_equal_a_slow_loop_code_for_code(text, monkeypatch):
    monkeypatch.setattr(kronecker, "SWEEPS", 2)
    w_NK, q, hessian_KK, outer_NN = problem(text, n=10)
    found = refined_again(w_NK, q, hessian_KK, outer_NN)
    expected = Slow(w_NK, q, hessian_KK, outer_NN, sweeps=2)
    codes_NK = expected.steps_NK + expected.of_columns(expected.zero_NG)
    assert torch.equal(found.codes_NK, codes_NK.to(torch.uint8))
    assert torch.equal(found.scale_NG, expected.scale_NG.half())
    assert not torch.equal(found.codes_NK, q.codes_NK)
    assert expected.given_up > 0  # rows were at odds


@pytest.mark.parametrize("text", SCHEMES)
def test_errors_of_outputs_make_up_for_each_other(text):
    w_NK, q, hessian_KK, outer_NN = problem(text)
    found = refined_again(w_NK, q, hessian_KK, outer_NN)
    assert loss(found, w_NK, hessian_KK, outer_NN) < 0.85 * loss(q, w_NK, hessian_KK, outer_NN)
    assert found.zero_NG is q.zero_NG or torch.equal(found.zero_NG, q.zero_NG)


def test_outputs_that_count_the_same_are_refined_as_without(monkeypatch):
    w_NK, q, hessian_KK, _ = problem("w2a16_g64_asym")
    monkeypatch.setattr(kronecker, "SWEEPS", refine.SWEEPS)
    again = refine.refine(w_NK, q, hessian_KK)
    found = refined_again(w_NK, q, hessian_KK, 7.0 * torch.eye(len(w_NK)))
    assert torch.equal(found.codes_NK, again.codes_NK)
    assert torch.equal(found.scale_NG, again.scale_NG)


def test_outputs_that_cost_nothing_keep_their_codes_finite():
    w_NK, q, hessian_KK, outer_NN = problem("w2a16_g64_asym")
    found = refined_again(w_NK, q, hessian_KK, torch.zeros_like(outer_NN))
    assert torch.isfinite(dequantize(found)).all()


@pytest.mark.parametrize("coupled", [0.0, 1.0, 100.0])
def test_no_sweep_makes_a_matrix_worse(coupled, monkeypatch):
    # Ones all over: whatever one row makes up for, all others would, too.
    w_NK, q, hessian_KK, outer_NN = problem("w2a16_g64_asym")
    outer_NN = outer_NN + coupled * outer_NN.diagonal().mean() * torch.ones_like(outer_NN)
    losses = [loss(q, w_NK, hessian_KK, outer_NN)]
    for sweeps in range(1, 5):
        monkeypatch.setattr(kronecker, "SWEEPS", sweeps)
        found = refined_again(w_NK, q, hessian_KK, outer_NN)
        losses.append(loss(found, w_NK, hessian_KK, outer_NN))
    # Scales are rounded to float16, which may cost 2^-11 of a weight's share of the loss.
    assert all(after < before * (1 + 2**-9) for before, after in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


def test_changes_that_lose_together_are_not_made(monkeypatch):
    # Nobody gives up, and all rows make up for the same error.
    monkeypatch.setattr(descent, "TURNS", 0)
    w_NK, q, hessian_KK, outer_NN = problem("w2a16_g64_asym")
    outer_NN = outer_NN + 100 * outer_NN.diagonal().mean() * torch.ones_like(outer_NN)
    found = refined_again(w_NK, q, hessian_KK, outer_NN)
    before, after = (loss(each, w_NK, hessian_KK, outer_NN) for each in (q, found))
    assert after < before * (1 + 2**-9)


def test_more_outputs_than_a_piece_are_refined_piece_by_piece(monkeypatch):
    w_NK, q, hessian_KK, outer_NN = problem("w2a16_g64_asym")
    monkeypatch.setattr(blocks, "PIECE_ROWS", 16)
    assert row_pieces(24) == [slice(0, 16), slice(16, 32)]
    found = refined_again(w_NK, q, hessian_KK, outer_NN[:16, :16], outer_NN[16:, 16:])
    for rows in (slice(0, 16), slice(16, 24)):
        part = type(q)(q.codes_NK[rows], q.scale_NG[rows], q.zero_NG[rows], q.scheme)
        alone = refined_again(w_NK[rows], part, hessian_KK, outer_NN[rows, rows])
        assert torch.equal(found.codes_NK[rows], alone.codes_NK)
        assert torch.equal(found.scale_NG[rows], alone.scale_NG)


# Choosing


def batch_of(outer):
    w_NK, x_TK = random(8, 64, seed=3), random(200, 64, seed=4) @ moments(64, 5)
    known = make_inputs([BlockInputs("a", x_TK, torch.ones(200), 150)], None)
    return make_batch(["a"], [w_NK], known, outer)


def test_a_block_with_known_gradients_is_refined_once_more():
    outer_NN = moments(8, 7)
    scheme = Scheme.parse("w2a16_grow_asym")
    [found] = quantize_batch(batch_of([outer_NN[None]]), scheme, KRONECKER)
    [plain] = quantize_batch(batch_of(None), scheme, KRONECKER)
    [refined] = quantize_batch(batch_of(None), scheme, Method("refined", quantize_refined))
    assert torch.equal(plain.weight.codes_NK, refined.weight.codes_NK)
    assert not torch.equal(found.weight.codes_NK, refined.weight.codes_NK)
    assert found.quantizer == "kronecker"


def test_quantizers_are_compared_by_what_outputs_cost(monkeypatch):
    # The own result misses the first output by little, rounding the second one by much.
    batch = batch_of([torch.diag(torch.tensor([100.0, *[1e-4] * 7]))[None]])
    w_BNK, asked = batch.w_BNK, Scheme.parse("w8a16_grow_asym")
    exact = quantize_kronecker(w_BNK, asked, None)
    worse_first, worse_second = exact.codes_NK.clone(), exact.codes_NK.clone()
    worse_first[0, 0] = worse_first[0, 0].flip(0)
    worse_second[0, 1] = worse_second[0, 1].flip(0)

    def of(codes):
        return type(exact)(codes, exact.scale_NG, exact.zero_NG, asked)

    monkeypatch.setattr(
        "mxq.quantizers.choose._options",
        lambda *_: [("first", of(worse_first)), ("second", of(worse_second))],
    )
    [picked] = quantize_batch(batch, asked, KRONECKER)
    assert picked.quantizer == "second"


def test_gradients_are_needed(tiny_adapter):
    options = MeasureOptions(quantizer="kronecker", sensitivity="output_mse")
    with pytest.raises(ValueError, match="choose --sensitivity fisher, or --quantizer refined"):
        measure_settings(tiny_adapter, options, None)


@pytest.fixture
def tiny_adapter(tmp_path):
    return ModelAdapter(open_source(save_tiny(tmp_path / "model")))


# Moments of gradients


def site(grad_TN, *, fit, routed=False):
    index = torch.zeros(len(grad_TN), 1, dtype=torch.int64) if routed else None
    store = ActivationStore()
    return SiteInputs("a", grad_TN, index, None, grad_TN, fit, store)


def test_moments_of_gradients_are_shrunk_and_leave_out_held_out_tokens():
    grad_TN = random(50, 6) * 1e-4 * torch.linspace(1, 3, 6)
    [found] = curvature_of({"a": site(grad_TN, fit=40)}, torch.device("cpu"))["a"]
    # Ledoit and Wolf (2004), lemmas 3.2 to 3.4, token by token.
    of_token_TNN = torch.stack([torch.outer(g, g) for g in grad_TN[:40].double()])
    own_NN = of_token_TNN.mean(0)
    plain_NN = torch.eye(6) * own_NN.trace() / 6
    noise = (of_token_TNN - own_NN).square().sum() / 40**2
    share = noise / (own_NN - plain_NN).square().sum()
    assert 0.05 < float(share) < 0.95
    expected = (share * plain_NN + (1 - share) * own_NN) / own_NN.diagonal().mean()
    assert found.dtype == torch.float16
    # Half a unit in the last place of float16, of values below 4.
    torch.testing.assert_close(found.double(), expected, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize(("large", "together"), [(1.0, 1.0), (1e4, 0.0)])
def test_gradients_that_few_tokens_carry_are_not_trusted(large, together):
    # 64 tokens alike, or one beside which the others vanish; eight outputs that go together.
    grad_TN = torch.ones(64, 8)
    grad_TN[5] = large
    [found] = curvature_of({"a": site(grad_TN, fit=64)}, torch.device("cpu"))["a"]
    assert float(found[0, 1]) == pytest.approx(together, abs=1e-3)
    assert float(found[0, 0]) == 1.0


@pytest.mark.parametrize(
    "grad_TN", [torch.zeros(4, 3), torch.eye(3).repeat(4, 1)], ids=["none", "alike"]
)
def test_gradients_that_tell_no_output_from_another_leave_all_the_same(grad_TN):
    [found] = curvature_of({"a": site(grad_TN, fit=len(grad_TN))}, torch.device("cpu"))["a"]
    assert torch.equal(found, torch.eye(3).half())


def test_experts_keep_all_of_it_and_linears_their_pieces(monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_ROWS", 4)
    grad_TN = random(50, 6)
    sites = {"linear": site(grad_TN, fit=50), "experts": site(grad_TN, fit=50, routed=True)}
    found = curvature_of(sites, torch.device("cpu"))
    assert [piece.shape[0] for piece in found["linear"]] == [4, 2]
    assert [piece.shape[0] for piece in found["experts"]] == [6]


def test_gradients_that_are_not_finite_are_named():
    grad_TN = random(9, 4)
    grad_TN[3, 1] = torch.nan
    with pytest.raises(ValueError, match="gradients at the output of a: 1 of 36 values"):
        curvature_of({"a": site(grad_TN, fit=9)}, torch.device("cpu"))


def test_files_come_back_as_they_were(tmp_path):
    pieces = tuple(torch.full((2, 2), float(place)).half() for place in range(12))
    files = CurvatureFiles(tmp_path / "curvature", Provenance("m", "c", {}, {}))
    assert not files.has(3)
    files.save(3, {"layers.3.experts": pieces, "layers.3.q_proj": (torch.eye(2),)})
    found = joined(files.load(3))
    assert files.has(3)
    assert [float(piece[0, 0]) for piece in found["layers.3.experts"]] == list(range(12))
    assert len(found["layers.3.q_proj"]) == 1


def test_files_of_another_text_are_refused(tmp_path):
    CurvatureFiles(tmp_path, Provenance("m", "c", {}, {})).save(0, {"a": (torch.eye(2),)})
    other = CurvatureFiles(tmp_path, Provenance("m", "other", {}, {}))
    assert not other.has(0)
    with pytest.raises(ValueError, match=r"layer-00000.* is absent or was made from"):
        other.load(0)


def test_damaged_files_are_made_anew(tmp_path):
    files = CurvatureFiles(tmp_path, Provenance("m", "c", {}, {}))
    (tmp_path / "layer-00000.safetensors").write_bytes(b"damaged")
    assert not files.has(0)

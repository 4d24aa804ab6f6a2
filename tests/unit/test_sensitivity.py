"""Sensitivity: each metric against a slow computation with the whole model in memory, float64."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import make_model, token_ids
from transformers import AutoModelForCausalLM

from mxq.artifacts import Provenance
from mxq.models.adapter import ModelAdapter
from mxq.models.probes import Probe
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.numerics import dequantize, rotate
from mxq.profiling.losses import MeasureSettings, _fit_factor
from mxq.profiling.measure import measure
from mxq.profiling.sensitivity import SENSITIVITY, LayerContext, Sensitivity
from mxq.profiling.table import UNROUTED_TOKENS
from mxq.quantizers import Method, quantize_gptq, quantize_rtn
from mxq.scheme import Scheme, parse_schemes

EPS = torch.finfo(torch.float32).eps
SCHEMES = parse_schemes("w2a16_g32_asym,w4a16_g32_asym")
PROVENANCE = Provenance("model", "text")
EXPERTS, INNER, NEVER = 5, 32, 4  # expert 4 of layer 1 never gets a token
FIT, HELDOUT = token_ids(3, 24, seed=1), token_ids(1, 24, seed=2)
TOKENS = 4 * 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random mixture of experts in two layers; one expert of layer 1 is never chosen."""
    model = make_model("qwen2_moe", num_experts=EXPERTS)
    with torch.no_grad():
        router_EH = model.model.layers[1].mlp.gate.weight
        # Of v, -v, u, -u two logits are above 0, the logit of expert 4.
        router_EH[1], router_EH[3], router_EH[NEVER] = -router_EH[0], -router_EH[2], 0.0
    model.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


class Recorder:
    """Round to nearest, keeping each weight that it gave by the bytes of the weight it got."""

    def __init__(self):
        self.rounded = {}

    def __call__(self, w_BNK, scheme, hessian_BKK):
        q = quantize_rtn(w_BNK, scheme, hessian_BKK)
        for w_NK, rounded_NK in zip(w_BNK, dequantize(q), strict=True):
            self.rounded[w_NK.numpy().tobytes(), scheme] = rounded_NK
        return q

    def of(self, w_NK, scheme):
        return self.rounded[w_NK.float().contiguous().numpy().tobytes(), scheme].double()


def run(
    folder,
    metric,
    *,
    schemes=SCHEMES,
    rotation="off",
    batch_tokens=48,
    quantizer=quantize_rtn,
    corrects_fit=False,
):
    sensitivity = metric if isinstance(metric, Sensitivity) else SENSITIVITY[metric]
    sensitivity = replace(sensitivity, corrects_fit=corrects_fit)
    method = Method("rtn", quantizer)
    return measure(
        ModelAdapter(open_source(folder)),
        make_batches(FIT, HELDOUT, batch_tokens=batch_tokens),
        MeasureSettings(schemes, sensitivity, "metric", method, rotation),
        PROVENANCE,
        generator=torch.Generator().manual_seed(5),
    )


def losses_of(table):
    return {block.name: row for block, row in zip(table.blocks, table.loss, strict=True)}


def whole_model(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    return model.requires_grad_(False)


def views_of(model):
    """``{block: weight [N, K]}`` as views of the parameters, named by hand."""
    views = {}
    for index, layer in enumerate(model.model.layers):
        experts, shared = layer.mlp.experts, layer.mlp.shared_expert
        for e in range(EXPERTS):
            views[f"layers.{index}.experts.{e}.gate"] = experts.gate_up_proj[e, :INNER]
            views[f"layers.{index}.experts.{e}.up"] = experts.gate_up_proj[e, INNER:]
            views[f"layers.{index}.experts.{e}.down"] = experts.down_proj[e]
        for name in ("gate_proj", "up_proj", "down_proj"):
            views[f"layers.{index}.mlp.shared_expert.{name}"] = getattr(shared, name).weight
    return views


# --- fisher -----------------------------------------------------------------------------------


def slow_experts(module, site, seen):
    """The experts one token and one choice at a time; keeps input and output of each projection."""

    def watch(name, w_NK, x_K):
        z_N = w_NK @ x_K
        z_N.requires_grad_() if not z_N.requires_grad else z_N.retain_grad()
        seen.setdefault(name, []).append((x_K.detach(), z_N))
        return z_N

    def forward(hidden_TH, index_TR, weights_TR):
        total = []
        for x_H, chosen, weights in zip(hidden_TH, index_TR.tolist(), weights_TR, strict=True):
            y_H = torch.zeros_like(x_H)
            for e, weight in zip(chosen, weights, strict=True):
                gate_I = watch(f"{site}.{e}.gate", module.gate_up_proj[e, :INNER], x_H)
                up_I = watch(f"{site}.{e}.up", module.gate_up_proj[e, INNER:], x_H)
                inner_I = gate_I / (1 + torch.exp(-gate_I)) * up_I
                y_H = y_H + weight * watch(f"{site}.{e}.down", module.down_proj[e], inner_I)
            total.append(y_H)
        return torch.stack(total)

    return forward


def watch_linear(name, seen):
    def hook(module, args, output):
        output.requires_grad_() if not output.requires_grad else output.retain_grad()
        seen.setdefault(name, []).append((args[0].detach(), output))

    return hook


def slow_gradients(folder):
    """``{block: (inputs [T, K], gradients [T, N])}`` by one backward pass of the whole model."""
    model, seen = whole_model(folder), {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts.forward = slow_experts(layer.mlp.experts, f"layers.{index}.experts", seen)
        for name in ("gate_proj", "up_proj", "down_proj"):
            block = f"layers.{index}.mlp.shared_expert.{name}"
            getattr(layer.mlp.shared_expert, name).register_forward_hook(watch_linear(block, seen))
    generator = torch.Generator().manual_seed(5)
    for ids in (*FIT.split(2), HELDOUT):
        logits_TV = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        chances_TV = logits_TV.detach().softmax(-1)
        draw_T1 = torch.rand(len(chances_TV), 1, generator=generator).double()
        # The label is the number of sums of chances below the draw.
        labels_T = (chances_TV.cumsum(-1) < draw_T1).sum(-1)
        (-logits_TV.log_softmax(-1)[torch.arange(len(labels_T)), labels_T]).sum().backward()
    return {
        name: tuple(
            torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
            for parts in ([x for x, _ in calls], [z.grad for _, z in calls])
        )
        for name, calls in seen.items()
    }


def test_fisher_equals_brute_force_for_every_block(folder):
    recorder, views = Recorder(), views_of(whole_model(folder))
    table = losses_of(run(folder, "fisher", quantizer=recorder))
    assert table.keys() == views.keys()
    for name, (x_TK, grad_TN) in slow_gradients(folder).items():
        for place, scheme in enumerate(SCHEMES):
            delta_NK = recorder.of(views[name], scheme) - views[name]
            slope_T = ((x_TK @ delta_NK.T) * grad_TN).sum(-1)
            expected = float((slope_T**2).sum()) / TOKENS / 2
            # About 2^10 float32 roundings between an id and a gradient and back.
            assert table[name][place] == pytest.approx(expected, rel=2**10 * EPS), name


def read_rounded(x_TK, scheme):
    """Inputs as the scheme reads them, by its definition: each token on a grid up to its peak."""
    peak_T1 = x_TK.abs().amax(-1, keepdim=True)
    if scheme.kind == "fp8":
        return (x_TK / peak_T1 * 448).to(torch.float8_e4m3fn).double() * peak_T1 / 448
    steps = {4: 7, 8: 127}[scheme.a_bits]
    return (x_TK / peak_T1 * steps).round() * peak_T1 / steps


@pytest.mark.parametrize("rotation", ["off", "on"])
def test_fisher_of_rounded_inputs_equals_brute_force_in_the_frame_of_the_layer(folder, rotation):
    recorder, views = Recorder(), views_of(whole_model(folder))
    schemes = parse_schemes("w4a4_grow_sym,w4a8_grow_sym,fp8")
    table = run(folder, "fisher", schemes=schemes, rotation=rotation, quantizer=recorder)
    raw, turn = losses_of(table), rotate if rotation == "on" else (lambda x: x)
    for name, (x_TK, grad_TN) in slow_gradients(folder).items():
        for place, scheme in enumerate(schemes):
            w_NK = recorder.of(turn(views[name].float()), scheme)
            z_hat_TN = read_rounded(turn(x_TK), scheme) @ w_NK.T
            slope_T = ((z_hat_TN - x_TK @ views[name].T) * grad_TN).sum(-1)
            expected = float((slope_T**2).sum()) / TOKENS / 2
            # A change of half a percent of the output leaves 2^8 times the relative error of both.
            assert raw[name][place] == pytest.approx(expected, rel=2**14 * EPS), (name, scheme)


# --- layer_out --------------------------------------------------------------------------------


def slow_layer_changes(folder, recorder):
    """``{(block, scheme): (norm of the change, norm of the output)}`` by running whole layers."""
    model, found = whole_model(folder), {}
    views = views_of(model)
    for index, layer in enumerate(model.model.layers):
        calls = []
        handle = layer.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append((args, kwargs)),
            with_kwargs=True,
        )
        for ids in (FIT, HELDOUT):
            model(input_ids=ids, use_cache=False)
        handle.remove()
        before = [layer(*args, **kwargs) for args, kwargs in calls]
        for name, view in views.items():
            if not name.startswith(f"layers.{index}."):
                continue
            original = view.clone()
            for scheme in SCHEMES:
                view.copy_(recorder.of(original, scheme))
                after = [layer(*args, **kwargs) for args, kwargs in calls]
                view.copy_(original)
                change = [(b - a).flatten() for a, b in zip(before, after, strict=True)]
                norm = torch.cat([b.flatten() for b in before]).norm()
                found[name, scheme] = (float(torch.cat(change).norm()), float(norm))
    return found


def test_layer_out_equals_running_the_layer_again_for_every_block(folder):
    recorder = Recorder()
    table = losses_of(run(folder, "layer_out", quantizer=recorder))
    for (name, scheme), (change, norm) in slow_layer_changes(folder, recorder).items():
        if name.startswith(f"layers.1.experts.{NEVER}."):
            assert change == 0.0
            continue
        # The difference of two float32 outputs: some 64 roundings of the size of the output.
        limit = 64 * EPS * norm
        assert abs(table[name][SCHEMES.index(scheme)] - change) <= limit, name
        assert change > 100 * limit


# --- metrics by hand --------------------------------------------------------------------------


def probe_of(z_rows, *, grads=None, finish=None, tokens=None, block="layers.0.experts.2.down"):
    z_TN = torch.tensor(z_rows)
    return Probe(
        block=block,
        x_TK=torch.zeros(len(z_TN), 1),
        z_TN=z_TN,
        bias_N=None,
        gate_T=torch.ones(len(z_TN)),
        grad_TN=None if grads is None else torch.tensor(grads),
        tokens=len(z_TN) if tokens is None else tokens,
        fit_rows=0,
        finish=finish,
    )


def context_of(energy=None, rerun=None, all_tokens=4):
    return LayerContext(all_tokens, (energy or {}).__getitem__, rerun)


Z, Z_HAT = [[1.0, 0.0], [0.0, 2.0]], torch.tensor([[2.0, 1.0], [0.0, 5.0]])  # off by (1,1), (0,3)


def test_fisher_by_hand():
    # Slopes 2 x 1 + 1 x 1 = 3 and -1 x 3: (9 + 9) / (2 x 4 tokens).
    probe = probe_of(Z, grads=[[2.0, 1.0], [7.0, -1.0]])
    assert SENSITIVITY["fisher"].metric(probe, Z_HAT, context_of()) == 18 / 8


def test_fisher_of_a_sample_of_the_tokens_stands_for_all():
    # Two tokens of eight are here: four times the sum.
    probe = probe_of(Z, grads=[[2.0, 1.0], [7.0, -1.0]], tokens=8)
    assert SENSITIVITY["fisher"].metric(probe, Z_HAT, context_of()) == 4 * 18 / 8


def test_layer_out_of_an_expert_by_hand():
    # Contribution 2 z: changes (2, 2) and (0, 6), norm sqrt(44).
    probe = probe_of(Z, finish=lambda z: 2 * z)
    found = SENSITIVITY["layer_out"].metric(probe, Z_HAT, context_of())
    assert found == pytest.approx(math.sqrt(44), rel=2 * EPS)


def test_layer_out_of_a_linear_by_hand():
    probe = probe_of(Z, block="layers.0.up")
    context = context_of(rerun=lambda site, z: {"layers.0.up": 3 * z}[site])
    found = SENSITIVITY["layer_out"].metric(probe, Z_HAT, context)
    assert found == pytest.approx(math.sqrt(9 * 11), rel=2 * EPS)


def test_output_mse_of_an_expert_by_hand():
    # 4 + 4 + 36 of the energy of its whole site.
    probe = probe_of(Z, finish=lambda z: 2 * z)
    context = context_of(energy={"layers.0.experts": 88.0})
    assert SENSITIVITY["output_mse"].metric(probe, Z_HAT, context) == 0.5


def test_output_mse_of_a_linear_by_hand():
    # (1 + 1 + 9) / (1 + 4); a sample of the tokens has the same ratio.
    for tokens in (2, 8):
        probe = probe_of(Z, tokens=tokens, block="layers.0.up")
        found = SENSITIVITY["output_mse"].metric(probe, Z_HAT, context_of())
        assert found == pytest.approx(11 / 5, rel=2 * EPS)


def test_output_mse_of_a_sample_of_an_experts_tokens_stands_for_all():
    probe = probe_of(Z, finish=lambda z: 2 * z, tokens=4)
    context = context_of(energy={"layers.0.experts": 88.0})
    assert SENSITIVITY["output_mse"].metric(probe, Z_HAT, context) == 1.0


@pytest.mark.parametrize("name", ["fisher", "output_mse", "layer_out"])
def test_an_exact_block_costs_nothing(name):
    probe = probe_of(Z, grads=[[1.0, 1.0]] * 2, finish=lambda z: z)
    context = context_of(energy={"layers.0.experts": 1.0})
    assert SENSITIVITY[name].metric(probe, probe.z_TN.clone(), context) == 0.0


@pytest.mark.parametrize("name", ["fisher", "output_mse"])
def test_a_block_without_tokens_costs_nothing_by_itself(name):
    empty = torch.zeros(0, 2)
    probe = replace(probe_of(Z), x_TK=torch.zeros(0, 1), z_TN=empty, grad_TN=empty, tokens=0)
    assert SENSITIVITY[name].metric(probe, empty, context_of()) == 0.0


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", SENSITIVITY)
def test_losses_do_not_depend_on_the_batch_size(folder, metric):
    whole, pieces = (run(folder, metric, batch_tokens=tokens) for tokens in (96, 24))
    for block, row, other in zip(whole.blocks, whole.loss, pieces.loss, strict=True):
        # The same sums in another order, through the network; see above.
        assert row == pytest.approx(other, rel=2**10 * EPS), block.name


@pytest.mark.parametrize("metric", ["fisher", "output_mse"])
def test_an_expert_that_no_token_reached_is_priced_as_half_a_mean_token(folder, metric):
    table = run(folder, metric)
    found, tokens = losses_of(table), {block.name: block.tokens for block in table.blocks}
    for projection in ("gate", "up", "down"):
        names = [f"layers.1.experts.{e}.{projection}" for e in range(EXPERTS)]
        assert tokens[names[NEVER]] == 0
        for place in range(len(SCHEMES)):
            lost = sum(found[name][place] for name in names[:NEVER])
            seen = sum(tokens[name] for name in names[:NEVER])
            assert seen == 2 * TOKENS  # each token takes two experts
            assert found[names[NEVER]][place] == pytest.approx(UNROUTED_TOKENS * lost / seen)


def test_a_limit_on_tokens_is_no_limit_for_layer_out(folder, monkeypatch):
    whole = run(folder, "layer_out")
    monkeypatch.setattr("mxq.profiling.losses.TOKENS_PER_BLOCK", 4)
    assert run(folder, "layer_out").loss == whole.loss


def test_a_limit_on_tokens_leaves_their_count_alone(folder, monkeypatch):
    whole = run(folder, "fisher")
    monkeypatch.setattr("mxq.profiling.losses.TOKENS_PER_BLOCK", 4)
    limited = run(folder, "fisher")
    assert limited.blocks == whole.blocks
    assert limited.loss != whole.loss


def test_tokens_of_the_blocks_are_counted(folder):
    tokens = {block.name: block.tokens for block in run(folder, "output_mse").blocks}
    for layer in (0, 1):
        for projection in ("gate", "up", "down"):
            routed = [tokens[f"layers.{layer}.experts.{e}.{projection}"] for e in range(EXPERTS)]
            assert sum(routed) == 2 * TOKENS
        assert tokens[f"layers.{layer}.mlp.shared_expert.up_proj"] == TOKENS


def test_a_scheme_that_does_not_fit_costs_infinity(folder):
    schemes = parse_schemes("w2a16_g64_asym,w2a16_g32_asym")
    table = run(folder, "output_mse", schemes=schemes)
    for block, row in zip(table.blocks, table.loss, strict=True):
        fits = [block.in_features == 64 or scheme.group_size == 32 for scheme in schemes]
        assert [math.isfinite(loss) for loss in row] == fits, block.name


def scripted(*values):
    """A metric that gives each block the values in turn, one for each scheme."""
    asked = {}

    def metric(probe, z_hat_TN, context):
        asked[probe.block] = asked.get(probe.block, -1) + 1
        return values[asked[probe.block]]

    return Sensitivity(metric, "made up")


@pytest.mark.parametrize(
    ("texts", "raw", "expected"),
    [
        # More bits lost more: lowered to the cheaper scheme.
        ("w2a16_g32_asym,w3a16_g32_asym,w4a16_g32_asym", (5, 7, 6), (5, 5, 5)),
        ("w2a16_g32_asym,w3a16_g32_asym,w4a16_g32_asym", (5, 3, 4), (5, 3, 3)),
        # A cheaper scheme that rounds inputs finer is no bound for one that rounds them more...
        ("w3a16_g32_asym,w4a8_g32_asym", (1, 2), (1, 2)),
        # ... but one that rounds them no less is.
        ("w3a8_g32_asym,w4a16_g32_asym", (1, 2), (1, 1)),
        ("w4a4_grow_sym,w8a8_grow_sym", (1, 2), (1, 1)),
        # Integer and float inputs are rounded in ways that bound each other in no direction.
        ("fp8,w8a8_grow_sym", (1, 2), (1, 2)),
        ("fp8,w8a8_grow_sym", (2, 1), (2, 1)),
        ("w4a8_grow_sym,fp8,bf16", (1, 2, 3), (1, 2, 1)),
    ],
)
def test_rows_are_made_monotone_by_hand(folder, texts, raw, expected):
    schemes = parse_schemes(texts)
    table = run(folder, scripted(*raw), schemes=schemes)
    routed = [row for b, row in zip(table.blocks, table.loss, strict=True) if b.tokens > 0]
    assert set(routed) == {expected}


@pytest.mark.parametrize("metric", SENSITIVITY)
def test_more_bits_never_cost_more(folder, metric):
    schemes = parse_schemes(f"w{bits}a16_g32_asym" for bits in (2, 3, 4, 5, 6, 8))
    for row in run(folder, metric, schemes=schemes).loss:
        assert list(row) == sorted(row, reverse=True)


def test_rotation_is_taken_where_it_lowers_the_loss_of_the_cheapest_scheme(folder):
    off, on, auto = (run(folder, "output_mse", rotation=choice) for choice in ("off", "on", "auto"))
    assert (off.rotated_layers, on.rotated_layers) == ((), (0, 1))
    sums = {
        (layer, table.rotated_layers): sum(
            row[0]
            for block, row in zip(table.blocks, table.loss, strict=True)
            if block.layer == layer and block.tokens > 0
        )
        for table in (off, on)
        for layer in (0, 1)
    }
    better = tuple(layer for layer in (0, 1) if sums[layer, (0, 1)] < sums[layer, ()])
    assert auto.rotated_layers == better
    for place, block in enumerate(auto.blocks):
        source = on if block.layer in better else off
        assert auto.loss[place] == source.loss[place], block.name


def test_a_model_that_no_scheme_fits_is_told_so(folder):
    message = "layers.0.experts.0.gate has 64 input features and none of w4a16_g128_asym has a"
    with pytest.raises(ValueError, match=message):
        run(folder, "output_mse", schemes=parse_schemes("w4a16_g128_asym"))


def test_a_loss_that_is_not_finite_names_the_block_and_the_scheme(folder):
    message = "layers.0.mlp.shared_expert.gate_proj: the sensitivity under w2a16_g32_asym is nan"
    with pytest.raises(ValueError, match=message):
        run(folder, scripted(math.nan))


def test_the_table_says_what_it_is(folder):
    table = run(folder, "fisher", schemes=(Scheme.parse("fp8"),))
    assert (table.metric, table.unit) == ("metric", "nats per token")
    assert table.calibration_tokens == TOKENS
    assert table.provenance == PROVENANCE


# --- the correction for tokens that were fitted to ---------------------------------------------


def overfitted(fit, heldout):
    """A probe of one output whose quantizer is off by ``fit`` and ``heldout`` on equal tokens."""
    z_TN = torch.ones(20, 1)
    z_hat_TN = z_TN + torch.tensor([fit] * 12 + [heldout] * 8)[:, None]
    probe = Probe("b", torch.ones(20, 1), z_TN, None, torch.ones(20), None, tokens=20, fit_rows=12)
    return probe, z_hat_TN


def test_a_loss_is_raised_by_what_its_quantizer_does_worse_on_heldout_tokens():
    # Squared errors 1 and 9: the 12 fitted rows count ninefold, (12 * 9 + 8) / 20.
    assert _fit_factor(*overfitted(1.0, 3.0)) == pytest.approx(5.8)


def test_a_loss_is_not_lowered_where_heldout_tokens_do_better():
    assert _fit_factor(*overfitted(3.0, 1.0)) == 1.0


def test_too_few_heldout_tokens_give_no_factor():
    probe, z_hat_TN = overfitted(1.0, 3.0)
    assert _fit_factor(replace(probe, fit_rows=13), z_hat_TN) is None


def test_gptq_on_few_tokens_is_priced_higher_than_it_looks_on_them(folder):
    plain = run(folder, "fisher", quantizer=quantize_gptq)
    corrected = run(folder, "fisher", quantizer=quantize_gptq, corrects_fit=True)
    pairs = [
        (raised, row)
        for raised, row in zip(corrected.loss, plain.loss, strict=True)
        if min(row) > 0
    ]
    assert all(a >= b for raised, row in pairs for a, b in zip(raised, row, strict=True))
    assert sum(map(sum, corrected.loss)) > 1.05 * sum(map(sum, plain.loss))

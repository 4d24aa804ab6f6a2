"""A model that one expert carries: it alone is found, and no budget narrows it."""

from dataclasses import replace

import pytest
import torch
from tiny import make_model, save_tiny, token_ids
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mxq
from mxq.cli import app
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.profiling import activation
from mxq.profiling.super_experts import find_super_experts
from mxq.report import curve
from mxq.report.facts import gather
from mxq.report.origin import command
from mxq.report.words import coverage, pin_lines

IDS = token_ids(9, 16, seed=5)
FAST = {
    "calibration": IDS,
    "schemes": "w2a16_g32_asym,w3a16_g32_asym,w8a16_g32_asym",
    "rotation": "off",
    "effort": "fast",
    "sensitivity": "output_mse",
}
LAYER, EXPERT = 1, 2
PINNED = f"layers.{LAYER}.experts.{EXPERT}"


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """A model one of whose experts puts out 60 times what it would."""
    folder = save_tiny(tmp_path_factory.mktemp("carried"))
    model = make_model("qwen2_moe")
    with torch.no_grad():
        model.model.layers[LAYER].mlp.experts.down_proj[EXPERT] *= 60
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def result(carried, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return mxq.quantize(carried, output=folder / "out", bits=3.6, work=folder / "work", **FAST)


def damage_without(folder, layer, expert):
    """KL of the predictions to those of the model without that expert, in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def log_p():
        with torch.no_grad():
            return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)

    before = log_p()
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[expert] = 0
    return float((before.exp() * (before - log_p())).sum(-1).mean())


def maxima_by_hand(folder):
    """``{(layer, expert): largest output}``, each token of each expert by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}

    def note(layer):
        def hook(module, args):
            hidden_TH, index_TR, _ = args
            for x_H, chosen in zip(hidden_TH, index_TR.tolist(), strict=True):
                for expert in chosen:
                    gate, up = (module.gate_up_proj[expert] @ x_H).chunk(2)
                    out_H = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    key = layer, expert
                    found[key] = max(found.get(key, 0.0), float(out_H.abs().max()))

        return hook

    for layer in range(2):
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(note(layer))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return found


def profiled(folder):
    batches = make_batches(IDS, None)
    return activation.profile_routing(ModelAdapter(open_source(folder)), batches, ["x"] * 9)[0]


def test_without_the_super_expert_the_model_breaks(carried):
    damages = {
        (layer, expert): damage_without(carried, layer, expert)
        for layer in range(2)
        for expert in range(4)
    }
    worst = damages.pop((LAYER, EXPERT))
    assert worst > 3 * max(damages.values())


def test_the_profile_has_the_largest_output_of_each_expert(carried, monkeypatch):
    # Fewer tokens at once than an expert has, so that the parts are joined.
    monkeypatch.setattr(activation, "OUTPUT_ROWS", 7)
    expected = maxima_by_hand(carried)
    assert len(expected) == 8
    for layer, site in enumerate(profiled(carried)):
        for expert, peak in enumerate(site.down_max):
            assert peak == pytest.approx(expected[layer, expert], rel=1e-5)


def test_it_alone_is_found_and_in_a_homogeneous_model_none(carried, tmp_path):
    assert [expert.name for expert in find_super_experts(profiled(carried))] == [PINNED]
    for family in ("qwen2_moe", "gpt_oss"):
        assert find_super_experts(profiled(save_tiny(tmp_path / family, family))) == ()


def test_it_stays_wide_where_the_budget_is_short(result):
    plan, uniform = result.plans["plan"], result.plans["uniform"]
    assert list(plan.pinned) == [PINNED]
    assert plan.pinned[PINNED] > 10
    assert narrowest(plan) == 8
    assert uniform.pinned == {}
    assert len(set(uniform.schemes.values())) == 1


class KeepSolved:
    """A solver that keeps what it gave."""

    def __init__(self, solve):
        self.solve, self.plans = solve, []

    def __call__(self, *args, **options):
        self.plans.append(self.solve(*args, **options))
        return self.plans[-1]


def narrowest(plan):
    """Least bits of the super expert's projections."""
    return min(plan.schemes[f"{PINNED}.{name}"].w_bits for name in ("gate", "up", "down"))


def test_what_was_pinned_is_told_and_pins_can_be_left_out(result, carried, tmp_path, monkeypatch):
    work = result.folder.parent / "work"
    again = {"bits": 3.6, "work": work, "guard": False, **FAST}
    mxq.quantize(carried, output=tmp_path / "auto", **again)
    free = mxq.quantize(carried, output=tmp_path / "off", pin="off", **again)
    facts = gather(tmp_path / "auto", work)
    told = f"Pinned to the widest formats: {PINNED} ({facts.plan.pinned[PINNED]:.0f} times)"
    assert any(line.startswith(told) for line in coverage(facts))
    keep_solved = KeepSolved(curve.allocate)
    monkeypatch.setattr(curve, "allocate", keep_solved)
    assert ", pinned experts wide" in curve.loss_curve(facts).rule
    assert keep_solved.plans
    assert all(narrowest(plan) == 8 for plan in keep_solved.plans)
    plan = free.plans["plan"]
    assert plan.pinned == {}
    assert narrowest(plan) < 8
    assert [line[:10] for line in pin_lines(plan, free.profile)] == ["Not pinned"]
    # The ids are the caller's own, which no command has; those of a text would be in one.
    origin = gather(free.folder, work).origin
    told = command(replace(origin, calibration=replace(origin.calibration, spec="demo")))
    assert "--pin off" in told


@pytest.mark.parametrize(
    ("bits", "granularity"),
    [(2.6, "block"), (3.6, "projection")],  # with it all experts of the layer are wide
)
def test_a_budget_that_pins_leave_no_plan_in_is_refused_before_measuring(
    bits, granularity, carried, tmp_path, monkeypatch
):
    monkeypatch.setattr("mxq.pipeline.run_measure", None)
    with pytest.raises(
        ValueError, match=rf"1 expert pinned .*\({PINNED}\): {bits} bits per weight"
    ):
        mxq.quantize(carried, output=tmp_path / "out", bits=bits, granularity=granularity, **FAST)
    assert not (tmp_path / "out" / "mxq_plan.json").exists()


def test_the_command_shows_pins_and_leaves_them_out(result):
    def shown(*options):
        work = str(result.folder.parent / "work")
        done = CliRunner().invoke(app, ["allocate", work, "--bits", "3.6", *options])
        assert done.exit_code == 0, done.stderr
        return " ".join(done.stdout.split())

    assert f"Pinned to the widest formats: {PINNED} (" in shown()
    assert "inned" not in shown("--pin", "off")

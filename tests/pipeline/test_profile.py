"""The profile: tokens and routing weights of every expert, and what is done about cold ones."""

from collections import defaultdict
from math import log

import pytest
import torch
from tiny import FAMILIES, MOE_FAMILIES, make_model, save_tiny, token_ids
from transformers import AutoModelForCausalLM

import mxq
from mxq.config import CalibrationOptions, MeasureOptions, ModelOptions
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.pipeline import open_adapter
from mxq.profile_stage import run_profile
from mxq.profiling.activation import profile_routing
from mxq.workspace import Workspace

MENU = "w2a16_g32_asym,w4a16_g32_asym"


def slow_routing(folder, ids):
    """``{(site, expert, sample): [routing weight of each token]}``, one sample and token at a time.

    Read off the arguments of the experts modules of the model as transformers loads it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = defaultdict(list)
    sample = 0

    def note(name):
        layer = next(int(part) for part in name.split(".") if part.isdigit())

        def hook(module, args):
            _, index_TR, weights_TR = args
            for chosen, weights in zip(index_TR.tolist(), weights_TR.tolist(), strict=True):
                for expert, weight in zip(chosen, weights, strict=True):
                    found[f"layers.{layer}.experts", expert, sample].append(weight)

        return hook

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(note(name))
    for sample in range(len(ids)):
        with torch.no_grad():
            model(input_ids=ids[sample : sample + 1], use_cache=False)
    return found


def tokens_of(routing, site, expert, samples):
    return sum(len(routing[site, expert, sample]) for sample in samples)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_tokens_and_gate_mass_are_those_of_a_slow_count(family, tmp_path):
    folder = save_tiny(tmp_path, family, tokenizer=False)
    ids, domains = token_ids(5, 12, seed=3), ("b", "a", "b", "a", "a")
    adapter = ModelAdapter(open_source(folder))
    # A batch of two samples: sample numbers run on over batches.
    stats, _ = profile_routing(adapter, make_batches(ids, None, batch_tokens=24), domains)
    routing = slow_routing(folder, ids)
    assert len(stats) == len({site for site, _, _ in routing})
    for site in stats:
        for expert in range(4):
            for place, domain in enumerate(("a", "b")):
                samples = [number for number, name in enumerate(domains) if name == domain]
                weights = [w for s in samples for w in routing[site.site, expert, s]]
                assert site.tokens[expert][place] == len(weights)
                assert site.gate_mass[expert][place] == pytest.approx(sum(weights), abs=1e-4)


def test_the_entropy_of_pairs_is_that_of_a_slow_count(model):
    ids = token_ids(4, 16, seed=3)
    stats, _ = profile_routing(ModelAdapter(open_source(model)), make_batches(ids, None), ["x"] * 4)
    pairs = pairs_of(model, ids)
    for site in stats:
        counts = pairs[site.site]
        shares = [count / sum(counts.values()) for count in counts.values()]
        entropy = -sum(share * log(share) for share in shares)
        assert site.coactivation_entropy == pytest.approx(entropy)
        assert site.coactivation_entropy_max == pytest.approx(log(6))


def pairs_of(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = defaultdict(lambda: defaultdict(int))
    for layer in range(2):

        def hook(module, args, layer=layer):
            for chosen in args[1].tolist():
                found[f"layers.{layer}.experts"][tuple(sorted(chosen))] += 1

        model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=ids)
    return found


def profile(model, work, floor, *, samples=16, **options):
    """Tokens and statistics of a run on the embedded corpus."""
    adapter = open_adapter(ModelOptions(str(model), **options))
    calibration = CalibrationOptions("demo", samples, 16, 0, floor)
    space = Workspace(work)
    return run_profile(space, adapter, ModelOptions(str(model)), calibration, MeasureOptions())


def test_spare_samples_bring_a_cold_expert_over_the_floor(model, tmp_path):
    tokens, without = profile(model, tmp_path / "0", 0)
    assert without.added_samples == 0
    assert without.cold == without.topped_up == ()
    assert len(tokens.fit_ids) == 16
    base = slow_routing(model, tokens.fit_ids)
    counts = {
        (f"layers.{layer}.experts", expert): tokens_of(
            base, f"layers.{layer}.experts", expert, range(16)
        )
        for layer in range(2)
        for expert in range(4)
    }
    floor = min(counts.values()) + 3
    topped, stats = profile(model, tmp_path / "1", floor)
    under = {f"{site}.{expert}" for (site, expert), count in counts.items() if count < floor}
    assert under
    assert stats.floor == floor
    assert set(stats.topped_up) | set(stats.cold) == under
    assert stats.topped_up
    assert len(topped.fit_ids) == 16 + stats.added_samples
    assert torch.equal(topped.fit_ids[:16], tokens.fit_ids)
    after = slow_routing(model, topped.fit_ids)
    for name in stats.topped_up:
        site, _, expert = name.rpartition(".")
        assert tokens_of(after, site, int(expert), range(len(topped.fit_ids))) >= floor


def test_experts_that_stay_cold_are_named(model, tmp_path):
    tokens, stats = profile(model, tmp_path, 10_000, samples=8)
    assert len(stats.cold) == 8
    assert stats.topped_up == ()
    # Two spare samples come with every eight; all help, so all are taken.
    assert stats.added_samples == 2
    assert len(tokens.fit_ids) == 10


def test_heldout_samples_are_not_among_those_fitted_to(model, tmp_path):
    tokens, _ = profile(model, tmp_path, 64)
    fitted = {tuple(row) for row in tokens.fit_ids.tolist()}
    assert len(tokens.heldout_ids) == 2
    assert not fitted & {tuple(row) for row in tokens.heldout_ids.tolist()}


def test_a_finished_profile_is_read_back(model, tmp_path, monkeypatch):
    first_tokens, first = profile(model, tmp_path, 64)
    monkeypatch.setattr("mxq.profile_stage.profile_routing", None)
    again_tokens, again = profile(model, tmp_path, 64)
    assert again == first
    assert torch.equal(again_tokens.fit_ids, first_tokens.fit_ids)


@pytest.mark.parametrize(
    "change", [{"floor": 90}, {"keep": ("mlp.experts",)}, {"samples": 8}], ids=str
)
def test_a_profile_of_other_settings_is_not_reused(change, model, tmp_path):
    options = {"floor": 64, **change}
    floor = options.pop("floor")
    profile(model, tmp_path / "both", 64)
    reused = profile(model, tmp_path / "both", floor, **options)
    fresh = profile(model, tmp_path / "fresh", floor, **options)
    assert reused[1] == fresh[1]
    assert torch.equal(reused[0].fit_ids, fresh[0].fit_ids)


# Experts without any token


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """A model whose routers take experts 0 and 1 whatever the token."""
    folder = tmp_path_factory.mktemp("lopsided")
    save_tiny(folder, "gpt_oss")
    model = make_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias.copy_(torch.tensor([90.0, 90.0, -90.0, -90.0]))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sensitivity", ["fisher", "output_mse", "layer_out"])
def test_experts_that_no_token_reaches_are_quantized_and_reported(lopsided, sensitivity, tmp_path):
    result = mxq.quantize(
        lopsided, output=tmp_path / "out", bits=4, calibration=token_ids(9, 16), schemes=MENU,
        sensitivity=sensitivity,
    )  # fmt: skip
    unused = [f"layers.{layer}.experts.{expert}" for layer in range(2) for expert in (2, 3)]
    assert sorted(result.packs[result.written].unrouted) == unused
    assert set(unused) <= set(result.profile.cold)
    assert {block.name for block in result.blocks if block.tokens == 0} == {
        f"{expert}.{projection}" for expert in unused for projection in ("gate", "up", "down")
    }
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    packed = loaded.model.layers[0].mlp.experts
    original = make_model("gpt_oss").model.layers[0].mlp.experts.gate_up_proj[3][:, ::2].T
    error = (packed.get_submodule("3.gate_proj").weight - original).norm() / original.norm()
    # Fitted to its layer's mean inputs; 2 bits lose a third of a Gaussian row, GPTQ up to twice.
    assert error < 0.75
    # Half a token is what an expert without tokens is priced at: not free, but the first to go.
    bits = {name: scheme.w_bits for name, scheme in result.plans["plan"].schemes.items()}
    used = [bits[name] for name in bits if name.rsplit(".", 1)[0] not in unused]
    assert max(bits[f"{expert}.gate"] for expert in unused) <= max(used)


def test_dense_models_have_no_experts_to_profile(tmp_path):
    assert "llama" in FAMILIES
    folder = save_tiny(tmp_path / "model", "llama")
    tokens, stats = profile(folder, tmp_path / "work", 64, samples=8)
    assert stats.sites == ()
    assert stats.cold == ()
    assert len(tokens.fit_ids) == 8


def test_a_profile_under_other_domain_names_is_not_reused(model, tmp_path):
    def domains(name):
        options = {"output": tmp_path / name, "bits": 4, "work": tmp_path / "work"}
        ids = {name: token_ids(9, 16)}
        return mxq.quantize(model, calibration=ids, schemes=MENU, **options).profile.domains

    assert domains("alpha") == ("alpha",)
    assert domains("beta") == ("beta",)


def test_text_too_short_for_disjoint_samples_is_refused(model, tmp_path):
    # 8 samples and one held out need 9 * 16 tokens; with overlap by half 80 would do.
    with pytest.raises(ValueError, match=r"has 143 tokens, .*held-out text shares none"):
        mxq.quantize(
            model,
            output=tmp_path / "out",
            bits=4,
            calibration=[torch.arange(143) % 90],
            samples=8,
            seqlen=16,
            schemes=MENU,
        )

"""Second moments of gradients, from the sweep that measures to the blocks that are packed."""

from itertools import pairwise

import pytest
import torch
from tiny import save_tiny, token_ids

import mxq
import mxq.checkpoint.layer as packing
from mxq.checkpoint.outer import outer_of_experts
from mxq.config import (
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    ResourceOptions,
)
from mxq.models.adapter import ModelAdapter
from mxq.models.probes import expert_inputs
from mxq.models.source import open_source
from mxq.models.sweep import make_batches, sweep_backward, sweep_forward
from mxq.pipeline import pack_again
from mxq.resources import check_pack
from mxq.workspace import RunSettings, Workspace, make_tokens, open_workspace

TEXT = {"calibration": "demo", "samples": 8, "seqlen": 16}
PLAN = {"plan": "uniform:w2a16_grow_asym", "effort": "best"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2_moe")


@pytest.fixture
def costs(monkeypatch):
    """Moments of gradients by block, as they reach the quantizer."""
    found = {}
    make_batch = packing.make_batch

    def spy(names, weights, inputs, outer):
        for place, name in enumerate(names):
            found[name] = None if outer is None else [piece[place] for piece in outer]
        return make_batch(names, weights, inputs, outer)

    monkeypatch.setattr(packing, "make_batch", spy)
    return found


def weights_of(folder):
    return (folder / "model-layer-00000.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "nemotron_h"])
def test_moments_inside_an_expert_are_those_of_its_gradients(family, tmp_path):
    """Against autograd through the expert, one output of the layer after the other."""
    adapter = ModelAdapter(open_source(save_tiny(tmp_path, family)))
    site = next(s for s in sorted(adapter.sites) if s.endswith("experts"))
    layer = adapter.site_blocks(site)[0].layer
    mix_HH = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    outer_HH = mix_HH @ mix_HH.T / 64
    checked = []

    def on_sites(at, sites, calls):
        if at != layer:
            return
        module = adapter.module(site)
        for expert in range(4):
            one = expert_inputs(module, sites[site], expert)
            found = outer_of_experts(module, [one], (outer_HH,))
            # The moments of gate_t J_t' u, where u has the moments outer_HH: u = mix e_i / 8.
            seeds = [(mix_HH[:, i] / 8).expand(len(one.x_TH), -1) for i in range(64)]
            expected = dict.fromkeys(found, 0.0)
            for seed_TH in seeds:
                traced = expert_inputs(module, with_grads(sites[site], one, seed_TH), expert)
                for name, probe in traced.probes().items():
                    fit = probe.grad_TN[: one.fit_rows].double()
                    expected[name] = expected[name] + fit.T @ fit
            total = float(one.gate_T[: one.fit_rows].double().square().sum())
            for name in ("gate", "up"):
                if name in found:
                    wanted = expected[name] / total
                    scale = float(wanted.abs().max())
                    torch.testing.assert_close(
                        found[name][0][0].double(), wanted, rtol=0, atol=1e-5 * scale
                    )
            assert torch.equal(found["down"][0][0], outer_HH)
            checked.append(expert)

    sweep_forward(adapter, make_batches(token_ids(6, 16), token_ids(2, 16)), on_sites)
    assert checked == [0, 1, 2, 3]


def with_grads(inputs, one, seed_TH):
    """The site with gradients of its output that are given in the rows of one expert."""
    grad_TH = torch.zeros(len(inputs.x_TK), seed_TH.shape[1])
    grad_TH[one.rows] = seed_TH
    return type(inputs)(
        inputs.site,
        inputs.x_TK,
        inputs.index_TR,
        inputs.weights_TR,
        inputs.store.keep(grad_TH),
        inputs.fit_tokens,
        inputs.store,
    )


def test_the_best_effort_packs_with_the_gradients_of_every_block(model, tmp_path, costs):
    mxq.quantize(model, output=tmp_path / "out", scope="all", **PLAN, **TEXT)
    adapter = ModelAdapter(open_source(model), scope="all")
    assert set(costs) == {block.name for block in adapter.blocks()}
    assert all(pieces is not None for pieces in costs.values())
    # Those of a linear are its own: against a sweep over the same tokens.
    tokens = open_workspace(tmp_path / "out" / "work", ResourceOptions()).tokens()
    found = {}

    def on_sites(layer, sites, calls):
        found.update({name: inputs.grad_TN[: inputs.fit_tokens] for name, inputs in sites.items()})

    batches = tokens.batches(torch.device("cpu"))
    sweep_backward(adapter, batches, on_sites, generator=torch.Generator().manual_seed(0))
    for name in ("layers.0.self_attn.k_proj", "layers.1.mlp.shared_expert.down_proj"):
        moments_NN = found[name].T @ found[name]
        [cost] = costs[name]
        cost = cost - torch.diag(cost.diagonal())
        wanted = moments_NN - torch.diag(moments_NN.diagonal())
        # But for the shrinkage, which leaves their proportions, and the rounding to float16.
        cost, wanted = (part / part.norm() for part in (cost, wanted))
        torch.testing.assert_close(cost, wanted, rtol=2**-9, atol=2**-9)
    # Experts of a layer write to one space.
    assert torch.equal(costs["layers.0.experts.0.down"][0], costs["layers.0.experts.3.down"][0])


def test_the_best_effort_gives_other_codes(model, tmp_path, costs):
    best = mxq.quantize(model, output=tmp_path / "best", **PLAN, **TEXT)
    assert best.packs["plan"].quantizers["kronecker"] > 0
    costs.clear()
    mxq.quantize(model, output=tmp_path / "balanced", plan=PLAN["plan"], **TEXT)
    assert costs
    assert all(pieces is None for pieces in costs.values())
    assert weights_of(tmp_path / "best") != weights_of(tmp_path / "balanced")


def test_every_block_of_a_mix_gets_its_own_moments(model, tmp_path, costs):
    menu = {"schemes": "w2a16_grow_asym,w4a16_grow_asym", "effort": "best", "guard": False}
    mixed = mxq.quantize(model, output=tmp_path / "mixed", bits=3, **menu, **TEXT)
    found = dict(costs)
    mxq.quantize(model, output=tmp_path / "uniform", **PLAN, **TEXT)
    # The first layer reads the same in both.
    names = [f"layers.0.experts.{expert}.{part}" for part in ("gate", "up") for expert in range(4)]
    schemes = [str(mixed.plans["plan"].schemes[name]) for name in names]
    assert any("w2" in first and "w4" in second for first, second in pairwise(schemes))
    for name in names:
        assert torch.equal(found[name][0], costs[name][0]), name


def test_lost_moments_are_made_anew_for_the_same_bytes(model, tmp_path):
    menu = {"schemes": "w2a16_grow_asym,w4a16_grow_asym", "effort": "best", "guard": False}
    work = tmp_path / "work"
    mxq.quantize(model, output=tmp_path / "first", bits=3, work=work, **menu, **TEXT)
    (work / "curvature" / "layer-00000.safetensors").unlink()
    mxq.quantize(model, output=tmp_path / "again", bits=3, work=work, **menu, **TEXT)
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "again")


def test_packing_without_its_moments_says_what_to_run(model, tmp_path):
    mxq.quantize(model, output=tmp_path / "out", work=tmp_path / "work", **PLAN, **TEXT)
    (tmp_path / "work" / "curvature" / "layer-00001.safetensors").unlink()
    work = open_workspace(tmp_path / "work", ResourceOptions())
    with pytest.raises(ValueError, match="run mxq measure with this work folder again"):
        pack_again(work, OutputOptions(tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()


def test_packing_again_states_the_time_of_the_quantizer_in_the_folder(model, tmp_path):
    stated = {}
    for quantizer in ("kronecker", "refined"):
        work = Workspace(tmp_path / quantizer)
        work.folder.mkdir()
        measured = MeasureOptions(quantizer=quantizer)
        work.save("settings", RunSettings(ModelOptions("m"), CalibrationOptions(), measured, ""))
        check_pack(
            ModelAdapter(open_source(model)),
            make_tokens(token_ids(8, 16), token_ids(2, 16)),
            2.5,
            work.folder,
            resources=ResourceOptions(),
            announce=lambda needs, found, name=quantizer: stated.update({name: needs}),
        )
    assert stated["kronecker"].seconds["pack"] > stated["refined"].seconds["pack"]
    # The moments are there already, and no loss is measured.
    assert stated["kronecker"].disk_bytes == stated["refined"].disk_bytes

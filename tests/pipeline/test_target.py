"""What blocks are fitted to: inputs of the original model reach the blocks in their place."""

import logging

import pytest
import torch
from checkpoints import make_allocation
from tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM

import mxq
import mxq.checkpoint.layer as packing
from mxq.checkpoint.modules import MxqLinear
from mxq.checkpoint.pack import pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import QUANTIZERS, Method
from mxq.scheme import Scheme

COARSE = Scheme.parse("w2a16_grow_asym")
IDS = token_ids(30, 32, seed=2)
HELD = token_ids(10, 32, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2_moe")


def packed(model, folder, target, *, scope="all", method="gptq", scheme=COARSE, rotated=()):
    """Pack every block coarsely; the folder that was written."""
    adapter = ModelAdapter(open_source(model), scope=scope)
    drawn = {block.name: scheme for block in adapter.blocks()}
    plan = make_allocation(adapter, drawn, rotated_layers=rotated)
    method = Method(method, QUANTIZERS[method])
    pack(adapter, make_batches(IDS, HELD), plan, folder, method=method, target=target)
    return folder


def seen(model):
    """``{module: inputs}`` of linears, norms and experts, by transformers alone."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}

    def keep(name):
        return lambda module, inputs: found.setdefault(name, []).append(inputs[0].flatten(0, -2))

    for name, module in whole.named_modules():
        kinds = (torch.nn.Linear, MxqLinear)
        if isinstance(module, kinds) or name.endswith(("mlp.experts", "_layernorm")):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for rows in torch.split(torch.cat([IDS, HELD]), 8):
            whole(input_ids=rows, use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture
def asked(monkeypatch):
    """What every block's second moments are made of, by block."""
    found = {}
    make_inputs = packing.make_inputs

    def spy(blocks, prior_KK):
        found.update({block.name: block for block in blocks})
        return make_inputs(blocks, prior_KK)

    monkeypatch.setattr(packing, "make_inputs", spy)
    return found


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_linears_are_fitted_to_what_the_original_reads(model, tmp_path, asked):
    packed(model, tmp_path / "out", "original")
    originals = seen(model)
    # The first of those that share an input stands for all of them.
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.shared_expert.down_proj"):
        block = asked[f"layers.1.{part}"]
        close(block.origin_TK, originals[f"model.layers.1.{part}"])
        assert not torch.allclose(block.x_TK, block.origin_TK, atol=1e-2)


def test_experts_are_fitted_to_what_the_original_reads_for_their_tokens(model, tmp_path, asked):
    packed(model, tmp_path / "out", "original")
    originals = seen(model)["model.layers.1.mlp.experts"]
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    experts = whole.model.layers[1].mlp.experts
    for expert in range(4):
        outer = asked[f"layers.1.experts.{expert}.gate"].origin_TK
        # Rows of the common input: those of the tokens that the router sends here now.
        exact = "donot_use_mm_for_euclid_dist"
        places = torch.cdist(outer, originals, compute_mode=exact).argmin(-1)
        close(outer, originals[places])
        gate_TI, up_TI = (outer @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = asked[f"layers.1.experts.{expert}.down"].origin_TK
        close(inner, (torch.nn.functional.silu(gate_TI) * up_TI).detach())


def test_experts_together_lack_what_the_stream_is_off(model, tmp_path, asked):
    folder = packed(model, tmp_path / "out", "stream")
    norm = "model.layers.1.post_attention_layernorm"
    wanted_TN = seen(model)[norm] - seen(folder)[norm]
    assert wanted_TN.norm() > 0.01
    # Each token's sum over its experts, by their weights; rows are those of the common input.
    exact = "donot_use_mm_for_euclid_dist"
    total_TN, inputs_TK = torch.zeros_like(wanted_TN), seen(folder)["model.layers.1.mlp.experts"]
    for expert in range(4):
        gate = asked[f"layers.1.experts.{expert}.gate"]
        assert gate.lack is None
        rows = torch.cdist(gate.x_TK, inputs_TK, compute_mode=exact).argmin(-1)
        down = asked[f"layers.1.experts.{expert}.down"]
        lack_TN = down.lack.of(slice(None), torch.device("cpu"))
        total_TN[rows] += lack_TN * down.gate_T[:, None]
    # Where two tokens read the same, which row is whose cannot be told.
    alone = (torch.cdist(inputs_TK, inputs_TK, compute_mode=exact) < 1e-6).sum(-1) == 1
    assert alone.sum() > 1200
    torch.testing.assert_close(total_TN[alone], wanted_TN[alone], rtol=0, atol=1e-4)
    # Its gate gives every token another number.
    assert asked["layers.1.mlp.shared_expert.down_proj"].lack is None


def test_a_linear_lacks_what_the_stream_is_off(tmp_path, asked):
    model = save_tiny(tmp_path / "model", "llama")
    folder = packed(model, tmp_path / "out", "stream")
    norm = "model.layers.1.post_attention_layernorm"
    found_TN = asked["layers.1.mlp.down_proj"].lack.of(slice(None), torch.device("cpu"))
    expected_TN = seen(model)[norm] - seen(folder)[norm]
    torch.testing.assert_close(found_TN, expected_TN, rtol=0, atol=1e-4)
    assert asked["layers.1.mlp.gate_proj"].lack is None


def test_those_who_write_share_what_the_stream_is_off(tmp_path, asked):
    model = save_tiny(tmp_path / "model", "deepseek_v3")
    packed(model, tmp_path / "out", "stream")
    shared = asked["layers.1.mlp.shared_experts.down_proj"].lack
    assert shared.share_T == pytest.approx(0.5)
    half_TN = 0.5 * (shared.origin_TN - shared.now_TN)
    torch.testing.assert_close(shared.of(slice(None), torch.device("cpu")), half_TN)
    expert = asked["layers.1.experts.0.down"]
    # With both of its experts' weights g and f it takes half of g / (g^2 + f^2).
    assert torch.all(expert.lack.share_T * expert.gate_T <= 0.5 + 1e-6)
    assert torch.all(expert.lack.share_T * expert.gate_T > 0)


def test_a_layer_without_a_stream_is_fitted_as_with_original(
    model, tmp_path, asked, monkeypatch, caplog
):
    monkeypatch.setattr("mxq.checkpoint.pack.find_residual", lambda *_: None)
    with caplog.at_level(logging.INFO, "mxq"):
        packed(model, tmp_path / "out", "stream")
    assert "layer 1: no residual stream was found" in caplog.text
    assert all(block.lack is None for block in asked.values())
    assert all(block.origin_TK is not None for block in asked.values())


def test_original_targets_lack_nothing(model, tmp_path, asked):
    packed(model, tmp_path / "out", "original")
    assert all(block.lack is None for block in asked.values())


def test_local_blocks_are_fitted_to_their_own_inputs(model, tmp_path, asked):
    packed(model, tmp_path / "out", "local")
    assert asked
    assert all(block.origin_TK is None for block in asked.values())


def test_the_first_inputs_are_those_of_the_original(model, tmp_path, asked):
    packed(model, tmp_path / "out", "original", scope="experts")
    for expert in range(4):
        block = asked[f"layers.0.experts.{expert}.gate"]
        assert len(block.x_TK) > 100
        assert torch.equal(block.x_TK, block.origin_TK)


def test_the_whole_is_nearer_to_the_original(model, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    errors = {}
    with torch.no_grad():
        wanted = expected(input_ids=HELD).logits
        for target in ("original", "local"):
            folder = packed(model, tmp_path / target, target)
            found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            errors[target] = float((found(input_ids=HELD).logits - wanted).norm())
    assert errors["original"] < 0.97 * errors["local"]


@pytest.mark.parametrize("rotated", [(), (0, 1)])
@pytest.mark.parametrize("text", ["w4a4_grow_sym", "w4a8_g32_sym", "fp8"])
def test_blocks_are_fitted_to_what_they_read_in_the_checkpoint(
    model, tmp_path, asked, text, rotated
):
    scheme = Scheme.parse(text)
    folder = packed(model, tmp_path / "out", "original", scheme=scheme, rotated=rotated)
    found = seen(folder)
    # Behind a layer whose inputs are rounded, and behind rounded projections of its own layer;
    # inputs of 8 bits that are rounded in another frame are off by 3 %.
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.shared_expert.down_proj"):
        x_TK = found[f"model.layers.1.{part}"]
        off = float((asked[f"layers.1.{part}"].x_TK - x_TK).norm() / x_TK.norm())
        # A value near the middle of two codes goes to the other one here and there.
        assert off < 1e-2, part


@pytest.mark.parametrize(
    ("options", "target", "quantizer"),
    [
        ({}, "stream", "refined"),
        ({"effort": "fast"}, "local", "gptq"),
        ({"effort": "fast", "target": "original"}, "original", "gptq"),
        ({"target": "local", "quantizer": "rtn"}, "local", "rtn"),
    ],
)
def test_effort_target_and_quantizer_reach_the_blocks(
    model, tmp_path, asked, options, target, quantizer
):
    text = {"calibration": "demo", "samples": 8, "seqlen": 16}
    result = mxq.quantize(
        model, output=tmp_path / "out", plan="uniform:w2a16_grow_asym", **text, **options
    )
    assert asked
    assert {block.origin_TK is None for block in asked.values()} == {target == "local"}
    assert set(result.packs["plan"].quantizers) <= {quantizer, "rtn"}
    assert quantizer in result.packs["plan"].quantizers

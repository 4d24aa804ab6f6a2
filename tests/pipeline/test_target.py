"""What blocks are fitted to: inputs of the original model reach the blocks in their place."""

import pytest
import torch
from checkpoints import make_allocation
from tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM

import mxq.checkpoint.layer as packing
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


def packed(model, folder, target, *, scope="all", method="gptq"):
    """Pack every block coarsely; the logits of what was written."""
    adapter = ModelAdapter(open_source(model), scope=scope)
    plan = make_allocation(adapter, {block.name: COARSE for block in adapter.blocks()})
    method = Method(method, QUANTIZERS[method])
    pack(adapter, make_batches(IDS, HELD), plan, folder, method=method, target=target)
    return folder


def seen(model):
    """``{block: inputs}`` of plain linears and the experts' common input, by transformers alone."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}

    def keep(name):
        return lambda module, inputs: found.setdefault(name, []).append(inputs[0].flatten(0, -2))

    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith("mlp.experts"):
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

"""The logic of ``benchmarks/bench_activations.py``: rows are judged with their inputs rounded."""

import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_allocation
from tiny import logits_of, save_tiny, token_ids
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_activations
from accuracy import activations, bench, judge

from mxq.artifacts import BlockInfo
from mxq.checkpoint.pack import pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.numerics import unrotate
from mxq.quantizers import Method, quantize_rtn
from mxq.scheme import Scheme, parse_schemes

RTN = Method("rtn", quantize_rtn)
HELD = token_ids(3, 16, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bench of a tiny model with a mix of schemes, one layer rotated, and its checkpoint."""
    adapter = ModelAdapter(open_source(save_tiny(tmp_path_factory.mktemp("model"), "qwen2_moe")))
    menu = parse_schemes("w4a4_grow_sym,w4a8_g32_sym,fp8,bf16")
    drawn = {block.name: menu[n % len(menu)] for n, block in enumerate(adapter.blocks())}
    plan = make_allocation(adapter, drawn, rotated_layers=(1,))
    batches = make_batches(token_ids(4, 16, seed=2), HELD)
    folder = tmp_path_factory.mktemp("packed") / "out"
    pack(adapter, batches, plan, folder, method=RTN, target="local")
    evaluations = bench.Evaluation("one", HELD[:1]), bench.Evaluation("two", HELD[1:])
    return bench.Bench(adapter, batches, HELD, evaluations, 0), plan, folder


def kl_of(original, model):
    """Mean KL of the held-out tokens but the last of each window, from logits alone."""
    p, q = (logits_of(m, HELD)[:, :-1].double().log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_row_has_the_kl_of_the_loaded_checkpoint_and_that_of_its_weights(made):
    setup, plan, folder = made
    original = judge.dense_model(setup)
    reference = judge.answers(original, setup.evaluations)
    found = judge.judge_inputs(setup, plan, judge.Packing(RTN, "local"), reference)
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Float32 logits of about 1 leave differences of 1e-6 in a KL of 1e-2.
    assert found["kl"] == pytest.approx(kl_of(original, packed), rel=1e-3)
    dense = judge.dense_model(setup)
    for block in setup.blocks:
        linear = packed.get_submodule(block.module)
        w_NK = linear.decode(torch.float32)
        target = dense.get_parameter(block.tensor).data
        part = target if block.index is None else target[block.index]
        part.copy_(unrotate(w_NK) if linear.rotated else w_NK)
    assert found["kl_weights"] == pytest.approx(kl_of(original, dense), rel=1e-3)
    assert found["kl"] > 1.1 * found["kl_weights"]


def test_weights_that_are_decoded_once_change_nothing(made):
    packed = AutoModelForCausalLM.from_pretrained(made[2], dtype=torch.float32).eval()
    before = logits_of(packed, HELD)
    judge.decode_once(packed)
    assert torch.equal(logits_of(packed, HELD), before)


def test_bits_of_inputs_count_multiply_adds_by_hand():
    few = BlockInfo("a", 0, 0, "up", 8, 32, 10, "experts")
    many = BlockInfo("b", 0, 1, "up", 8, 64, 30, "experts")
    schemes = {"a": Scheme.parse("w4a4_grow_sym"), "b": Scheme.parse("fp8")}
    # 10 x 8 x 32 products with inputs of 4 bits, 30 x 8 x 64 of 8: 1 part to 6.
    assert bench_activations.input_bits([few, many], schemes) == pytest.approx((4 + 6 * 8) / 7)


@pytest.mark.parametrize(("name", "layers"), [("fp8", ()), ("fp8, rotated", (0, 1))])
def test_a_uniform_row_rotates_all_layers_or_none(made, name, layers):
    tables = bench_activations.Tables(made[0])
    plan, bits = bench_activations.make_plan(tables, bench_activations.RECIPES[name])
    assert plan.rotated_layers == layers
    assert set(plan.schemes.values()) == {Scheme.parse("fp8")}
    assert bits == 8


def test_the_section_has_a_line_of_each_row_and_the_papers_figures():
    row = {
        "row": "mxq at 5",
        "commit": "abc",
        "heldout_tokens": 1234,
        "schemes": {"w4a4_grow_sym": 3, "fp8": 1},
        "quantizer": "refined",
        "target": "stream",
        "bits": 4.98765,
        "input_bits": 5.4321,
        "kl": 0.0123456,
        "kl_weights": 0.0012345,
        "excess_nats": 0.02,
        "top1_agreement": 0.9,
        "predicted": 0.01,
        "unit": "nats per token",
    }
    norms = {**row, "row": "mxmoe at 5", "unit": "norm of the layer output"}
    told = {"model": "toy", "date": "today", "versions": {"torch": "2"}, "samples": 4, "seqlen": 8}
    more = {"seed": 0, "w5a5": "A", "bytes": "B", "tokens": 5, "device": "toy"}
    lines = activations.activation_section("x.json", {**told, **more, "rows": [row, norms]})
    shared = (
        "w4a4_grow_sym (3), fp8 (1) | refined, stream | 4.988 | 5.43 | 0.01235 | 0.00123 "
        "| 0.02000 | 90.00% |"
    )
    assert f"| mxq at 5 | {shared} 0.01000 |" in lines
    # What is no KL is not shown as one.
    assert f"| mxmoe at 5 | {shared} - |" in lines
    # ln(6.16 / 5.92) and ln(8.44 / 5.92).
    assert "| DeepSeek-V2-Lite | 0.355 | 0.040 |" in lines

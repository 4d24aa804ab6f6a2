"""Choices of experts that the quantized model keeps: counted, packed, recorded, judged."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_allocation
from safetensors.torch import load_file
from tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from accuracy import judge
from accuracy.bench import Bench, Evaluation

from mxq.artifacts import Provenance
from mxq.checkpoint.expert_choices import ExpertChoices, count_kept, sum_sites
from mxq.checkpoint.pack import PackedLayer, PackReport, PackSharing, pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import Method, quantize_rtn
from mxq.records import Records
from mxq.report.words import kept_choices
from mxq.scheme import Scheme
from mxq.storage import digest_of, from_text, to_text

COARSE = Scheme.parse("w2a16_grow_asym")
IDS = token_ids(12, 16, seed=2)
HELD = token_ids(6, 16, seed=3)
MADE_FROM = Provenance("model", "text", {}, {})


# Counted


def test_kept_choices_by_hand():
    now = torch.tensor([[1, 0], [2, 3], [3, 2], [0, 4], [4, 0]])
    original = torch.tensor([[0, 1], [2, 1], [0, 1], [0, 4], [4, 1]])
    # Of four experts, 4 is none: the order does not count, so 2, 1, 0, 1 and 0 are kept of
    # 2, 2, 2, 1 and 1.
    assert count_kept(now, original, 4) == (4, 8)


def test_sites_of_a_layer_are_one_and_no_choice_is_not_known():
    assert sum_sites(3, 10, {"a": (5, 20), "b": (7, 10)}) == ExpertChoices(3, 10, 30, 12)
    assert ExpertChoices(3, 10, 30, 12).share == 0.4
    assert sum_sites(3, 0, {"a": (0, 0)}) is None
    assert sum_sites(3, 10, {}) is None


@pytest.mark.parametrize("wrong", [{"kept": 31}, {"kept": -1}, {"tokens": 0}, {"choices": 0}])
def test_counts_that_no_router_gives_are_refused(wrong):
    with pytest.raises(ValueError, match="is no count of choices"):
        replace(ExpertChoices(3, 10, 30, 12), **wrong)


def test_the_mean_and_the_least_layer_in_words():
    found = [ExpertChoices(1, 1500, 3000, 2700), ExpertChoices(4, 1500, 3000, 2400)]
    assert kept_choices(found) == [
        "Routers keep 85.00% of the original's choices of experts on 1,500 held-out tokens (mean "
        "of 2 layers; least in layer 4: 80.00%)."
    ]
    assert kept_choices([]) == []


# Packed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2_moe", num_hidden_layers=3)


def packed(model, folder, *, target="original", held=HELD, sharing=None, scope="all"):
    adapter = ModelAdapter(open_source(model), scope=scope)
    plan = make_allocation(adapter, {block.name: COARSE for block in adapter.blocks()})
    batches, method = make_batches(IDS, held, batch_tokens=64), Method("rtn", quantize_rtn)
    return pack(adapter, batches, plan, folder, method=method, target=target, sharing=sharing)


def routed(folder, ids):
    """Sets of experts by layer and token, by transformers alone."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for layer, decoder in enumerate(whole.model.layers):
        decoder.mlp.experts.register_forward_pre_hook(
            lambda _, inputs, layer=layer: found.update({layer: inputs[1].tolist()})
        )
    with torch.no_grad():
        whole(input_ids=ids, use_cache=False)
    return {layer: [set(experts) for experts in tokens] for layer, tokens in found.items()}


def test_a_layer_counts_what_its_router_keeps_on_held_out_tokens(model, tmp_path):
    report = packed(model, tmp_path / "out")
    now, original = routed(tmp_path / "out", HELD), routed(model, HELD)
    expected = [
        ExpertChoices(layer, HELD.numel(), 2 * HELD.numel(), sum(map(len, map(set.__and__, *both))))
        for layer in range(3)
        for both in [(now[layer], original[layer])]
    ]
    assert report.expert_choices == tuple(expected)
    assert 0.5 < min(one.share for one in expected) < max(one.share for one in expected) < 0.97


def test_the_first_router_keeps_all_where_nothing_before_it_is_quantized(model, tmp_path):
    first, *others = packed(model, tmp_path / "out", scope="experts").expert_choices
    assert first.kept == first.choices
    assert all(one.kept < one.choices for one in others)


def test_nothing_is_told_without_the_original_held_out_tokens_or_experts(model, tmp_path):
    assert packed(model, tmp_path / "local", target="local").expert_choices == ()
    assert packed(model, tmp_path / "fit", held=None).expert_choices == ()
    dense = save_tiny(tmp_path / "dense", "llama")
    assert packed(dense, tmp_path / "out").expert_choices == ()


# Recorded


def without(artifact, *fields):
    """The text of an artifact as an mxq wrote it that did not know those fields."""
    document = json.loads(to_text(artifact))
    for field in fields:
        del document["content"][field]
    text = json.dumps(document["content"], sort_keys=True, separators=(",", ":"))
    return json.dumps({**document, "sha256": digest_of(text)})


def test_layers_that_are_packed_keep_their_counts_and_older_ones_are_packed_anew(
    model, tmp_path, caplog
):
    records = Records(tmp_path / "records", PackedLayer, MADE_FROM)
    sharing, out = PackSharing(records=records), tmp_path / "out"
    expected = packed(model, out, sharing=sharing)
    shards = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert packed(model, out, sharing=sharing) == expected
    second = records.folder / "layer-00001.json"
    second.write_text(without(records.load()["layer-00001"], "expert_choices"))
    with caplog.at_level(logging.WARNING, "mxq"):
        assert packed(model, out, sharing=sharing) == expected
    assert "PackedLayer has no expert_choices" in caplog.text
    assert "they are made anew" in caplog.text
    for name, tensors in shards.items():
        found = load_file(out / name)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_report_of_an_older_run_tells_nothing_of_choices():
    report = PackReport(5, {"rtn": 1}, (), (ExpertChoices(0, 4, 8, 6),))
    assert from_text(to_text(report), PackReport, "new") == report
    older = from_text(without(report, "expert_choices"), PackReport, "old")
    assert older == replace(report, expert_choices=())


# Judged


def test_a_row_of_the_benchmark_has_the_share_of_a_dense_model(model, tmp_path):
    adapter = ModelAdapter(open_source(model))
    # Windows of one length in domains of two sizes: means weigh by tokens.
    texts = (Evaluation("a", HELD[:4]), Evaluation("b", HELD[4:]))
    bench = Bench(adapter, make_batches(IDS, HELD), IDS, texts, 0)
    reference = judge.answers(judge.dense_model(bench), texts)
    plan = make_allocation(adapter, {block.name: COARSE for block in adapter.blocks()})
    method = Method("rtn", quantize_rtn)
    row = judge.judge_plan(bench, plan, judge.Packing(method, "stream"), reference)
    pack(adapter, bench.batches, plan, tmp_path / "out", method=method)
    now, original = routed(tmp_path / "out", HELD), routed(model, HELD)
    shares = [
        sum(len(now[layer][token] & original[layer][token]) for token in range(first, first + 15))
        / (2 * 15)
        for first in range(0, HELD.numel(), 16)
        for layer in range(3)
    ]
    assert row["choices_kept"] == pytest.approx(sum(shares) / len(shares))
    assert row["domains"]["b"]["choices_kept"] == pytest.approx(sum(shares[12:]) / 6)

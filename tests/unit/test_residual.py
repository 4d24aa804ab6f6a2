"""Where a layer's residual stream is read, and which sites write to it."""

from types import SimpleNamespace

import pytest
import torch
from tiny import randomize, save_tiny, token_ids
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mxq.checkpoint.inputs import stream_of
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.lockstep import run_calls, run_in_lockstep
from mxq.models.residual import Residual, find_residuals
from mxq.models.source import open_source

IDS = token_ids(2, 24, seed=5)


def save_other(folder, family, **changes):
    """A random dense model of a family that the tiny ones do not have."""
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 257,
        "pad_token_id": None,
        **changes,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields), dtype=torch.float32)
    randomize(model, seed=3)
    model.save_pretrained(folder)
    return folder


def residuals(folder, *, scope="auto", spoil=None):
    """What is found in each layer, and what is read in the last such place."""
    adapter, store, found = ModelAdapter(open_source(folder), scope=scope), ActivationStore(), []
    if spoil is not None:
        spoil(adapter.source)

    def on_layer(layer, calls):
        adapter.source.load_layer(layer)
        with torch.no_grad():
            places, seen = find_residuals(adapter, layer, calls[0]), []
            for place in places[-1:]:
                with place.recording(seen.append):
                    calls[0].run()
            found.append((places, seen))
            outputs = run_calls(calls, store)
        adapter.source.free_layer(layer)
        return outputs

    run_in_lockstep(adapter.source.model, adapter.source.layers, [IDS], on_layer, store=store)
    return found


@pytest.mark.parametrize(
    ("family", "layer", "writers"),
    [
        ("qwen3_moe", 1, {"experts"}),
        # The gate of its shared expert gives each token another number.
        ("qwen2_moe", 1, {"experts"}),
        ("gpt_oss", 0, {"experts"}),
        ("deepseek_v3", 0, {"mlp.down_proj"}),
        ("deepseek_v3", 1, {"experts", "mlp.shared_experts.down_proj"}),
        ("llama", 1, {"mlp.down_proj"}),
    ],
)
def test_writers_are_found(tmp_path, family, layer, writers):
    [*_, residual], _ = residuals(save_tiny(tmp_path, family, tokenizer=False))[layer]
    assert {site.partition(".")[2].partition(".")[2] for site in residual.writers} == writers
    assert all(factor == pytest.approx(1.0, abs=1e-4) for factor in residual.writers.values())


def test_the_stream_is_what_the_layer_adds_to(tmp_path):
    folder = save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    [residual], [capture] = residuals(folder)[1]
    assert capture.site == residual.site
    torch.testing.assert_close(capture.x_TK, expected[0])


def test_outputs_that_are_scaled_have_that_factor(tmp_path):
    folder = save_other(tmp_path, "granite", residual_multiplier=0.25)
    found = [place.writers for places, _ in residuals(folder) for place in places]
    assert len(found) == 4
    for writers in found:
        assert list(writers.values()) == [pytest.approx(0.25, rel=1e-4)]


def test_branches_side_by_side_write_to_what_both_read(tmp_path):
    [residual], [capture] = residuals(save_other(tmp_path, "cohere"), scope="all")[1]
    parts = {site.removeprefix("layers.1.") for site in residual.writers}
    assert parts == {"self_attn.o_proj", "mlp.down_proj"}
    assert capture.x_TK.shape == (48, 64)


def test_attention_writes_to_what_the_layer_is_given(tmp_path):
    folder = save_tiny(tmp_path, "deepseek_v3", tokenizer=False)
    first, second = residuals(folder, scope="all")[1][0]
    assert first.writers.keys() == {"layers.1.self_attn.o_proj"}
    assert first.reader is not second.reader
    assert len(second.writers) == 2


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_behind_the_outputs_is_in_the_way(tmp_path, family):
    assert residuals(save_other(tmp_path, family), scope="all") == [((), []), ((), [])]


def test_numbers_that_are_not_finite_say_nothing(tmp_path):
    def spoil(source):
        source.model.model.embed_tokens.weight.data[:] = torch.inf

    found = residuals(save_tiny(tmp_path, "llama", tokenizer=False), spoil=spoil)
    assert [places for places, _ in found] == [(), ()]


def test_a_site_makes_up_for_its_part_in_units_of_its_outputs():
    places = (Residual("one", None, {"a": 0.25, "b": 1.0}), Residual("two", None, {"c": -1.0}))
    work = SimpleNamespace(residuals=places, origins={"one": "then 1", "two": "then 2"})
    now = {"one": "now 1", "two": "now 2"}
    shares = {site: stream_of(work, now, site) for site in "abcd"}
    assert shares.pop("d") is None
    assert {site: stream.share for site, stream in shares.items()} == {"a": 2, "b": 0.5, "c": -1}
    assert (shares["c"].now, shares["c"].origin) == ("now 2", "then 2")

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
from mxq.models.residual import Residual, constant_factors, find_residual
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


def residuals(folder, *, scope="auto", keep=(), spoil=None):
    """What is found in each layer, and what is read there: ``[(residual, stream_TH)]``."""
    adapter = ModelAdapter(open_source(folder), scope=scope, keep=keep)
    store, found = ActivationStore(), []
    if spoil is not None:
        spoil(adapter.source)

    def on_layer(layer, calls):
        adapter.source.load_layer(layer)
        with torch.no_grad():
            residual, seen = find_residual(adapter, layer, calls[0]), []
            if residual is not None:
                with residual.recording(seen.append):
                    calls[0].run()
            found.append((residual, seen))
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
        ("qwen3", 1, {"mlp.down_proj"}),
    ],
)
def test_writers_are_found(tmp_path, family, layer, writers):
    residual, _ = residuals(save_tiny(tmp_path, family, tokenizer=False))[layer]
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
    residual, [capture] = residuals(folder)[1]
    assert capture.site == residual.site
    torch.testing.assert_close(capture.x_TK, expected[0])


def test_outputs_that_are_scaled_have_that_factor(tmp_path):
    folder = save_other(tmp_path, "granite", residual_multiplier=0.25)
    for residual, _ in residuals(folder):
        [factor] = residual.writers.values()
        assert factor == pytest.approx(0.25, rel=1e-4)


def test_branches_side_by_side_write_to_what_both_read(tmp_path):
    for layer, (residual, [capture]) in enumerate(residuals(save_other(tmp_path, "cohere"))):
        parts = {site.removeprefix(f"layers.{layer}.") for site in residual.writers}
        assert parts == {"self_attn.o_proj", "mlp.down_proj"}
        assert capture.x_TK.shape == (48, 64)


def test_side_by_side_behind_a_norm_each(tmp_path):
    # The attention runs before the last norm, but writes to what that norm reads.
    residual, _ = residuals(save_other(tmp_path, "gpt_neox"))[1]
    parts = {site.removeprefix("layers.1.") for site in residual.writers}
    assert parts == {"attention.dense", "mlp.dense_4h_to_h"}


def test_a_module_that_runs_twice_does_not_tell_where(tmp_path):
    def share(source):
        for layer in source.layers:
            layer.post_attention_layernorm = layer.input_layernorm

    found = residuals(save_tiny(tmp_path, "llama", tokenizer=False), spoil=share)
    assert [residual for residual, _ in found] == [None, None]


def test_experts_with_a_norm_of_their_own_write_to_another_space(tmp_path):
    def add_norms(source):
        for layer in source.layers:
            layer.mlp.experts.has_post_expert_norm = True
            layer.mlp.experts.post_expert_norm = torch.nn.Identity()

    found = residuals(save_tiny(tmp_path, "qwen3_moe", tokenizer=False), spoil=add_norms)
    assert [residual for residual, _ in found] == [None, None]


def test_what_no_site_reads_is_no_place(tmp_path):
    folder = save_tiny(tmp_path, "llama", tokenizer=False)
    residual, _ = residuals(folder, keep=["mlp"])[1]
    assert residual.writers.keys() == {"layers.1.self_attn.o_proj"}


def test_a_linear_that_stays_explains_its_part(tmp_path):
    folder = save_tiny(tmp_path, "deepseek_v3", tokenizer=False)
    residual, _ = residuals(folder, keep=["shared_experts"])[1]
    assert residual.writers.keys() == {"layers.1.experts"}


@pytest.mark.parametrize(("other", "factors"), [(0.003, [2.0, 0.5]), (0.1, [None, None])])
def test_outputs_count_where_they_are_all_that_is_added(other, factors):
    torch.manual_seed(1)
    first_TH, second_TH, rest_TH = torch.randn(3, 40, 64, dtype=torch.float64)
    added_TH = 2 * first_TH + 0.5 * second_TH + other * rest_TH
    found = constant_factors(added_TH, [first_TH, second_TH])
    expected = [factor and pytest.approx(factor, abs=0.01) for factor in factors]
    assert found == expected


def test_outputs_count_where_their_number_is_the_same_for_all_tokens():
    torch.manual_seed(1)
    first_TH, second_TH, third_TH = torch.randn(3, 40, 64, dtype=torch.float64)
    number_T1 = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)[:, None]
    added_TH = first_TH + number_T1 * second_TH + 0.001 * third_TH
    found = constant_factors(added_TH, [first_TH, second_TH, third_TH])
    assert found == [pytest.approx(1.0), None, None]


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_behind_the_outputs_is_in_the_way(tmp_path, family):
    assert residuals(save_other(tmp_path, family)) == [(None, []), (None, [])]


def test_numbers_that_are_not_finite_say_nothing(tmp_path):
    def spoil(source):
        source.model.model.embed_tokens.weight.data[:] = torch.inf

    found = residuals(save_tiny(tmp_path, "llama", tokenizer=False), spoil=spoil)
    assert [residual for residual, _ in found] == [None, None]


def test_a_site_makes_up_for_its_part_in_units_of_its_outputs():
    residual = Residual("stream", None, {"a": 0.25, "b": -1.0})
    work = SimpleNamespace(residual=residual, origins={"stream": "then"})
    streams = {site: stream_of(work, {"stream": "now"}, site) for site in "abc"}
    assert streams.pop("c") is None
    assert {site: stream.share for site, stream in streams.items()} == {"a": 2, "b": -0.5}
    assert (streams["a"].now, streams["a"].origin) == ("now", "then")
    assert stream_of(SimpleNamespace(residual=None), {}, "a") is None

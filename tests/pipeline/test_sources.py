"""Sources: which model folders are read, what is refused, and what is kept on request."""

import json

import pytest
import torch
from architectures import tiny_model
from checkpoints import edit_config, plan_of, tensors_of, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import make_model, save_tiny
from transformers import AutoModelForCausalLM, DistilBertConfig, DistilBertModel, LlamaForCausalLM
from transformers.utils import logging

import mxq
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source


@pytest.fixture
def source(tmp_path):
    """An original model that a test may damage."""
    return save_tiny(tmp_path / "source", "llama", tokenizer=False)


def opened(folder):
    return ModelAdapter(open_source(folder))


def cannot_open(folder, message):
    with pytest.raises(ValueError, match=message):
        opened(folder)


def shard(folder):
    """Cut the single file of a source in two, with an index; the index's path."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    weight_map = {name: file for file, members in parts.items() for name in members}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def rename_in_index(index, old, new):
    index.write_text(index.read_text().replace(f'"{old}"', f'"{new}"'))


def test_a_sharded_source_is_packed_like_a_single_file(source, tmp_path):
    write_checkpoint(source, tmp_path / "single")
    shard(source)
    write_checkpoint(source, tmp_path / "sharded")
    single, sharded = (tensors_of(tmp_path / name)[0] for name in ("single", "sharded"))
    assert single.keys() == sharded.keys()
    assert all(
        torch.equal(single[n].view(torch.uint8), sharded[n].view(torch.uint8)) for n in single
    )


def test_a_source_whose_index_names_an_absent_file_is_refused(source):
    rename_in_index(shard(source), "a.safetensors", "c.safetensors")
    cannot_open(source, r"c.safetensors is named by the index but absent; the download is incompl")


def test_a_source_whose_index_leaves_the_folder_is_refused(source):
    rename_in_index(shard(source), "a.safetensors", "../a.safetensors")
    cannot_open(source, r"names '\.\./a.safetensors', which is outside the folder")


def test_a_source_with_a_damaged_index_is_refused(source):
    shard(source).write_text("{")
    cannot_open(source, r"model.safetensors.index.json is not a safetensors index: JSONDecodeError")


def test_a_truncated_source_is_refused(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    cannot_open(source, r"model.safetensors is not a whole safetensors file")


def test_a_source_that_lacks_a_weight_is_refused(source):
    path = source / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    cannot_open(source, r"lacks 1 weight of its own architecture, first 'model.layers.1.mlp.up_pr")


def test_a_source_in_pickle_only_is_refused(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    cannot_open(source, r"has no model.safetensors and no index; only safetensors are read")


def test_a_quantized_source_is_refused(source, tmp_path):
    cannot_open(
        write_checkpoint(source, tmp_path / "packed"),
        r"is already quantized \(.*mxq.*\); give the original model",
    )


def test_a_source_quantized_by_others_is_refused(source):
    edit_config(
        source,
        lambda config: config.update(quantization_config={"quant_method": "awq", "bits": 4}),
    )
    cannot_open(source, r"is already quantized \(awq\); give the original model")


def test_a_folder_without_config_is_refused(source):
    (source / "config.json").unlink()
    cannot_open(source, r"has no config.json: it is not a Hugging Face model folder")


def test_an_encoder_is_refused(tmp_path):
    config = DistilBertConfig(vocab_size=32, dim=32, hidden_dim=32, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(tmp_path)
    cannot_open(tmp_path, r"transformers has no causal language model for DistilBertConfig")


def test_a_configuration_with_a_field_of_the_wrong_type_is_refused(source):
    edit_config(source, lambda config: config.update(hidden_size="wide"))
    cannot_open(source, r"config.json cannot be read by transformers: .*hidden_size")


def test_a_configuration_of_an_unknown_family_is_refused(source):
    edit_config(source, lambda config: config.update(model_type="nonesuch"))
    cannot_open(source, r"config.json cannot be read by transformers: .*nonesuch")


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    cannot_open(tmp_path / "nowhere", r"nowhere is not a folder; give a model folder or a hub id")


def test_a_tied_head_that_a_source_stores_too_is_not_written(tmp_path):
    source = save_tiny(tmp_path / "tied", "qwen3", tokenizer=False)
    path = source / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        path,
        {"format": "pt"},
    )
    folder = write_checkpoint(source, tmp_path / "packed")
    assert "lm_head.weight" not in tensors_of(folder)[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


# Coverage


@pytest.fixture
def mamba(tmp_path):
    return save_tiny(
        tmp_path / "mamba",
        "nemotron_h",
        layers_block_type=["mamba", "moe", "attention"],
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        tokenizer=False,
    )


@pytest.fixture
def foreign_experts(tmp_path):
    """Experts in a form of their own, outside transformers' experts interface."""
    tiny_model("llama4_text").save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def test_a_parameter_that_no_rule_covers_stops_with_its_name(foreign_experts):
    cannot_open(
        foreign_experts,
        r"4 parameters look like weights and no rule covers them:\n  model.layers.0.feed_forward"
        r".experts.gate_up_proj \(4, 64, 128\)\n(.*\n)+Keep them in their type with --keep PATTERN",
    )


def test_keep_lets_an_uncovered_parameter_pass_and_it_is_written_as_it_was(
    foreign_experts, tmp_path
):
    folder = write_checkpoint(foreign_experts, tmp_path / "packed", keep=[r"\.experts\."])
    tensors, _ = tensors_of(folder)
    original = load_file(foreign_experts / "model.safetensors")
    kept = [name for name in tensors if ".experts." in name]
    assert len(kept) == 4
    assert all(torch.equal(tensors[name], original[name]) for name in kept)


def test_convolutions_and_states_of_a_mixture_of_experts_stay_as_they_were(mamba, tmp_path):
    folder = write_checkpoint(mamba, tmp_path / "packed", scope="all")
    tensors, _ = tensors_of(folder)
    original = load_file(mamba / "model.safetensors")
    name = "model.layers.0.mixer.conv1d.weight"
    assert torch.equal(tensors[name], original[name.replace("model.", "backbone.", 1)])


def test_keep_leaves_a_linear_as_it_was(source, tmp_path):
    folder = write_checkpoint(source, tmp_path / "packed", keep=[r"layers\.0\.mlp\.up_proj"])
    tensors, _ = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors[name], load_file(source / "model.safetensors")[name])
    assert name.removesuffix(".weight") not in plan_of(folder)["linears"]
    LlamaForCausalLM.from_pretrained(folder)


def test_import_of_mxq_does_not_change_how_other_models_load(source):
    assert mxq.__version__
    expected = LlamaForCausalLM.from_pretrained(source)
    assert torch.equal(expected.model.norm.weight, make_model("llama").model.norm.weight)


def test_scope_experts_leaves_layers_that_are_attention_or_state_space_alone(mamba):
    adapter = ModelAdapter(open_source(mamba), keep=["conv1d"])
    assert {block.layer for block in adapter.blocks()} == {1}
    everything = ModelAdapter(open_source(mamba), keep=["conv1d"], scope="all")
    assert {block.layer for block in everything.blocks()} == {0, 1, 2}


def test_loading_a_layer_shows_no_bar_and_leaves_those_of_the_caller(source, capfd):
    opened_source = open_source(source)
    capfd.readouterr()
    try:
        for is_shown in (False, True):
            (logging.enable_progress_bar if is_shown else logging.disable_progress_bar)()
            opened_source.load_layer(0)
            assert logging.is_progress_bar_enabled() == is_shown
    finally:
        logging.enable_progress_bar()
    assert "Loading weights" not in capfd.readouterr().err

"""Exports for compressed-tensors: decoded by its own converter, and loaded by transformers."""

import json
import re

import pytest
import torch
from checkpoints import tensors_of
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import (
    CompressedTensorsDequantizer,
)
from compressed_tensors.quantization import QuantizationConfig
from exports import expected_tensors, is_equal, make_packed, quantization_of, rules_broken
from tiny import logits_of, token_ids
from transformers import AutoModelForCausalLM

import mxq
from mxq.checkpoint.export import names
from mxq.checkpoint.export.packed import open_checkpoint

CASES = [
    ("qwen2_moe", "uniform"),
    ("qwen2_moe", "layers"),
    ("qwen2_moe", "projections"),
    ("qwen2_moe", "experts"),
    ("qwen2_moe", "inputs"),
    ("mixtral", "projections"),
    ("mixtral", "experts"),
    ("nemotron_h", "experts"),
    ("llama", "projections"),
    ("qwen3", "layers"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(family, plan)``: the checkpoint, its export and the result, made once."""
    made = {}

    def make(family, plan, **options):
        key = (family, plan, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("export")
            packed = make_packed(folder, family, plan, **options)
            result = mxq.export(packed.folder, folder / "ct", to="compressed-tensors")
            made[key] = packed, folder / "ct", result
        return made[key]

    return make


def converted(folder, target):
    """Tensors that compressed-tensors' own converter decodes, in float32."""
    converter = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    convert_checkpoint(folder, target, converter, max_workers=1, device="cpu")
    return tensors_of(target)[0]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_its_own_converter_decodes_the_same_bits_under_the_originals_names(
    family, plan, exported, tmp_path
):
    packed, folder, _ = exported(family, plan)
    found, expected = converted(folder, tmp_path / "plain"), expected_tensors(packed)
    # A code and a float16 scale have 19 bits together, so their product is exact in float32.
    assert found.keys() == expected.keys()
    assert [name for name in found if not is_equal(found[name], expected[name])] == []


def test_experts_of_one_tensor_are_named_one_by_one_with_a_warning(exported, tmp_path):
    packed, folder, result = exported("gpt_oss", "projections")
    found = converted(folder, tmp_path / "plain")
    for module, w_NK in packed.weights().items():
        assert is_equal(found[f"{module}.weight"], w_NK), module
    assert "expert-names" in rules_broken(result, "transformers")[0]
    biases = {name for name in found if re.search(r"experts\.\d+\.\w+_proj\.bias$", name)}
    assert len(biases) == 2 * 4 * 3  # layers, experts, projections


@pytest.mark.parametrize(("family", "plan"), [*CASES, ("gpt_oss", "projections")])
def test_each_module_is_matched_by_one_group_or_ignored(family, plan, exported):
    """By exact names and ``re.match``, in any order: engines differ in theirs."""
    _, folder, _ = exported(family, plan)
    config = quantization_of(folder)
    groups = config["config_groups"]
    weights = {n for n in tensors_of(folder)[0] if re.search(r"\.weight(_packed)?$", n)}
    modules = {name.rpartition(".")[0] for name in weights if "norm" not in name}
    modules -= {"model.embed_tokens", "backbone.embeddings"}
    modules = {name for name in modules if "conv1d" not in name}
    for module in modules:
        hits = [name for name, group in groups.items() if matches(group["targets"], module)]
        assert len(hits) + matches(config["ignore"], module) == 1, (module, hits)


def matches(targets, name):
    return any(
        re.match(target[3:], name) if target.startswith("re:") else target == name
        for target in targets
    )


def test_a_uniform_layer_is_one_expression(exported):
    _, folder, _ = exported("mixtral", "uniform")
    group = quantization_of(folder)["config_groups"]["group_0"]
    assert group["targets"] == [
        r"re:.*layers\.\d+\.block_sparse_moe\.experts\.\d+\.(w1|w3|w2)$",
        r"re:.*layers\.\d+\.self_attn\.(k_proj|o_proj|q_proj|v_proj)$",
    ]


def test_an_expert_of_its_own_scheme_is_in_an_expression_of_its_own(exported):
    _, folder, _ = exported("qwen2_moe", "experts")
    groups = quantization_of(folder)["config_groups"].values()
    targets = {target for group in groups for target in group["targets"]}
    experts = r"re:.*layers\.\d+\.mlp\.experts\.{}\.(gate_proj|up_proj|down_proj)$"
    assert {experts.format(expert) for expert in (0, 1, 3)} <= targets
    assert experts.format(2) in quantization_of(folder)["ignore"]


def test_formats_of_groups_and_of_the_whole(exported):
    _, mixed, _ = exported("qwen2_moe", "inputs")
    config = quantization_of(mixed)
    found = {
        (g["weights"]["num_bits"], g["weights"]["strategy"], g["format"])
        for g in config["config_groups"].values()
    }
    assert config["format"] == "mixed-precision"
    assert found == {
        (8, "channel", "int-quantized"),
        (8, "group", "int-quantized"),
        (4, "group", "int-quantized"),
        (4, "channel", "int-quantized"),
        (8, "channel", "float-quantized"),
    }
    inputs = {g["input_activations"]["num_bits"] for g in config["config_groups"].values()}
    assert inputs == {4, 8}
    assert quantization_of(exported("qwen2_moe", "layers")[1])["format"] == "pack-quantized"
    QuantizationConfig.model_validate(config)


def test_only_the_routers_and_the_head_are_ignored_where_all_is_quantized(exported):
    _, folder, _ = exported("qwen2_moe", "uniform")
    assert quantization_of(folder)["ignore"] == [
        "lm_head", r"re:.*layers\.\d+\.mlp\.(gate|shared_expert_gate)$"
    ]  # fmt: skip


def test_a_head_that_is_tied_is_ignored(exported):
    _, folder, _ = exported("qwen3", "four and eight")
    assert quantization_of(folder)["ignore"] == ["lm_head"]


def test_linears_that_were_not_quantized_are_ignored(exported):
    _, folder, _ = exported("qwen2_moe", "uniform", scope="experts")
    ignored = quantization_of(folder)["ignore"]
    assert r"re:.*layers\.\d+\.self_attn\.(k_proj|o_proj|q_proj|v_proj)$" in ignored


# What transformers makes of it


def logits_in_transformers(folder):
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS)


IDS = token_ids(2, 12, seed=5)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("qwen2_moe", "uniform"),
        ("mixtral", "uniform"),
        ("qwen2_moe", "dense mix"),
        ("llama", "dense mix"),
        ("qwen3", "four and eight"),
        ("nemotron_h", "uniform"),
        # Its shared_experts, in a narrower scheme, are not taken for the experts.
        ("deepseek_v3", "wide experts"),
        ("llama", "fp8"),
    ],
)
def test_transformers_loads_what_breaks_none_of_its_rules(family, plan, exported):
    packed, folder, result = exported(family, plan)
    assert rules_broken(result, "transformers")[0] == set()
    # The same weights; sums of float32 in another order.
    difference = logits_in_transformers(folder) - logits_in_transformers(packed.folder)
    assert difference.abs().max() < 1e-4


def test_transformers_decodes_experts_of_two_schemes_wrongly_and_a_rule_says_so(exported):
    # If this fails, transformers has mended it: take the rule out for its version.
    packed, folder, result = exported("qwen2_moe", "four and eight")
    assert "experts-alike-in-the-model" in rules_broken(result, "transformers")[0]
    difference = logits_in_transformers(folder) - logits_in_transformers(packed.folder)
    assert difference.abs().max() > 0.05


@pytest.mark.parametrize(
    ("family", "plan", "rules"),
    [
        ("qwen2_moe", "zeros", {"expert-formats", "linear-formats"}),
        ("qwen2_moe", "bytes", {"expert-formats"}),
        ("llama", "zeros", {"linear-formats"}),
    ],
)
def test_transformers_stops_and_a_rule_says_so(family, plan, rules, exported):
    # If this fails, transformers has mended it: take the rule out for its version.
    _, folder, result = exported(family, plan)
    assert rules_broken(result, "transformers")[0] == rules
    with pytest.raises((ValueError, RuntimeError)):
        logits_in_transformers(folder)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("layers", "packing-release: Integers of 3, 5 and 6 bits need compressed-tensors 0.18"),
        ("inputs", "w4a4_grow_sym, w4a8_g32_asym: weights take 8 bits"),
        ("inputs", "inputs are rounded by the engine in its own way"),
    ],
)
def test_a_warning_says(plan, words, exported):
    _, _, result = exported("qwen2_moe", plan)
    assert any(words in text for text in result.warnings)


def test_a_weight_that_files_hold_transposed_is_not_taken_for_one_of_its_own(exported, monkeypatch):
    checkpoint = open_checkpoint(exported("qwen2_moe", "uniform")[0].folder)
    blocks = checkpoint.blocks.values()
    assert len(names.stored_modules(checkpoint.model, blocks)) == len(blocks) == 38
    revert = names.revert_weight_conversion

    def transposed(model, tensors):
        found = revert(model, tensors)
        return {n: t.T if n.endswith("up_proj.weight") else t for n, t in found.items()}

    monkeypatch.setattr(names, "revert_weight_conversion", transposed)
    left = names.stored_modules(checkpoint.model, blocks)
    # The up projections of 4 experts and of the shared one in 2 layers.
    assert checkpoint.blocks.keys() - left.keys() == {b.path for b in blocks if "up_proj" in b.path}
    assert len(left) == 28


def test_rotated_inputs_are_refused(tmp_path):
    packed = make_packed(tmp_path, "llama", "uniform", rotated_layers=(1,))
    for to in ("compressed-tensors", "gptq"):
        with pytest.raises(ValueError, match=r"7 weights .* --rotation off, or export --to deq"):
            mxq.export(packed.folder, tmp_path / "ct", to=to)
    assert not (tmp_path / "ct").exists()


def test_the_config_is_that_of_the_original_but_for_the_quantization(exported):
    packed, folder, _ = exported("mixtral", "uniform")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((packed.original / "config.json").read_text())

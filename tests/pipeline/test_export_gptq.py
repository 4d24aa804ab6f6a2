"""Exports for GPTQ, decoded by loops that follow the definition of the format."""

import re

import numpy as np
import pytest
import torch
from checkpoints import tensors_of
from exports import expected_tensors, is_equal, make_packed, quantization_of, rules_broken

import mxq


def bits_of(words):
    """The bits of a column of 32-bit words, lowest first."""
    return [(int(word) >> place) & 1 for word in words.astype(np.uint32) for place in range(32)]


def codes_of(words, bits):
    stream = bits_of(words)
    return [
        sum(bit << place for place, bit in enumerate(stream[start : start + bits]))
        for start in range(0, len(stream), bits)
    ]


def gptq_decode(tensors, module, bits, is_version_1):
    """``w[i, o] = scales[g, o] * (code[i, o] - zero[g, o])``, as [out, in] in float64."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{module}.{suffix}"].numpy() for suffix in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert qweight.dtype == qzeros.dtype == g_idx.dtype == np.int32
    assert scales.dtype == np.float16
    inputs, outputs = len(g_idx), scales.shape[1]
    zeros = [codes_of(row, bits) for row in qzeros]
    w = np.empty((outputs, inputs))
    for o in range(outputs):
        codes = codes_of(qweight[:, o], bits)
        for i in range(inputs):
            g = g_idx[i]
            zero = zeros[g][o] + 1 if is_version_1 else zeros[g][o]
            w[o, i] = float(scales[g, o]) * (codes[i] - zero)
    return torch.from_numpy(w)


def rule_of(config, module):
    """What ``dynamic`` says of a module by the first match, None if it is skipped."""
    for text, fields in config["dynamic"].items():
        sign, expression = text[:2], text[2:]
        if re.match(expression, module):
            return None if sign == "-:" else {**config, **fields}
    return config


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def make(family, plan, version=None, **options):
        key = (family, plan, version, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("gptq")
            packed = make_packed(folder, family, plan, **options)
            target = folder / "out"
            result = mxq.export(packed.folder, target, to="gptq", checkpoint_format=version)
            made[key] = packed, target, result
        return made[key]

    return make


@pytest.mark.parametrize(
    ("family", "plan", "version"),
    [
        ("qwen2_moe", "four and eight", None),
        ("mixtral", "widths", None),
        ("llama", "widths", "gptq_v2"),
        ("llama", "four and eight", "gptq_v2"),
        ("llama", "zeros", "gptq"),
    ],
)
def test_an_independent_decoder_gives_the_same_weights(family, plan, version, exported):
    packed, folder, _ = exported(family, plan, version)
    config, (tensors, _) = quantization_of(folder), tensors_of(folder)
    is_version_1 = config["checkpoint_format"] == "gptq"
    assert is_version_1 == (version == "gptq" or (plan == "four and eight" and version is None))
    expected, found = expected_tensors(packed), {}
    for name in tensors:
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            rule = rule_of(config, module)
            found[f"{module}.weight"] = gptq_decode(tensors, module, rule["bits"], is_version_1)
            groups = 1 if rule["group_size"] == -1 else 64 // rule["group_size"]
            assert tensors[f"{module}.scales"].shape[0] in (groups, groups // 2)
        elif suffix not in ("qzeros", "scales", "g_idx"):
            found[name] = tensors[name]
            assert suffix != "weight" or tensors[name].dim() < 2 or is_skipped(config, module)
    assert found.keys() == expected.keys()
    assert [name for name in found if not is_equal(found[name], expected[name])] == []


def is_skipped(config, module):
    return rule_of(config, module) is None or module == "model.embed_tokens"


def test_symmetric_plans_are_version_1_and_store_one_less(exported):
    _, folder, _ = exported("qwen2_moe", "four and eight")
    tensors, _ = tensors_of(folder)
    config = quantization_of(folder)
    assert (config["checkpoint_format"], config["sym"]) == ("gptq", True)
    words = {
        int(w) & 0xFFFFFFFF for n, t in tensors.items() if n.endswith("qzeros") for w in t.flatten()
    }
    assert words == {0x77777777, 0x7F7F7F7F}  # one less than 8 and 128 in each place


def test_version_1_refuses_a_zero_point_of_0(tmp_path):
    packed = make_packed(tmp_path, "llama", "zeros", is_positive=True)
    with pytest.raises(ValueError, match=r"a zero point of 0.* give --checkpoint-format gptq_v2"):
        mxq.export(packed.folder, tmp_path / "out", to="gptq", checkpoint_format="gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "packed"]


def test_skipped_modules_come_first_and_the_usual_scheme_is_not_listed(exported):
    _, folder, _ = exported("mixtral", "widths")
    config = quantization_of(folder)
    signs = [text[:2] for text in config["dynamic"]]
    assert signs == sorted(signs, reverse=True)
    assert {"-:", "+:"} == set(signs)
    listed = [{k: fields[k] for k in ("bits", "group_size", "sym")}
              for text, fields in config["dynamic"].items() if text[0] == "+"]  # fmt: skip
    assert {k: config[k] for k in ("bits", "group_size", "sym")} not in listed


def test_rules_also_match_what_an_engine_fuses(exported):
    _, folder, _ = exported("qwen2_moe", "four and eight")
    config = quantization_of(folder)
    for layer, bits in ((0, 4), (1, 8)):
        for module in ("self_attn.qkv_proj", "mlp.experts", "mlp.shared_expert.gate_up_proj"):
            assert rule_of(config, f"model.layers.{layer}.{module}")["bits"] == bits, module


def test_attention_that_was_kept_is_skipped_also_where_an_engine_fuses_it(exported):
    _, folder, _ = exported("qwen2_moe", "uniform", scope="experts")
    config = quantization_of(folder)
    assert rule_of(config, "model.layers.0.self_attn.qkv_proj") is None
    assert rule_of(config, "model.layers.1.self_attn.o_proj") is None
    assert rule_of(config, "model.layers.1.mlp.gate") is None
    assert rule_of(config, "model.layers.1.mlp.experts")["bits"] == 4


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("llama", "dense mix", "is w[56].* 2, 3, 4 or 8 bits with plain inputs; export --to comp"),
        ("llama", "fp8", "is fp8, and gptq holds integer weights"),
        ("llama", "bytes", "is w8a8_grow_sym, and gptq holds integer weights"),
        ("llama", "plain", "no weight of this checkpoint is quantized"),
        ("gpt_oss", "uniform", "stores all experts of a layer in one tensor .*for which gptq"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(family, plan, words, tmp_path):
    packed = make_packed(tmp_path, family, plan)
    with pytest.raises(ValueError, match=words):
        mxq.export(packed.folder, tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()


def test_a_width_that_32_does_not_divide_is_refused(tmp_path):
    packed = make_packed(tmp_path, "llama", "rows", intermediate_size=48)
    with pytest.raises(ValueError, match="64 x 48 weights, and gptq needs multiples of 32"):
        mxq.export(packed.folder, tmp_path / "out", to="gptq")


def test_warnings_name_what_readers_cannot_do(exported):
    _, _, mixed = exported("mixtral", "widths")
    _, _, uniform = exported("qwen2_moe", "uniform", scope="experts")
    assert "gptq-dynamic" in rules_broken(mixed, "transformers")[0]
    assert "gptq-formats" in rules_broken(mixed, "vllm")[0]
    # Attention, routers and the head are plain, which only `dynamic` says.
    assert rules_broken(uniform, "transformers") == ({"gptq-dynamic"}, {"gptq-unread"})
    assert rules_broken(uniform, "vllm")[0] == set()

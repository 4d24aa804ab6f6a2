"""Sources in fp8 blocks and in mxfp4 give the checkpoint of the values that they stand for."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from architectures import tiny_model
from checkpoints import edit_config, plan_of, tensors_of, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import logits_of, save_tiny, token_ids
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mxq.config import CalibrationOptions
from mxq.models.adapter import ModelAdapter
from mxq.models.decoding import decode_fp8, decode_mxfp4
from mxq.models.source import open_source
from mxq.profiling.draw import draw_calibration

FP8_BLOCK = (24, 40)
"""Divides neither side of the tiny weights, so blocks at the edges are cut."""


def encode_fp8(w_NK, block):
    """Codes and scales of a weight, and the values that they stand for, block by block."""
    n, k = w_NK.shape
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-n // block[0]), -(-k // block[1]))
    values = torch.empty(n, k, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows = slice(i * block[0], (i + 1) * block[0])
            columns = slice(j * block[1], (j + 1) * block[1])
            part = w_NK[rows, columns]
            scales[i, j] = part.abs().max() / 448  # the largest float8_e4m3fn
            codes[rows, columns] = (part / scales[i, j]).to(torch.float8_e4m3fn)
            values[rows, columns] = codes[rows, columns].double() * scales[i, j].double()
    return codes, scales, values.float()


def rewrite(folder, change, quantization):
    """Replace tensors of a source by ``change(name, tensor) -> {name: tensor}``."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        tensors |= change(name, tensor)
    save_file(tensors, path, {"format": "pt"})
    if quantization is not None:
        edit_config(folder, lambda config: config.update(quantization_config=quantization))
    return folder


def is_fp8(name):
    """Every linear and expert of the layers but the router, as such checkpoints are made."""
    return "_proj" in name and name.endswith(".weight")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A source in fp8 and one with the same values in full, both in bfloat16 beside that."""
    parent = tmp_path_factory.mktemp("fp8")

    def coded(name, tensor):
        if not is_fp8(name):
            return {name: tensor}
        codes, scales, _ = encode_fp8(tensor.float(), FP8_BLOCK)
        return {name: codes, f"{name}_scale_inv": scales}

    def plain(name, tensor):
        if not is_fp8(name):
            return {name: tensor}
        return {name: encode_fp8(tensor.float(), FP8_BLOCK)[2]}

    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(FP8_BLOCK),
    }
    return both(parent, "deepseek_v3", (coded, quantization), (plain, None))


def both(parent, family, *changes):
    """Two copies of one tiny source in bfloat16, changed; their folders."""
    original = save_tiny(parent / "original", family, dtype=torch.bfloat16, tokenizer=False)
    folders = [Path(copytree(original, parent / name)) for name in ("coded", "plain")]
    return [rewrite(f, *change) for f, change in zip(folders, changes, strict=True)]


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """A source whose experts are in mxfp4, and one with the same values in full."""
    parent = tmp_path_factory.mktemp("mxfp4")
    generator = torch.Generator().manual_seed(7)
    values = {}

    def encoded(name, tensor):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, k, n = tensor.shape
        blocks = torch.randint(256, (experts, n, k // 32, 16), generator=generator).byte()
        scales = torch.randint(121, 126, (experts, n, k // 32), generator=generator).byte()
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    def plain(name, tensor):
        return {name: values.get(name, tensor).contiguous()}

    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return both(parent, "gpt_oss", (encoded, quantization), (plain, None))


def same_tensors(one, other):
    first, second = tensors_of(one)[0], tensors_of(other)[0]
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    return first


def test_an_fp8_source_is_packed_as_the_values_that_it_stands_for(fp8, tmp_path):
    folders = [write_checkpoint(source, tmp_path / source.name, scope="all") for source in fp8]
    same_tensors(*folders)
    assert plan_of(folders[0])["quant_method"] == "mxq"


@pytest.mark.parametrize("last", ["scale", "qscale_weight"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_may_have_another_name_and_be_powers_of_two(fp8, tmp_path, last, kind):
    values = {}

    def rounded(name, tensor):
        if not name.endswith("_scale_inv"):
            return {name: tensor}
        exponents = tensor.log2().round()
        values[name.removesuffix("_scale_inv")] = exponents.exp2()
        scales = (exponents + 127).to(torch.uint8).view(kind)
        return {f"{name.removesuffix('weight_scale_inv')}{last}": scales}

    def plain(name, tensor):
        if name not in values:
            return {} if name.endswith("_scale_inv") else {name: tensor}
        return {name: decode_fp8(tensor, values[name], block=FP8_BLOCK)}

    source, decoded = (Path(copytree(fp8[0], tmp_path / name)) for name in ("source", "decoded"))
    rewrite(source, rounded, None)
    rewrite(decoded, plain, None)
    edit_config(decoded, lambda config: config.pop("quantization_config"))
    assert values
    folders = [
        write_checkpoint(s, tmp_path / f"{s.name}-out", scope="all") for s in (source, decoded)
    ]
    same_tensors(*folders)


def test_an_mxfp4_source_is_packed_as_the_values_that_it_stands_for(mxfp4, tmp_path):
    folders = [write_checkpoint(source, tmp_path / source.name, scope="all") for source in mxfp4]
    same_tensors(*folders)
    assert plan_of(folders[0])["quant_method"] == "mxq"


def test_a_checkpoint_of_an_fp8_source_loads_and_keeps_the_rest_in_bf16(fp8, tmp_path):
    packed = write_checkpoint(fp8[0], tmp_path / "packed")
    tensors, _ = tensors_of(packed)
    kept = tensors["model.layers.0.self_attn.o_proj.weight"]
    assert kept.dtype == torch.bfloat16
    expected = load_file(fp8[1] / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(kept, expected.to(torch.bfloat16))
    config = json.loads((packed / "config.json").read_text())
    assert "weight_block_size" not in json.dumps(config)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert logits_of(model, token_ids(1, 8)).isfinite().all()


def test_a_quantized_language_part_of_a_model_that_sees_is_decoded(tmp_path):
    source = tmp_path / "source"
    tiny_model("kimi_k25").to(torch.bfloat16).save_pretrained(source)
    values = {}

    def coded(name, tensor):
        if not (is_fp8(name) and "language_model" in name):
            return {name: tensor}
        codes, scales, values[name] = encode_fp8(tensor.float(), FP8_BLOCK)
        return {name: codes, f"{name}_scale_inv": scales}

    rewrite(source, coded, None)
    quantization = {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)}
    edit_config(source, lambda c: c["text_config"].update(quantization_config=quantization))
    packed = write_checkpoint(source, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxq"
    assert "quantization_config" not in config["text_config"]
    name = next(name for name in values if name.endswith("0.self_attn.o_proj.weight"))
    kept = AutoModelForImageTextToText.from_pretrained(packed).get_submodule(
        "model.language_model.layers.0.self_attn.o_proj"
    )
    assert torch.equal(kept.weight, values[name].to(torch.bfloat16))


def test_layers_of_a_quantized_source_are_decoded_one_at_a_time(mxfp4):
    source = open_source(mxfp4[0])
    source.load_layer(1)
    assert source.layers[0].mlp.experts.down_proj.is_meta
    expected = load_file(mxfp4[1] / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(source.layers[1].mlp.experts.down_proj, expected.float())


def test_a_quantized_source_writes_its_own_calibration_text(fp8):
    written = [
        draw_calibration(
            ModelAdapter(open_source(source)),
            CalibrationOptions(spec="self", samples=8, seqlen=6, seed=0),
        )[0].input_ids
        for source in fp8
    ]
    # The first is written by decoded layers, the second by from_pretrained: the same logits but
    # for the order in which a token's two experts are summed, so the same draws.
    assert written[0].unique().numel() > 5
    assert torch.equal(*written)


# The arithmetic


def test_fp8_values_are_codes_times_the_scale_of_their_block():
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(100, 72, generator=generator)
    codes, scales, values = encode_fp8(w_NK, FP8_BLOCK)
    # One product of two float32 numbers, rounded once: the same as float64 rounded to float32.
    assert torch.equal(decode_fp8(codes, scales, block=FP8_BLOCK), values)


def test_fp8_experts_in_one_tensor_are_decoded_expert_by_expert():
    generator = torch.Generator().manual_seed(1)
    parts = [encode_fp8(torch.randn(48, 80, generator=generator), FP8_BLOCK) for _ in range(3)]
    codes, scales, values = (torch.stack(list(same)) for same in zip(*parts, strict=True))
    assert torch.equal(decode_fp8(codes, scales, block=FP8_BLOCK), values)


def test_fp8_with_one_scale_for_a_weight():
    codes = torch.tensor([[1.0, -2.0], [448.0, 0.5]]).to(torch.float8_e4m3fn)
    expected = torch.tensor([[0.25, -0.5], [112.0, 0.125]])  # by hand: times 1/4
    assert torch.equal(decode_fp8(codes, torch.tensor(0.25), block=None), expected)


def test_mxfp4_values_by_hand():
    # One output of 32 inputs: bytes 0x10 hold codes 0 and 1 (values 0 and 0.5), 0x7F holds 15 and 7
    # (values -6 and 6); the exponent 128 - 127 doubles them.
    packed = torch.full((1, 1, 1, 16), 0x10, dtype=torch.uint8)
    packed[..., 1] = 0x7F
    values = decode_mxfp4(packed, torch.full((1, 1, 1), 128, dtype=torch.uint8))
    assert values.shape == (1, 32, 1)
    assert values.flatten().tolist() == [0.0, 1.0, -12.0, 12.0] + [0.0, 1.0] * 14


def test_mxfp4_values_are_those_of_transformers():
    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(256, (2, 6, 3, 16), generator=generator).byte()
    scales = torch.randint(100, 150, (2, 6, 3), generator=generator).byte()
    expected = convert_moe_packed_tensors(packed, scales, dtype=torch.float32)
    assert torch.equal(decode_mxfp4(packed, scales), expected)


# Refusals


def refuses(source, message):
    with pytest.raises(ValueError, match=message):
        open_source(source).load_layer(1)


@pytest.fixture
def damaged(fp8, tmp_path):
    """A copy of the fp8 source that a test may change."""

    def copy(change):
        return rewrite(Path(copytree(fp8[0], tmp_path / "damaged")), change, None)

    return copy


SCALE = "model.layers.1.self_attn.o_proj.weight_scale_inv"


def test_scales_of_another_block_size_are_refused(damaged):
    source = damaged(lambda n, t: {n: t[:-1] if n == SCALE else t})
    refuses(source, r"o_proj.weight cannot be decoded: .* scales \[2, 2\] .*, expected \[3, 2\]")


def test_an_fp8_weight_without_scales_is_refused(damaged):
    source = damaged(lambda n, t: {} if n == SCALE else {n: t})
    refuses(source, r"o_proj.weight as F8_E4M3 without scales that mxq can read; give the original")


def test_a_block_size_that_is_none_is_refused(damaged):
    source = damaged(lambda n, t: {n: t})
    edit_config(source, lambda config: config["quantization_config"].update(weight_block_size=[8]))
    refuses(source, r"weight_block_size \[8\], expected \[rows, columns\]")


def test_another_method_is_refused_with_those_that_are_read(damaged):
    source = damaged(lambda n, t: {n: t})
    edit_config(source, lambda config: config["quantization_config"].update(quant_method="gptq"))
    refuses(
        source, r"is already quantized \(gptq\); give the original model, or one in fp8 or mxfp4"
    )

"""What a model weighs, by its plan or by the headers of its files: every format counted by hand."""

import json

import pytest
import torch
from checkpoints import make_allocation, write_checkpoint
from safetensors.torch import save_file
from tiny import save_tiny

from mxq.evaluation.sizes import Weight, weigh
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.scheme import Scheme
from mxq.storage import save_artifact


def weigh_tensors(folder, tensors, **config):
    """The weight of a folder that holds those tensors; the configuration is of some family."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    found = weigh(str(folder))
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    return found.bits_per_weight, found.weights, found.source


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype)


def test_the_plan_says_what_an_mxq_checkpoint_has(tmp_path):
    original = save_tiny(tmp_path / "original")
    folder = write_checkpoint(original, tmp_path / "out")
    # bf16 blocks are plain tensors, which headers alone do not tell from what was never quantized.
    adapter = ModelAdapter(open_source(original))
    scheme = Scheme.parse("w3a16_g32_sym")
    plan = make_allocation(adapter, {block.name: scheme for block in adapter.blocks()})
    save_artifact(folder / "mxq_plan.json", plan)
    found = weigh(str(folder))
    assert (found.weights, found.source) == (plan.weights, "plan")
    assert found.bits_per_weight == 3 + 16 / 32
    assert found.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_model_that_is_not_quantized_has_the_bits_of_its_types(tmp_path):
    tensors = {
        "a.weight": zeros(4, 8, dtype=torch.bfloat16),
        "b.weight": zeros(2, 8, dtype=torch.float32),
        "norm.weight": zeros(99, dtype=torch.float32),  # no matrix
        "position_ids": zeros(1, 50, dtype=torch.int64),  # no weight
    }
    assert weigh_tensors(tmp_path / "m", tensors) == ((32 * 16 + 16 * 32) / 48, 48, "type")


def test_packed_modules_of_compressed_tensors(tmp_path):
    tensors = {
        # [6, 40] in 3 bits, groups of 20: ceil(120 / 32) = 4 words a row, 2 scales, and zero
        # points along the rows in ceil(18 / 32) = 1 word for each group.
        "q.weight_packed": zeros(6, 4),
        "q.weight_scale": zeros(6, 2, dtype=torch.bfloat16),
        "q.weight_zero_point": zeros(1, 2),
        "q.weight_shape": torch.tensor([6, 40]),
        "q.bias": zeros(6, dtype=torch.bfloat16),
        "kept.weight": zeros(50, 50, dtype=torch.bfloat16),
    }
    bits = 6 * 4 * 32 + 6 * 2 * 16 + 2 * 32
    found = weigh_tensors(tmp_path / "m", tensors, quantization_config={})
    assert found == (bits / 240, 240, "files")


def test_the_order_of_inputs_counts(tmp_path):
    tensors = {
        "q.weight_packed": zeros(2, 1),
        "q.weight_scale": zeros(2, 1, dtype=torch.float16),
        "q.weight_g_idx": zeros(8),
        "q.weight_shape": torch.tensor([2, 8]),
    }
    assert weigh_tensors(tmp_path / "m", tensors)[0] == (64 + 32 + 8 * 32) / 16


def test_gptq_and_awq_modules(tmp_path):
    # 4 bits of 16 outputs and 64 inputs in groups of 32. GPTQ packs along the inputs, AWQ the
    # outputs.
    scales = {"scales": zeros(2, 16, dtype=torch.float16), "qzeros": zeros(2, 2)}
    gptq = {"qweight": zeros(8, 16), "g_idx": zeros(64), **scales}
    awq = {"qweight": zeros(64, 2), **scales}
    bits = 64 * 16 * 4 + 32 * 16 + 4 * 32
    for name, parts, order_bits in (("gptq", gptq, 64 * 32), ("awq", awq, 0)):
        tensors = {f"a.{part}": tensor for part, tensor in parts.items()}
        found = weigh_tensors(tmp_path / name, tensors)
        assert found == ((bits + order_bits) / 1024, 1024, "files")


def test_fp8_and_four_bit_floats(tmp_path):
    tensors = {
        "a.weight": zeros(8, 4, dtype=torch.float8_e4m3fn),
        "a.weight_scale_inv": zeros(1, 1, dtype=torch.float32),
        "b.weight_packed": zeros(8, 8, dtype=torch.uint8),  # two weights in a byte
        "b.weight_scale": zeros(8, 1, dtype=torch.float8_e4m3fn),
        "experts.gate_up_proj_blocks": zeros(2, 4, 1, 16, dtype=torch.uint8),
        "experts.gate_up_proj_scales": zeros(2, 4, 1, dtype=torch.uint8),
        "experts.gate_up_proj_bias": zeros(2, 4, dtype=torch.bfloat16),
    }
    weights = 32 + 128 + 256
    bits = (32 * 8 + 32) + (64 * 8 + 64) + (128 * 8 + 8 * 8)
    assert weigh_tensors(tmp_path / "m", tensors) == (bits / weights, weights, "files")


@pytest.mark.parametrize(
    "tensors",
    [
        # bitsandbytes: codes in a column of bytes, which no part here belongs to.
        {"a.weight": zeros(64, 1, dtype=torch.uint8), "a.weight.absmax": zeros(2)},
        # GPTQ without the order of its inputs does not say how many there are.
        {"a.qweight": zeros(8, 16), "a.scales": zeros(2, 16, dtype=torch.float16)},
    ],
    ids=["bitsandbytes", "no order"],
)
def test_bits_of_an_unknown_format_are_not_guessed(tmp_path, tensors):
    found = weigh_tensors(tmp_path / "m", tensors, quantization_config={"quant_method": "x"})
    assert found == (None, None, None)


def test_a_folder_without_matrices_has_no_bits(tmp_path):
    assert weigh_tensors(tmp_path / "m", {"norm.weight": torch.zeros(3)}) == (None, None, None)
    assert isinstance(weigh(str(tmp_path / "m")), Weight)

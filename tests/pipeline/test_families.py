"""Ten families through the same code: streamed, packed with a mix of schemes, loaded again."""

from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import pytest
import torch
from checkpoints import make_allocation, plan_of, random_schemes, tensors_of
from oracle import decode, streamed_logits, weight_view
from tiny import FAMILIES, logits_of, save_tiny, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxq
from mxq.artifacts import Allocation
from mxq.checkpoint.pack import PackReport, pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import QUANTIZERS, Method
from mxq.scheme import WEIGHT_BITS, parse_schemes

WEIGHT_ONLY = parse_schemes(
    [
        f"w{bits}a16_g{group}_{grid}"
        for bits in WEIGHT_BITS
        for group in (32, 64, "row")
        for grid in ("sym", "asym")
    ]
    + ["bf16"]
)
WITH_INPUTS = parse_schemes(
    "w8a8_grow_sym,w8a8_g32_asym,w4a8_g32_sym,w4a8_grow_asym,w4a4_g32_asym,fp8,w3a16_g32_sym,bf16"
)
SHAPE_BYTES = 16
"""``weight_shape``: two int64 beside each integer weight."""

pytestmark = pytest.mark.parametrize("family", FAMILIES, scope="module")


@dataclass(frozen=True, slots=True)
class Packed:
    """A model, a plan for it, and the checkpoint of both."""

    original: Path
    adapter: ModelAdapter
    plan: Allocation
    folder: Path
    report: PackReport


@pytest.fixture(scope="module")
def original(family, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def packed(original, tmp_path_factory):
    """Weight-only schemes, "gptq", every linear of the layers, the second layer rotated."""
    folder = tmp_path_factory.mktemp("packed")
    return pack_mix(original, folder, WEIGHT_ONLY, method="gptq", target="local")


@pytest.fixture(scope="module")
def packed_inputs(original, tmp_path_factory):
    """The same with schemes that round activations, and "rtn"."""
    return pack_mix(original, tmp_path_factory.mktemp("packed"), WITH_INPUTS, method="rtn")


def pack_mix(original, folder, menu, *, method, target="original"):
    adapter = ModelAdapter(open_source(original), scope="all")
    schemes = random_schemes(adapter, menu, seed=1)
    plan = make_allocation(adapter, schemes, rotated_layers=(1,))
    batches = make_batches(token_ids(6, 16, seed=2), token_ids(2, 16, seed=3))
    method = Method(method, QUANTIZERS[method])
    report = pack(adapter, batches, plan, folder, method=method, target=target)
    return Packed(original, adapter, plan, folder, report)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def is_rotated(packed, block):
    """Whether the file holds the block's weight rotated; bf16 never is."""
    kind = packed.plan.schemes[block.name].kind
    return block.layer in packed.plan.rotated_layers and kind != "bf16"


def decoded(packed, block, tensors):
    scheme = packed.plan.schemes[block.name]
    return decode(tensors, block.module, scheme, rotated=is_rotated(packed, block))


def test_streamed_layers_give_the_logits_of_the_whole_model(family, original):
    ids = token_ids(3, 16)
    expected = logits_of(load(original), ids)
    # The same operations but for the order in which a token's two experts are summed and the size
    # of a batch: rounding of float32, some 1e-7 of values up to 5, through two layers.
    assert torch.allclose(streamed_logits(original, ids), expected, rtol=0, atol=1e-5)


def test_a_drawn_mix_has_many_widths_groups_and_both_grids(family, packed):
    used = Counter(packed.plan.schemes.values())
    assert len({scheme.w_bits for scheme in used}) >= 5
    assert {scheme.symmetric for scheme in used} == {True, False}
    assert {scheme.group_size for scheme in used} == {32, 64, None}


def test_a_packed_model_equals_the_original_with_decoded_weights(family, packed):
    tensors, _ = tensors_of(packed.folder)
    expected = load(packed.original)
    for block in packed.adapter.blocks():
        weight_view(expected, family, block.module).copy_(decoded(packed, block, tensors))
    ids = token_ids(2, 16, seed=5)
    before = logits_of(load(packed.original), ids)
    difference = (logits_of(load(packed.folder), ids) - logits_of(expected, ids)).abs().max()
    # Rounding of float32 again, now with the rotation of inputs on one side only.
    assert difference < 1e-4
    assert (before - logits_of(expected, ids)).abs().max() > 0.05


def test_a_decoded_weight_is_near_the_original_one(family, packed):
    tensors, _ = tensors_of(packed.folder)
    model = load(packed.original)
    for block in packed.adapter.blocks():
        scheme = packed.plan.schemes[block.name]
        w_NK = weight_view(model, family, block.module).double()
        error = (decoded(packed, block, tensors) - w_NK).norm() / w_NK.norm()
        # Gaussian weights on a uniform grid of 2 bits lose a third of their norm in a row; every
        # bit more halves that. GPTQ gives up to twice as much on the weight itself.
        limit = 0.004 if scheme.kind == "bf16" else 3.0 * 2.0**-scheme.w_bits
        assert error < limit, f"{block.name} {scheme}"


def test_activation_schemes_run_as_the_calibrated_model_did(family, packed_inputs):
    tensors, _ = tensors_of(packed_inputs.folder)

    def install(adapter, layer):
        for block in adapter.blocks(layer):
            w_NK = decoded(packed_inputs, block, tensors)
            scheme = packed_inputs.plan.schemes[block.name]
            adapter.install(block.name, w_NK, scheme, is_rotated(packed_inputs, block))

    # float64, because an input that falls to the other side of a rounding boundary moves the
    # logits by 1e-2 and in float32 one of some ten thousand inputs would.
    ids = token_ids(2, 12, seed=6)
    expected = streamed_logits(
        packed_inputs.original, ids, dtype=torch.float64, scope="all", on_layer=install
    )
    found = logits_of(load(packed_inputs.folder, torch.float64), ids)
    assert (found - expected).abs().max() < 1e-5


def test_every_tensor_of_the_file_is_accounted_for(family, packed):
    tensors, files = tensors_of(packed.folder)
    expected = {}
    for block in packed.adapter.blocks():
        scheme = packed.plan.schemes[block.name]
        expected |= block_tensors(block, scheme)
    quantized = {block.tensor for block in packed.adapter.blocks()}
    model = load(packed.original)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in quantized | tied and not is_split_bias(name):
            expected[name] = (tuple(tensor.shape), torch.float32)
    for block in packed.adapter.blocks():
        if block.expert is not None and family in ("gpt_oss",):
            expected[f"{block.module}.bias"] = ((block.out_features,), torch.float32)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == expected
    assert packed.report.tensor_bytes == sum(t.nbytes for t in tensors.values())
    assert set(plan_of(packed.folder)["files"]) == set(files.values())


def is_split_bias(name):
    return name.endswith(("experts.gate_up_proj_bias", "experts.down_proj_bias"))


def block_tensors(block, scheme):
    """Shapes and types that a weight has in a file, counted by hand."""
    n, k, path, bits = block.out_features, block.in_features, block.module, scheme.w_bits
    if scheme.kind == "bf16":
        return {f"{path}.weight": ((n, k), torch.bfloat16)}
    groups = 1 if scheme.group_size is None else k // scheme.group_size
    found = {
        f"{path}.weight_packed": ((n, k * bits // 32), torch.int32),
        f"{path}.weight_scale": ((n, groups), torch.float16),
        f"{path}.weight_shape": ((2,), torch.int64),
    }
    if not scheme.symmetric:
        found[f"{path}.weight_zero_point"] = ((ceil(n * bits / 32), groups), torch.int32)
    return found


def padding_bytes(block, scheme):
    """What the last word of zero points wastes where 32 does not divide the rows."""
    if scheme.symmetric or block.out_features % 32 == 0:
        return 0
    groups = 1 if scheme.group_size is None else block.in_features // scheme.group_size
    return -block.out_features * scheme.w_bits % 32 // 8 * groups


def test_a_loaded_model_takes_the_packed_size_and_generates(family, packed):
    model = load(packed.folder)
    held = sum(p.nbytes for p in model.parameters())
    original = load(packed.original)
    quantized = {block.tensor for block in packed.adapter.blocks()}
    kept = sum(p.nbytes for name, p in original.named_parameters() if name not in quantized)
    integer = [s for s in packed.plan.schemes.values() if s.kind == "int"]
    padding = sum(padding_bytes(b, packed.plan.schemes[b.name]) for b in packed.adapter.blocks())
    shapes = SHAPE_BYTES * len(integer)
    assert held == packed.plan.storage_bits // 8 + kept + shapes + padding
    tokenizer = AutoTokenizer.from_pretrained(packed.folder)
    prompt = tokenizer("Once upon", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert len(written[0]) > prompt["input_ids"].shape[1]
    assert tokenizer.decode(written[0]).startswith("Once upon")


def test_the_predicted_loss_is_near_the_measured_one(family, original, tmp_path):
    result = mxq.quantize(
        original, output=tmp_path / "out", plan="uniform:w4a16_g32_asym", scope="all",
        calibration=token_ids(36, 16, seed=9), rotation="off", quantizer="rtn",
    )  # fmt: skip
    # Both are KL to the original in nats per token: a sum of second-order estimates, block by
    # block, against the whole model measured on 60 positions. The sample alone moves the ratio
    # between 0.55 and 1.5; a lost factor of two takes families out on one side or the other.
    ratio = result.plans["plan"].predicted_loss / result.losses["plan"].kl
    assert 0.5 < ratio < 2

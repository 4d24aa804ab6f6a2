"""Models that also see: the language part is quantized, the rest is written as it was."""

import pytest
import torch
from architectures import discovered, tiny_model
from checkpoints import plan_of, tensors_of
from safetensors.torch import load_file
from tiny import logits_of, token_ids
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

import mxq

SEEING = tuple(
    name
    for name in discovered()
    if name not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    and name.endswith("_moe")  # two families of the many, for the time that whole runs take
    and name.startswith(("qwen3_vl", "glm4v"))
)


@pytest.fixture(scope="module", params=SEEING)
def run(request, tmp_path_factory):
    """A bfloat16 source, and what ``quantize`` made of it by default."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param).to(torch.bfloat16)
    model.save_pretrained(folder / "source")
    calibration = token_ids(18, 16, seed=3) % 200
    result = mxq.quantize(
        folder / "source", output=folder / "out", bits=3.5, calibration=calibration
    )
    return model, folder, result


def test_two_families_are_tested():
    assert len(SEEING) == 2


def test_only_decoder_layers_of_the_language_part_are_quantized(run):
    _, folder, _ = run
    plan = plan_of(folder / "out")
    assert plan["experts"]
    assert all(".language_model.layers." in path for path in [*plan["experts"], *plan["linears"]])


def test_the_vision_tower_has_the_same_bytes(run):
    _, folder, _ = run
    before, after = (
        load_file(folder / "source" / "model.safetensors"),
        tensors_of(folder / "out")[0],
    )
    tower = [name for name in before if "visual" in name]
    assert len(tower) > 10
    for name in tower:
        assert before[name].dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name


def test_the_checkpoint_loads_with_the_class_of_the_original_and_sees_the_same(run):
    model, folder, result = run
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "out").eval()
    assert type(loaded).__name__ == type(model).__name__
    towers = [m.model.visual.state_dict() for m in (model, loaded)]
    assert all(torch.equal(tensor, towers[1][name]) for name, tensor in towers[0].items())
    ids = token_ids(2, 16, seed=4) % 200
    found, original = logits_of(loaded, ids).float(), logits_of(model, ids).float()
    kl = torch.nn.functional.kl_div(
        found.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="sum"
    )
    # Other tokens than the run measured on, in bfloat16: the same within a factor.
    assert kl / ids.numel() < 4 * result.losses[result.written].kl + 0.01


def test_a_class_of_the_language_part_alone_is_refused_with_the_right_one(tmp_path):
    tiny_model("qwen3_5_moe").save_pretrained(tmp_path / "source")
    calibration = token_ids(9, 8, seed=3) % 200
    mxq.quantize(
        tmp_path / "source", output=tmp_path / "out", plan="uniform:w4a16_g32_asym",
        calibration=calibration, quantizer="rtn", rotation="off",
    )  # fmt: skip
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"load it with Qwen3_5MoeForConditionalGeneration, or"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

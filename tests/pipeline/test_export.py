"""Plain models from checkpoints, what all exports refuse, and the command."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import edit_config, tensors_of
from exports import expected_tensors, largest_difference, make_packed
from tiny import logits_of, token_ids
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mxq
from mxq.checkpoint.export import folder as export_folder
from mxq.cli import app

IDS = token_ids(2, 12, seed=5)
WEIGHT_ONLY = ("llama", "qwen3", "qwen2_moe", "mixtral", "gpt_oss", "nemotron_h")


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """``rotated(family)``: a mix by expert or projection with the second layer rotated."""
    made = {}

    def make(family):
        if family not in made:
            plan = "experts" if family != "llama" else "projections"
            folder = tmp_path_factory.mktemp("plain")
            made[family] = make_packed(folder, family, plan, rotated_layers=(1,))
            mxq.export(made[family].folder, folder / "float32", to="dequantized", dtype="float32")
            mxq.export(made[family].folder, folder / "bfloat16", to="dequantized")
        return made[family]

    return make


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    return make_packed(tmp_path_factory.mktemp("uniform"), "llama", "uniform")


@pytest.mark.parametrize("family", WEIGHT_ONLY)
def test_a_plain_model_has_the_decoded_weights_under_the_originals_names(family, rotated):
    packed = rotated(family)
    source, _ = tensors_of(packed.original)
    found, _ = tensors_of(packed.folder.parent / "float32")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in source.items()}
    if family == "gpt_oss":
        return  # its fused tensors are compared by logits below
    # A rotation is a product of up to 128 terms in float32 here and in float64 there.
    expected = expected_tensors(packed)
    assert max(largest_difference(found[n], expected[n]) for n in found) < 1e-6


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_weights_are_rounded_once_to_bfloat16_and_the_rest_is_as_it_was(family, rotated):
    packed = rotated(family)
    wide, _ = tensors_of(packed.folder.parent / "float32")
    narrow, _ = tensors_of(packed.folder.parent / "bfloat16")
    source, _ = tensors_of(packed.original)
    decoded = {name for name in wide if narrow[name].dtype == torch.bfloat16}
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in decoded)
    assert all(torch.equal(narrow[name], source[name]) for name in wide.keys() - decoded)
    assert {n for n in decoded if "norm" in n or "bias" in n or "router" in n} == set()
    assert len(decoded) == (12 if family == "gpt_oss" else 38)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, folder + ".logits")
assert not any(name.startswith("mxq") for name in sys.modules)
"""


def test_transformers_without_mxq_loads_plain_models_to_the_same_logits(rotated, tmp_path):
    folders = {f: rotated(f).folder.parent / "float32" for f in WEIGHT_ONLY}
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "ids"), *map(str, folders.values())]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for family, folder in folders.items():
        packed = AutoModelForCausalLM.from_pretrained(rotated(family).folder, dtype=torch.float32)
        found = torch.load(f"{folder}.logits")
        # The rotation is on the input there and in the weight here: rounding of float32.
        assert (found - logits_of(packed, IDS)).abs().max() < 1e-4, family


def test_a_plain_model_that_rounded_inputs_says_so(tmp_path):
    packed = make_packed(tmp_path, "llama", "bytes")
    result = mxq.export(packed.folder, tmp_path / "plain", to="dequantized")
    assert "w8a8_grow_sym also round the inputs; a plain model does not" in result.warnings[0]


# The folder


def test_it_holds_the_tokenizer_a_card_and_a_record_and_loads_without_mxq(uniform, tmp_path):
    mxq.export(uniform.folder, tmp_path / "out", to="dequantized")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json", "mxq_export.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((uniform.original / "config.json").read_text())


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "dequantized"])
def test_the_size_checked_before_is_the_size_written(to, uniform, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(mxq.exporting, "check_disk", lambda _, size: checked.append(size))
    result = mxq.export(uniform.folder, tmp_path / "out", to=to)
    tensors, _ = tensors_of(tmp_path / "out")
    assert checked == [result.tensor_bytes] == [sum(t.nbytes for t in tensors.values())]


def test_a_disk_that_is_too_small_is_refused(uniform, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export_folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes and 1,000 are free"):
        mxq.export(uniform.folder, tmp_path / "out", to="dequantized")
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_of_the_checkpoint_is_refused(uniform, tmp_path):
    copied = shutil.copytree(uniform.folder, tmp_path / "packed")
    shard = min(copied.glob("model-layer*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or was edited"):
        mxq.export(copied, tmp_path / "out", to="dequantized")
    assert not (tmp_path / "out").exists()


def test_an_edited_plan_is_refused(uniform, tmp_path):
    copied = shutil.copytree(uniform.folder, tmp_path / "packed")
    edit_config(copied, lambda c: c["quantization_config"].update(schemes=["w8a16_g32_sym"]))
    with pytest.raises(ValueError, match=r"its scheme needs .* the plan in config.json was edited"):
        mxq.export(copied, tmp_path / "out", to="gptq")


def test_an_export_that_fails_half_way_leaves_the_old_one(uniform, tmp_path, monkeypatch):
    out = tmp_path / "out"
    mxq.export(uniform.folder, out, to="gptq")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    added = []

    def fail_later(self, number, tensors):
        added.append(number)
        if number == 1:
            raise OSError("no space left")

    monkeypatch.setattr(export_folder.FolderWriter, "add", fail_later)
    with pytest.raises(OSError, match="no space"):
        mxq.export(uniform.folder, out, to="dequantized", overwrite=True)
    assert added == [0, 1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_checkpoint_and_leaves_other_files(uniform, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stale = {"old.safetensors", "mxq_plan.json", "adapter_config.json", "tokenizer.model"}
    for name in (*stale, "notes.md"):
        (out / name).write_text("{}")
    (out / "README.md").write_text("Quantized with mxq: another checkpoint")
    (out / "report.html").write_text("a page of the user's own")
    with pytest.raises(ValueError, match=r"is not empty .* allow --overwrite"):
        mxq.export(uniform.folder, out, to="dequantized")
    mxq.export(uniform.folder, out, to="dequantized", overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert {"notes.md", "report.html"} <= names
    assert names.isdisjoint(stale)
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    AutoModelForCausalLM.from_pretrained(out)


def test_config_json_is_moved_last(uniform, tmp_path, monkeypatch):
    moved, move = [], export_folder.move_whole
    monkeypatch.setattr(
        export_folder, "move_whole", lambda a, b: (moved.append(b.name), move(a, b))[1]
    )
    mxq.export(uniform.folder, tmp_path / "out", to="gptq")
    assert moved[-1] == "config.json"
    assert len(moved) == 10


def test_places_that_would_spoil_the_checkpoint_are_refused(uniform, tmp_path):
    copied = shutil.copytree(uniform.folder, tmp_path / "a" / "packed")
    (tmp_path / "file").write_text("")
    for place, words in {
        copied: "checkpoint's own folder or inside of it",
        copied / "ct": "checkpoint's own folder or inside of it",
        tmp_path / "a": "holds the checkpoint",
        tmp_path / "file": "is a file",
    }.items():
        with pytest.raises(ValueError, match=words):
            mxq.export(copied, place, to="dequantized", overwrite=True)
    assert {p.name for p in copied.iterdir()} == {p.name for p in uniform.folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "awq"}, "--to is 'awq'; choose one of compressed-tensors, gptq, dequantized"),
        ({"to": "gptq", "dtype": "float32"}, "--dtype is a choice of --to dequantized"),
        ({"to": "compressed-tensors", "dtype": "float32"}, "takes no --dtype"),
        ({"to": "dequantized", "dtype": "int8"}, "--dtype is 'int8'; choose one of bfloat16"),
        ({"to": "dequantized", "checkpoint_format": "gptq"}, "a choice of --to gptq"),
        ({"to": "gptq", "checkpoint_format": "v3"}, "--checkpoint-format is 'v3'; choose one of"),
    ],
)
def test_a_wrong_option_is_refused(options, words, uniform, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        mxq.export(uniform.folder, tmp_path / "out", **options)


def test_other_folders_are_refused(uniform, tmp_path):
    with pytest.raises(ValueError, match="original is not a checkpoint of mxq"):
        mxq.export(uniform.original, tmp_path / "out", to="gptq")
    with pytest.raises(ValueError, match="is not a folder; give what mxq quantize wrote"):
        mxq.export(tmp_path / "nothing", tmp_path / "out", to="gptq")


def test_the_command_shows_what_was_written_and_the_warnings(tmp_path):
    packed = make_packed(tmp_path, "qwen2_moe", "four and eight")
    out = tmp_path / "ct"
    command = ["export", str(packed.folder), str(out), "--to", "compressed-tensors"]
    shown = CliRunner().invoke(app, command)
    text = " ".join(shown.output.split())
    assert shown.exit_code == 0
    assert "w4a16_g32_sym" in text
    assert "w8a16_grow_sym" in text
    assert "pack-quantized" in text
    row = text.partition("transformers (without mxq)")[2].partition("TensorRT-LLM")[0]
    assert "experts-alike-in-the-model" in row
    assert "Nothing was run in an engine." in text
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "is not empty" in again.output
    assert "Traceback" not in again.output

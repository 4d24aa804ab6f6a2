"""What mxq never does with a folder from someone else: see docs/security.md."""

import ast
import hashlib
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mxq.checkpoint.load import MxqConfig
from mxq.cli import app
from mxq.evaluation import load_model
from mxq.models.source import open_source

PACKAGE = Path(__file__).parents[2] / "mxq"
TREES = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def calls():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", ast.unparse(node.func), node


def test_nothing_is_unpickled_or_evaluated():
    forbidden = ("pickle", "marshal", "shelve", "dill", "torch.load", "torch.hub", "joblib")
    found = [f"{at} {name}" for at, name, _ in calls() if name.startswith(forbidden)]
    found += [f"{at} {name}" for at, name, _ in calls() if name in ("eval", "exec", "compile")]
    imported = {
        name.name.split(".")[0]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }
    assert found == []
    assert imported.isdisjoint({"pickle", "marshal", "shelve", "dill", "joblib"})


def test_every_call_of_from_pretrained_refuses_code_of_the_folder():
    loading = (".from_pretrained", ".from_config")
    loads = [(at, node) for at, name, node in calls() if name.endswith(loading)]
    partials = [
        (at, node)
        for at, name, node in calls()
        if name == "partial" and ast.unparse(node.args[0]).endswith(loading)
    ]
    assert len(loads) + len(partials) >= 5
    for at, node in loads + partials:
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert given.get("trust_remote_code") == "False", at


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", "llama")


def test_a_run_on_a_folder_opens_no_connection(source, tmp_path, monkeypatch):
    asked = []

    def refuse(*address, **options):
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    words = (
        "--bits 5 --calibration demo --samples 4 --seqlen 16 --quantizer rtn --rotation off "
        "--sensitivity output_mse --schemes w4a16_g32_asym,w8a16_g32_asym"
    )
    command = ["quantize", str(source), "--output", str(tmp_path / "out"), *words.split()]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    load_model(str(tmp_path / "out"), device="cpu")
    assert asked == []


def test_names_of_code_are_not_passed_on(source, tmp_path):
    names = {
        "auto_map": {"AutoModelForCausalLM": "own.Model"},
        "attn_implementation": "some/kernel",
        "_attn_implementation": "some/kernel",
        "experts_implementation": "some/kernel",
    }
    edit_config(source, lambda config: config.update(names))
    written = json.loads((write_checkpoint(source, tmp_path / "out") / "config.json").read_text())
    assert written.keys().isdisjoint(names)
    assert written["num_hidden_layers"] == 2


def test_the_choice_of_kernels_of_a_folder_is_not_followed(source):
    edit_config(source, lambda config: config.update(_attn_implementation="some/kernel"))
    assert open_source(source).model.config._attn_implementation == "sdpa"


@pytest.fixture
def packed(source, tmp_path):
    return write_checkpoint(source, tmp_path / "packed")


def refuses(folder, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("others", [True, False], ids=["all shards", "one shard"])
def test_a_checkpoint_whose_index_leaves_the_folder_is_refused(packed, tmp_path, others):
    index = packed / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    names = sorted(set(fields["weight_map"].values()))
    moved = names if others else names[:1]
    for name in moved:
        # The same bytes, so that every digest is right.
        shutil.copy(packed / name, tmp_path / name)
    fields["weight_map"] = {
        key: f"../{name}" if name in moved else name for key, name in fields["weight_map"].items()
    }
    index.write_text(json.dumps(fields))
    refuses(packed, r"is outside of the checkpoint's folder; its index was edited")


def test_a_checkpoint_with_a_link_to_outside_is_refused(packed, tmp_path):
    shard = next(iter(sorted(packed.glob("model-layer-*.safetensors"))))
    shutil.move(shard, tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    refuses(packed, r"is outside of the checkpoint's folder")


@pytest.mark.parametrize("name", ["plan", "to_dict", "self", "__class__", "__dict__"])
def test_a_field_of_a_checkpoint_does_not_stand_in_for_a_method(name):
    config = MxqConfig.from_dict({"quant_method": "mxq", "format_version": 1, name: 3})
    with pytest.raises(ValueError, match=f"edited or damaged: it has an unknown field '{name}'"):
        config.plan()


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a.bin", ".."])
def test_a_plan_names_only_safetensors_of_its_folder(packed, name):
    edit_config(packed, lambda config: config["quantization_config"]["files"].update({name: "1f"}))
    refuses(packed, "is no name of a safetensors file in the folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["linears"].update(dict.fromkeys(plan["linears"], -1)), "-1 is no place"),
        (lambda plan: plan["linears"].update(dict.fromkeys(plan["linears"], True)), "True is no"),
        (lambda plan: plan.update(schemes="w4a16_g32_asym"), "'schemes' is .* not a list"),
        (lambda plan: plan.update(rotated=["model.norm"]), "'rotated' names a module that has no"),
        (lambda plan: plan.update(experts=[]), r"'experts' is \[\], not an object"),
    ],
)
def test_a_plan_with_a_wrong_field_is_refused(packed, change, message):
    edit_config(packed, lambda config: change(config["quantization_config"]))
    refuses(packed, f"quantization_config of this checkpoint was edited or damaged: {message}")


def test_codes_of_another_type_are_refused_even_if_the_digest_is_right(packed):
    shard = packed / "model-layer-00000.safetensors"
    tensors = load_file(shard)
    key = next(key for key in sorted(tensors) if key.endswith("weight_packed"))
    save_file({**tensors, key: tensors[key].to(torch.float32)}, shard, {"format": "pt"})
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    files = {shard.name: digest}
    edit_config(packed, lambda config: config["quantization_config"]["files"].update(files))
    refuses(packed, f"{key} is stored as F32, its scheme needs I32: the file was edited")


def test_groups_that_do_not_divide_an_input_are_refused(packed):
    def widen(config):
        plan = config["quantization_config"]
        plan["schemes"] = [text.replace("g32", "g128") for text in plan["schemes"]]

    edit_config(packed, widen)
    refuses(packed, r"the scheme \w+_g128_\w+, whose groups do not divide its 64 inputs")


@pytest.mark.parametrize("change", [lambda row: row[:-1], lambda row: [*row, 0]])
def test_a_plan_of_another_number_of_experts_is_refused(tmp_path, change):
    folder = write_checkpoint(save_tiny(tmp_path / "moe"), tmp_path / "packed")

    def edit(config):
        (table, *_) = config["quantization_config"]["experts"].values()
        table["up_proj"] = change(table["up_proj"])

    edit_config(folder, edit)
    refuses(folder, r"has schemes for .*'up_proj': [35].*, but the model has .*'up_proj': 4")

"""What an exported folder says of itself, what engines make of it, and who may write to it."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from exports import make_packed
from tiny import save_tiny
from typer.testing import CliRunner

import mxq
from mxq.checkpoint.export.folder import whole_folder
from mxq.cli import app
from mxq.engines import ENGINES
from mxq.locks import LOCK, hold


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A whole run of unrotated 4 and 8 bits, of which 4 are in groups."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny(folder / "model")
    mxq.quantize(
        model,
        output=folder / "out",
        bits=6,
        schemes="w4a16_g32_sym,w8a16_grow_sym",
        calibration="demo",
        samples=6,
        seqlen=16,
        quantizer="rtn",
        sensitivity="output_mse",
        rotation="off",
        guard=False,
    )
    return folder / "out"


@pytest.fixture(scope="module")
def exports(out):
    """The run in each format."""
    formats = ("compressed-tensors", "gptq", "dequantized")
    return {to: mxq.export(out, out.parent / to, to=to) for to in formats}


def card_of(result):
    return (result.folder / "README.md").read_text()


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "dequantized"])
def test_the_card_is_about_the_export_and_its_commands_make_it_again(to, exports, out, tmp_path):
    card = card_of(exports[to])
    assert card != (out / "README.md").read_text()
    assert "import mxq  #" not in card
    assert "before the export" in card
    assert "nothing was measured on this folder" in card
    made, exported = re.search(r"```bash\n(mxq quantize .*)\n(mxq export .*)\n```", card).groups()
    report = json.loads((out / "mxq_report.json").read_text())
    assert f"{report['plan']['kl']:.5f}" in card
    assert made.endswith("--rotation off --calibration demo --samples 6 --seqlen 16 --no-guard "
                         "--output OUT")  # fmt: skip
    words = exported.replace("OUT", str(out)).replace("DEST", str(tmp_path / "again")).split()
    assert run(*words[1:]).exit_code == 0
    for path in exports[to].folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_options_of_an_export_are_in_its_command(out, tmp_path):
    mxq.export(out, tmp_path / "v2", to="gptq", checkpoint_format="gptq_v2")
    mxq.export(out, tmp_path / "wide", to="dequantized", dtype="float32")
    told = "mxq export OUT DEST --to gptq --checkpoint-format gptq_v2\n"
    assert told in (tmp_path / "v2" / "README.md").read_text()
    told = "mxq export OUT DEST --to dequantized --dtype float32\n"
    assert told in (tmp_path / "wide" / "README.md").read_text()


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("engine", ENGINES)
def test_export_and_check_find_the_same_and_the_card_says_it(to, engine, exports):
    (verdict,) = (v for v in exports[to].verdicts if v.rules.engine == engine)
    done = run("check", exports[to].folder, "--engine", engine, "--json")
    checked = json.loads(done.stdout)["findings"]
    found = [(f.rule.id, f.rule.severity, f.detail, len(f.names)) for f in verdict.findings]
    assert found == [(f["rule"], f["severity"], f["detail"], f["count"]) for f in checked]
    card = " ".join(card_of(exports[to]).replace("\\", "").split())
    start = f"- {verdict.rules.title} {verdict.rules.version}, "
    assert card.count(start) == len(found)
    for finding in verdict.findings:
        rule = finding.rule
        assert f"{start}{rule.severity} {rule.id}: {rule.says} Found: {finding.detail}." in card


def test_the_card_shows_how_to_load_only_where_no_rule_is_broken(exports):
    card, errors = {}, {}
    for to, result in exports.items():
        card[to] = card_of(result)
        errors[to] = {v.rules.engine for v in result.verdicts if v.errors}
    assert "transformers" in errors["gptq"]
    assert "from transformers import" not in card["gptq"]
    assert "Not with " in card["gptq"]
    assert errors["compressed-tensors"] == set(ENGINES)  # experts of two schemes
    assert "None of the engines below takes it." in card["compressed-tensors"]
    assert "```python\nfrom transformers import AutoModelForCausalLM" in card["dequantized"]


def test_an_export_that_engines_take_shows_their_commands(tmp_path):
    packed = make_packed(tmp_path, "qwen2_moe", "uniform")
    result = mxq.export(packed.folder, tmp_path / "ct", to="compressed-tensors")
    card = card_of(result)
    assert "vLLM 0.33.0, mind the warnings:\n\n```bash\nvllm serve .\n```" in card
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in card
    assert "trtllm-serve" not in card
    # Packed without a run: nothing was recorded, so nothing is said to have been measured.
    assert "What was measured" not in card
    assert "Of the checkpoint OUT: No command makes it again" in card


def test_numbers_that_include_rounded_inputs_are_said_not_to_be_the_exports(tmp_path):
    model = save_tiny(tmp_path / "model")
    few = {"calibration": "demo", "samples": 6, "seqlen": 16, "quantizer": "rtn", "guard": False}
    forced = {"plan": "uniform:w8a8_grow_sym", "rotation": "off", "sensitivity": "output_mse"}
    mxq.quantize(model, output=tmp_path / "out", **few, **forced)
    result = mxq.export(tmp_path / "out", tmp_path / "ct", to="compressed-tensors")
    assert "so they are not those of this folder" in card_of(result)
    assert result.record.notes == (
        "inputs are rounded by the engine in its own way, which is not quite that of mxq",
    )
    assert f"- {result.record.notes[0]}" in card_of(result)


def test_weight_only_numbers_are_not_said_to_include_rounded_inputs(exports):
    assert "not those of this folder" not in card_of(exports["compressed-tensors"])


def test_inspect_and_check_say_where_a_folder_is_from(exports, out):
    for to, result in exports.items():
        shown = run("inspect", result.folder)
        text = " ".join(shown.stdout.split())
        assert shown.exit_code == 0, shown.output
        assert text.startswith("model ")
        assert f"mxq export OUT DEST --to {to}" in text
        assert "mxq quantize" in text
    shown = run("check", exports["gptq"].folder, "--engine", "vllm", "--json")
    assert json.loads(shown.stdout)["what"].startswith("gptq checkpoint that mxq export ")
    assert json.loads(shown.stdout)["what"].endswith(" wrote of model")
    plain = run("check", exports["dequantized"].folder, "--engine", "vllm")
    assert plain.exit_code == 1
    assert "a plain model that mxq export wrote of model; nothing of it is quan" in " ".join(
        plain.stderr.split()
    )


def test_an_edited_record_is_refused(exports, tmp_path):
    copied = shutil.copytree(exports["gptq"].folder, tmp_path / "gptq")
    record = copied / "mxq_export.json"
    record.write_text(record.read_text().replace('"model"', '"other"'))
    for command in (("inspect", copied), ("check", copied, "--engine", "vllm")):
        done = run(*command)
        assert done.exit_code == 1
        assert "mxq_export.json was edited or damaged" in " ".join(done.stderr.split())


# Who may write


def test_a_second_export_to_a_folder_is_refused_while_the_first_is_at_work(out, tmp_path):
    target = tmp_path / "ct"
    with whole_folder(target) as part:
        (part / "half").write_text("")
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* an export to .*ct; "):
            mxq.export(out, target, to="gptq")
        mxq.export(out, tmp_path / "other", to="gptq")
        assert sorted(p.name for p in part.iterdir()) == [LOCK, "half"]
    assert [p.name for p in target.iterdir()] == ["half"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct", "other"]


def test_what_another_export_finished_meanwhile_is_not_replaced(out, tmp_path, monkeypatch):
    target = tmp_path / "ct"

    def finish_another(*_):
        target.mkdir()
        (target / "config.json").write_text("another")

    monkeypatch.setattr(mxq.exporting, "check_disk", finish_another)
    with pytest.raises(ValueError, match=r"is not empty \(it holds config.json\)"):
        mxq.export(out, target, to="gptq")
    assert (target / "config.json").read_text() == "another"
    assert [p.name for p in tmp_path.iterdir()] == ["ct"]


FILL = """
import sys, time
from pathlib import Path
from mxq.checkpoint.export.folder import whole_folder
with whole_folder(Path(sys.argv[1])) as part:
    (part / "model.safetensors").write_text("half")
    print("started", flush=True)
    time.sleep(60)
"""


def test_the_next_export_beside_it_removes_what_a_killed_one_left(out, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", FILL, str(tmp_path / "killed")], stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"started\n"
    held = tmp_path / ".killed.mxq-part"
    mxq.export(out, tmp_path / "first", to="gptq")
    assert (held / "model.safetensors").is_file()
    child.kill()
    child.wait()
    child.stdout.close()
    mine = tmp_path / ".mine.mxq-part"  # of the user: no lock of mxq is in it
    mine.mkdir()
    mxq.export(out, tmp_path / "second", to="gptq")
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "first", "second"]


def test_a_lock_whose_folder_goes_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    folder, open_file, opened = tmp_path / "part", os.open, []

    def open_late(path, *options):
        opened.append(path)
        if len(opened) == 1:
            folder.rmdir()  # the other export ends between the folder and its lock
        descriptor = open_file(path, *options)
        if len(opened) == 2:
            path.unlink()  # another one between the lock and its locking
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with hold(folder, at="here", instead="another"):
        assert (folder / LOCK).is_file()
    assert len(opened) == 3
    assert list(folder.iterdir()) == []

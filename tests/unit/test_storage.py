"""Artifacts on disk: they come back equal, and a file that is not whole is refused in words."""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mxq.artifacts import Allocation, BlockInfo, Provenance, SensitivityTable
from mxq.scheme import Scheme
from mxq.storage import load_artifact, save_artifact, write_atomically

W2, W4 = Scheme.parse("w2a16_g64_asym"), Scheme.parse("w4a8_grow_sym")

PROVENANCE = Provenance(
    model_digest="1f",
    calibration_digest="2e",
    settings={"quantizer": "gptq", "samples": 128, "keep": ["gate"], "revision": None},
    versions={"torch": "2.13"},
)

TABLE = SensitivityTable(
    blocks=(
        BlockInfo("layers.0.experts.1.gate", 0, 1, "gate", 48, 32, 17, "layers.0.experts"),
        BlockInfo("layers.0.q_proj", 0, None, "q_proj", 32, 64, 90, "layers.0.q_proj"),
    ),
    schemes=(W2, W4),
    # 0.1 and 1e-300 have no short binary form: they come back exactly or not at all.
    loss=((math.inf, 0.1), (1e-300, 0.0)),
    quantizer=(("", "rtn"), ("gptq", "gptq")),
    metric="fisher",
    unit="nats per token",
    calibration_tokens=90,
    rotated_layers=(0,),
    provenance=PROVENANCE,
)

ALLOCATION = Allocation(
    schemes={"layers.0.experts.1.gate": W2, "layers.0.q_proj": W4},
    predicted_loss=0.25,
    bound=-math.inf,
    proven=False,
    storage_bits=4000,
    weights=1000,
    asked_bits=4.5,
    unit="nats per token",
    description="by hand",
    rotated_layers=(3, 5),
    predicted_latency_us=12.5,
    latency_source="h200.json",
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "table.json"
    save_artifact(path, TABLE)
    return path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(path, kind, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"{path} {message}")):
        load_artifact(path, kind)


@pytest.mark.parametrize(
    "artifact",
    [
        TABLE,
        ALLOCATION,
        replace(ALLOCATION, predicted_latency_us=None, latency_source=None, rotated_layers=()),
        PROVENANCE,
        Provenance("a", "b"),
    ],
    ids=["table", "allocation", "allocation without latency", "provenance", "bare provenance"],
)
def test_an_artifact_comes_back_equal(tmp_path, artifact):
    save_artifact(tmp_path / "x.json", artifact)
    assert load_artifact(tmp_path / "x.json", type(artifact)) == artifact


def test_types_come_back_too(file):
    found = load_artifact(file, TABLE.__class__)
    assert isinstance(found.loss[1], tuple)
    assert isinstance(found.loss[1][1], float)  # 0.0, which JSON may well call 0
    assert isinstance(found.blocks[0], BlockInfo)
    assert isinstance(found.schemes[0], Scheme)


def test_the_same_artifact_gives_the_same_bytes(file, tmp_path):
    save_artifact(tmp_path / "again.json", load_artifact(file, SensitivityTable))
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_the_file_is_json_that_every_parser_reads(file):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads(file.read_text(), parse_constant=refuse)


def test_bits_per_weight_by_hand():
    assert ALLOCATION.bits_per_weight == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": ((0.1, 0.2),)}, "loss is not 2 blocks x 2 schemes"),
        ({"quantizer": (("", "rtn"), ("gptq",))}, "quantizer is not 2 blocks x 2 schemes"),
    ],
)
def test_a_table_that_is_not_rectangular_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TABLE, **change)


def test_an_absent_file_says_to_run_the_stage(tmp_path):
    path = tmp_path / "absent.json"
    refused(path, Provenance, "does not exist; run the stage that makes it first")


def test_an_edited_file_is_refused(file):
    content = json.loads(file.read_text())["content"]
    content["loss"][0][1] = 0.2
    edit(file, content=content)
    refused(file, SensitivityTable, "was edited or damaged: its checksum differs; run its stage")


@pytest.mark.parametrize("text", ["", "{", '{"content": {}}', "[1]", "3", "null"])
def test_a_foreign_file_is_refused(file, text):
    file.write_text(text)
    refused(file, SensitivityTable, "is not an mxq artifact: ")


def test_a_file_cut_anywhere_is_refused(file):
    whole = file.read_text().rstrip()
    for length in range(0, len(whole), 50):
        file.write_text(whole[:length])
        refused(file, SensitivityTable, "is not an mxq artifact: ")


def test_a_binary_file_is_refused(file):
    file.write_bytes(b"\xff\xfe\x00")
    refused(file, SensitivityTable, "is not an mxq artifact: UnicodeDecodeError")


def test_another_kind_is_refused_by_name(file):
    refused(file, Allocation, "is SensitivityTable version 1, expected Allocation version 1; run")


def test_a_newer_version_is_refused_by_number(file):
    edit(file, version=2)
    refused(file, SensitivityTable, "is SensitivityTable version 2, expected SensitivityTable ver")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage_bits": 3.7}, "storage_bits is 3.7, expected an integer"),
        ({"weights": True}, "weights is True, expected an integer"),
        ({"weights": "1000"}, "weights is '1000', expected an integer"),
        ({"proven": 1}, "proven is 1, expected true or false"),
        ({"predicted_loss": "0.25"}, "predicted_loss is '0.25', expected a number"),
        ({"predicted_loss": {"float": "many"}}, "predicted_loss is {'float': 'many'}, expected a"),
        ({"predicted_loss": 10**400}, "expected a number"),
        ({"unit": None}, "unit is None, expected a text"),
        ({"schemes": ["w4a16_grow_sym"]}, "schemes is ['w4a16_grow_sym'], expected an object"),
        ({"schemes": {"a": "w9"}}, "scheme 'w9' is not of the form"),
        ({"rotated_layers": "35"}, "rotated_layers is '35', expected a list"),
    ],
)
def test_a_value_of_another_type_is_refused_and_not_converted(tmp_path, change, message):
    path = tmp_path / "plan.json"
    save_artifact(path, ALLOCATION)
    content = {**json.loads(path.read_text())["content"], **change}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    edit(path, content=content, sha256=hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_artifact(path, Allocation)
    assert str(caught.value).startswith(f"{path} lacks what this mxq needs (")


def test_a_plan_that_is_older_than_its_engine_is_read(tmp_path):
    path = tmp_path / "plan.json"
    save_artifact(path, ALLOCATION)
    content = json.loads(path.read_text())["content"]
    for name in ("engine", "tensor_parallel", "unrestricted_loss"):
        del content[name]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    edit(path, content=content, sha256=checksum)
    assert load_artifact(path, Allocation) == replace(ALLOCATION, engine=None, tensor_parallel=1)
    del content["storage_bits"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    edit(path, content=content, sha256=hashlib.sha256(text.encode()).hexdigest())
    refused(path, Allocation, "lacks what this mxq needs (Allocation has no storage_bits)")


def test_a_document_nested_too_deep_is_refused(file):
    file.write_text("[" * 100_000)
    refused(file, SensitivityTable, "is not an mxq artifact: RecursionError")


def test_what_json_cannot_hold_leaves_the_old_file(file):
    old = file.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_artifact(file, replace(PROVENANCE, settings={"x": object()}))
    assert file.read_bytes() == old


def test_a_write_that_fails_half_way_leaves_the_old_file(file):
    old = file.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "half of it \ud800")  # a lone surrogate has no encoding
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_a_replacement_that_fails_leaves_the_old_file_and_no_other(file, monkeypatch):
    old = file.read_bytes()

    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(file, "new")
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_the_folder_is_made(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "x.txt", "text")
    assert (tmp_path / "a" / "b" / "x.txt").read_text() == "text"

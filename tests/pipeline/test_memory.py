"""Larger than memory: limits change no byte; what was written is measured layer by layer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import save_tiny, token_ids

import mxq
from mxq import pipeline, workspace
from mxq.heldout import measure_loss
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.skeleton import EXPERTS_FUNCTION, load_whole
from mxq.models.source import open_source
from mxq.scoring import compare_logits

HELDOUT = (token_ids(2, 16, seed=7), token_ids(1, 9, seed=8))


@pytest.fixture(scope="module", params=["qwen2_moe", "gpt_oss", "deepseek_v3", "qwen3"])
def packed(request, tmp_path_factory):
    """A family's model and two checkpoints of it in different formats."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny(folder / "source", request.param, dtype=torch.bfloat16)
    mixed = write_checkpoint(source, folder / "mixed")
    coarse = write_checkpoint(source, folder / "coarse", menu="w2a16_g32_asym")
    return source, {"mixed": mixed, "coarse": coarse}


def loss_of_whole_models(source, folder):
    """The same sums by ``from_pretrained`` of both models, batch by batch."""
    original = load_whole(source, dtype=torch.float32).eval()
    if original._can_set_experts_implementation():
        original.set_experts_implementation(EXPERTS_FUNCTION)  # the same order of sums
    model = load_whole(folder, dtype=torch.float32).eval()
    total = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for ids in HELDOUT:
            logits = [m(input_ids=ids, use_cache=False).logits[:, :-1] for m in (model, original)]
            total += compare_logits(*logits, ids)
    return (total / sum(ids[:, 1:].numel() for ids in HELDOUT)).tolist()


def test_streamed_losses_are_exactly_those_of_whole_models(packed):
    source, folders = packed
    losses = measure_loss(ModelAdapter(open_source(source)), HELDOUT, folders)
    assert losses["mixed"].kl != losses["coarse"].kl
    for name, folder in folders.items():
        loss = losses[name]
        found = [loss.nll, loss.original_nll, loss.kl, loss.top1_agreement]
        assert found == loss_of_whole_models(source, folder)


def test_losses_do_not_depend_on_where_activations_are_kept(packed, tmp_path):
    source, folders = packed
    adapter, store = ModelAdapter(open_source(source)), ActivationStore(0, tmp_path)
    spilled = measure_loss(adapter, HELDOUT, folders, store=store)
    assert spilled == measure_loss(adapter, HELDOUT, folders)
    assert store.peak_disk_bytes > 0


def test_what_is_measured_is_read_from_the_files_that_were_written(packed, tmp_path):
    source, folders = packed
    file = next(folders["coarse"].glob("model-layer-00001.safetensors"))
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("weight_scale"))
    kept = file.read_bytes()
    try:
        save_file({**tensors, name: tensors[name] * 2}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="is damaged or was edited: its SHA-256 is"):
            measure_loss(ModelAdapter(open_source(source)), HELDOUT, folders)
    finally:
        file.write_bytes(kept)


# Limits


def bytes_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


RUN = {
    "calibration": token_ids(18, 16, seed=7),
    "schemes": "w2a16_g32_asym,w4a16_g32_asym",
    "bits": 3.6,
    "guard": False,
}


@pytest.mark.parametrize(
    ("family", "sensitivity"),
    [("qwen2_moe", "fisher"), ("qwen3", "fisher"), ("qwen2_moe", "output_mse")],
)
def test_a_run_without_memory_for_activations_writes_the_same_bytes(
    tmp_path, monkeypatch, family, sensitivity
):
    stores = []

    def watched(limit, folder):
        stores.append(ActivationStore(limit, folder))
        return stores[-1]

    monkeypatch.setattr(workspace, "ActivationStore", watched)
    left, solve = [], pipeline.run_allocate
    monkeypatch.setattr(
        pipeline, "run_allocate", lambda *a: left.append(stores[-1].disk_bytes) or solve(*a)
    )
    # Several batches of a few tokens, as a long calibration set has.
    make = workspace.make_batches
    monkeypatch.setattr(
        workspace, "make_batches", lambda *ids, **kw: make(*ids, batch_tokens=48, **kw)
    )
    source = save_tiny(tmp_path / "source", family)
    for memory in ("8GiB", 0, 40_000):
        out = tmp_path / str(memory)
        mxq.quantize(source, output=out, memory=memory, sensitivity=sensitivity, **RUN)
    full, none, some = stores
    assert left == [0, 0, 0]  # what is stated of disk is of measuring or of packing, not of both
    assert (full.peak_disk_bytes, none.peak_memory_bytes) == (0, 0)
    assert none.peak_disk_bytes > some.peak_disk_bytes > 0
    assert 0 < some.peak_memory_bytes <= 40_000
    expected = bytes_of(tmp_path / "8GiB")
    assert {"config.json", "work/sensitivity.json"} <= set(expected)
    assert bytes_of(tmp_path / "0") == expected
    assert bytes_of(tmp_path / "40000") == expected


KILLED = """
import os, sys, torch
from pathlib import Path
from mxq.models.activations import ActivationStore
store = ActivationStore(0, Path(sys.argv[1]))
kept = [store.keep(torch.ones(10_000)) for _ in range(5)]
print(store.disk_bytes, flush=True)
sys.stdin.read()
"""


def test_a_run_that_is_killed_leaves_no_activations_on_disk(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "work")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "200000\n"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert list((tmp_path / "work").iterdir()) == []


def test_nothing_stays_on_disk_after_an_error(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source")

    def fails(*unused, **ignored):
        raise ValueError("stopped on purpose")

    monkeypatch.setattr("mxq.finish.measure_loss", fails)
    with pytest.raises(ValueError, match="stopped on purpose"):
        mxq.quantize(source, output=tmp_path / "out", memory=0, **RUN)
    maps = Path("/proc/self/maps").read_text()
    assert not [line for line in maps.splitlines() if str(tmp_path) in line]

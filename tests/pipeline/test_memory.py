"""Larger than memory: tiny limits change no byte, and what was written is measured layer by layer."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import MENU, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import save_tiny, token_ids

from mxq.evaluation import compare_logits
from mxq.heldout import measure_loss
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.skeleton import EXPERTS_FUNCTION, load_whole
from mxq.models.source import open_source

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

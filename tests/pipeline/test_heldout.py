"""What is measured on held-out text beside the loss of whole checkpoints."""

import pytest
import torch
from checkpoints import write_checkpoint
from tiny import logits_of, save_tiny, token_ids
from transformers import AutoModelForCausalLM

from mxq.heldout import measure_layers
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source

HELDOUT = (token_ids(2, 12, seed=8), token_ids(1, 12, seed=9))


@pytest.fixture(scope="module", params=["qwen2_moe", "gpt_oss", "llama"])
def folders(request, tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("source"), request.param)
    return source, write_checkpoint(source, tmp_path_factory.mktemp("packed"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def kl_of_layer(source, folder, layer):
    """Of a whole model in which one layer was put in the place of the original's."""
    original, model, packed = load(source), load(source), load(folder)
    model.model.layers[layer] = packed.model.layers[layer]
    total, tokens = 0.0, 0
    for ids in HELDOUT:
        p, q = (logits_of(m, ids)[:, :-1].double().log_softmax(-1) for m in (original, model))
        total += (p.exp() * (p - q)).sum().item()
        tokens += ids[:, 1:].numel()
    return total / tokens


def test_the_loss_of_a_layer_is_that_of_the_model_with_it_alone(folders):
    source, folder = folders
    found = measure_layers(ModelAdapter(open_source(source)), HELDOUT, folder)
    expected = [kl_of_layer(source, folder, layer) for layer in range(len(found))]
    assert len(set(expected)) == len(expected) > 1
    assert found == pytest.approx(expected, rel=1e-3)


def test_activations_in_files_change_no_loss_of_a_layer(folders, tmp_path):
    source, folder = folders
    adapter = ModelAdapter(open_source(source))
    store = ActivationStore(1000, tmp_path)
    spilled = measure_layers(adapter, HELDOUT, folder, store=store)
    assert store.peak_disk_bytes > 10_000
    assert spilled == measure_layers(adapter, HELDOUT, folder)

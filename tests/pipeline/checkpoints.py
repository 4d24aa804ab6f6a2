"""Packing a model with a drawn plan, and reading or editing what was written."""

import json

import torch
from safetensors.torch import load_file
from tiny import token_ids

from mxq.artifacts import Allocation
from mxq.checkpoint.pack import pack
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import Method, quantize_rtn
from mxq.scheme import parse_schemes

MENU = parse_schemes("w2a16_g32_asym,w3a16_g32_sym,w4a16_grow_asym,w8a8_grow_sym,fp8,bf16")


def write_checkpoint(
    source, folder, *, menu=None, quantizer=quantize_rtn, target="original", **adapter_options
):
    """Pack a folder's model with a mix of schemes; the first layer is rotated for MENU only."""
    adapter = ModelAdapter(open_source(source), **adapter_options)
    drawn = random_schemes(adapter, MENU if menu is None else parse_schemes(menu), seed=4)
    plan = make_allocation(adapter, drawn, rotated_layers=(0,) if menu is None else ())
    batches = make_batches(token_ids(4, 16, seed=2), token_ids(1, 16, seed=3))
    pack(adapter, batches, plan, folder, method=Method("own", quantizer), target=target)
    return folder


def make_allocation(adapter, schemes, *, rotated_layers=()):
    """A plan with those schemes by block name; no solver, so nothing is predicted."""
    blocks = adapter.blocks()
    return Allocation(
        schemes=schemes,
        predicted_loss=0.0,
        bound=0.0,
        proven=False,
        storage_bits=sum(
            schemes[b.name].storage_bits(b.out_features, b.in_features) for b in blocks
        ),
        weights=sum(b.weights for b in blocks),
        asked_bits=16.0,
        unit="none",
        description="drawn",
        rotated_layers=rotated_layers,
    )


def random_schemes(adapter, menu, *, seed):
    """A scheme for each block, each of the menu used as often as the others where it fits."""
    generator = torch.Generator().manual_seed(seed)
    blocks = adapter.blocks()
    order = torch.randperm(len(blocks), generator=generator).tolist()
    menu = [menu[index] for index in torch.randperm(len(menu), generator=generator).tolist()]
    drawn = {}
    for place, index in enumerate(order):
        block = blocks[index]
        fitting = [scheme for scheme in menu if scheme.fits(block.in_features)]
        drawn[block.name] = fitting[place % len(fitting)]
    return drawn


def tensors_of(folder):
    """All tensors of a checkpoint by name, and the file of each."""
    tensors, files = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in tensors, f"{name} is in two files"
            tensors[name], files[name] = tensor, path.name
    return tensors, files


def plan_of(folder):
    """The ``quantization_config`` of a checkpoint."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))

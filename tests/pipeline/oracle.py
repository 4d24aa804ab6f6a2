"""What a checkpoint should mean, computed without mxq's own decoder.

Words are unpacked by compressed-tensors, rotations undone with scipy's Hadamard matrix, and the
weights put into a model of transformers by the layout of its experts, written out here.
"""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from scipy.linalg import hadamard

from mxq.models.adapter import ModelAdapter
from mxq.models.lockstep import run_in_lockstep
from mxq.models.source import open_source

INTERLEAVED = ("gpt_oss",)
"""Families whose experts are stored [in, out], gate and up in turn."""


def unrotated(w_NK):
    """Undo the rotation of a weight's inputs, by the matrix written out."""
    in_features = w_NK.shape[1]
    block = 1
    while block < 128 and in_features % (2 * block) == 0:
        block *= 2
    matrix = torch.from_numpy(hadamard(block)).double() / block**0.5
    columns = [piece @ matrix for piece in w_NK.double().split(block, dim=1)]
    return torch.cat(columns, 1) * torch.tensor([_sign(i) for i in range(in_features)])


def _sign(index):
    """The sign of one input, part of the format: a bit of a multiplicative hash of its number."""
    mixed = (index + 1) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    return -1.0 if (mixed >> 16) % 2 else 1.0


def decode(tensors, path, scheme, *, rotated):
    """The weight [N, K] of a module path that acts on a plain input, float64."""
    if scheme.kind == "bf16":
        return tensors[f"{path}.weight"].double()
    scale_NG = tensors[f"{path}.weight_scale"].double()
    if scheme.kind == "fp8":
        w_NK = tensors[f"{path}.weight_fp8"].double() * scale_NG
    else:
        shape = torch.Size(tensors[f"{path}.weight_shape"].tolist())
        # compressed-tensors gives signed codes, 2**(bits-1) less, for weights and zeros alike.
        codes_NK = unpack_from_int32(tensors[f"{path}.weight_packed"], scheme.w_bits, shape)
        zero_NG = torch.zeros_like(scale_NG)
        if not scheme.symmetric:
            packed = tensors[f"{path}.weight_zero_point"]
            zero_NG = unpack_from_int32(packed, scheme.w_bits, scale_NG.shape, packed_dim=0)
        repeats = shape[1] // scale_NG.shape[1]
        w_NK = codes_NK.double() - zero_NG.double().repeat_interleave(repeats, 1)
        w_NK = w_NK * scale_NG.repeat_interleave(repeats, 1)
    return unrotated(w_NK) if rotated else w_NK


def weight_view(model, family, path):
    """The weight [N, K] of a module path in a model of transformers, by the family's layout."""
    parent, _, projection = path.rpartition(".")
    site, _, expert = parent.rpartition(".")
    if not expert.isdigit() or not site.endswith("experts"):
        return model.get_parameter(f"{path}.weight").detach()
    experts = model.get_submodule(site)
    is_fused = projection != "down_proj" and hasattr(experts, "gate_up_proj")
    fused = getattr(experts, "gate_up_proj" if is_fused else projection).detach()[int(expert)]
    if family in INTERLEAVED:
        fused = fused.T
    if not is_fused:
        return fused
    is_up = projection == "up_proj"
    return fused[is_up::2] if family in INTERLEAVED else fused.chunk(2)[is_up]


def streamed_logits(folder, ids, *, dtype=torch.float32, scope="auto", on_layer=None):
    """Logits of a model whose layers are in memory one at a time.

    ``on_layer(adapter, layer)`` may change the loaded layer.
    """
    adapter = ModelAdapter(open_source(folder, dtype=dtype), scope=scope)
    source, found = adapter.source, {}

    def visit(layer, calls):
        source.load_layer(layer)
        if on_layer is not None:
            on_layer(adapter, layer)
        with torch.no_grad():
            outputs = [call.run() for call in calls]
        adapter.uninstall(layer)
        source.free_layer(layer)
        return outputs

    def keep(batch, result):
        found[batch] = result.logits

    with torch.no_grad():
        run_in_lockstep(source.model, source.layers, list(ids.split(1)), visit, keep)
    assert all(p.is_meta for layer in source.layers for p in layer.parameters())
    return torch.cat([found[batch] for batch in range(len(ids))])

"""One quantized weight <-> the named tensors that stand for it in a file.

Integer weights use the layout of compressed-tensors' ``pack-quantized`` (``weight_packed``,
``weight_scale``, ``weight_zero_point``, ``weight_shape``), so an independent decoder exists.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mxq.numerics import QuantizedWeight
from mxq.packing import pack, packed_words, unpack
from mxq.scheme import Scheme

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def tensor_shapes(scheme: Scheme, out_features: int, in_features: int) -> Shapes:
    """``{suffix: (shape, type)}`` of the tensors that a weight of that shape has in a file."""
    if scheme.kind == "bf16":
        return {"weight": ((out_features, in_features), torch.bfloat16)}
    groups = scheme.groups(in_features)
    scale = ((out_features, groups), torch.float16)
    if scheme.kind == "fp8":
        return {
            "weight_fp8": ((out_features, in_features), torch.float8_e4m3fn),
            "weight_scale": scale,
        }
    words = packed_words(in_features, scheme.w_bits)
    shapes: Shapes = {
        "weight_packed": ((out_features, words), torch.int32),
        "weight_scale": scale,
        "weight_shape": ((2,), torch.int64),
    }
    if not scheme.symmetric:
        zero_words = packed_words(out_features, scheme.w_bits)
        shapes["weight_zero_point"] = ((zero_words, groups), torch.int32)
    return shapes


def to_tensors(q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one weight [N, K], by suffix."""
    if q.scale_NG is None:
        return {"weight": q.codes_NK.contiguous()}
    if q.scheme.kind == "fp8":
        return {"weight_fp8": q.codes_NK.contiguous(), "weight_scale": q.scale_NG.contiguous()}
    tensors = {
        "weight_packed": pack(q.codes_NK, q.scheme.w_bits),
        "weight_scale": q.scale_NG.contiguous(),
        "weight_shape": torch.tensor(q.codes_NK.shape, dtype=torch.int64),
    }
    if q.zero_NG is not None:
        tensors["weight_zero_point"] = pack(
            q.zero_NG.T.contiguous(), q.scheme.w_bits
        ).T.contiguous()
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor], scheme: Scheme, out_features: int, in_features: int
) -> QuantizedWeight:
    """Inverse of ``to_tensors``."""
    if scheme.kind == "bf16":
        return QuantizedWeight(tensors["weight"], None, None, scheme)
    if scheme.kind == "fp8":
        return QuantizedWeight(tensors["weight_fp8"], tensors["weight_scale"], None, scheme)
    zero_NG = None
    if not scheme.symmetric:
        words = tensors["weight_zero_point"].T.contiguous()
        zero_NG = unpack(words, scheme.w_bits, out_features).T
    codes_NK = unpack(tensors["weight_packed"], scheme.w_bits, in_features)
    return QuantizedWeight(codes_NK, tensors["weight_scale"], zero_NG, scheme)

"""Round to nearest, on a grid found by a clip search."""

import torch
from torch import Tensor

from mxq.numerics import (
    QuantizedWeight,
    check_groups,
    quantize_fp8,
    round_to_grid,
    search_grid,
)
from mxq.scheme import Scheme


def quantize_rtn(w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor | None = None) -> QuantizedWeight:
    """Round each weight to the nearest point of its group's grid.

    The clip search weighs errors by the diagonal of ``hessian_KK`` where one is given.

    Raises:
        ValueError: If the group size does not divide K.
    """
    check_groups(w_NK.shape[-1], scheme)
    if scheme.kind == "bf16":
        return QuantizedWeight(w_NK.to(torch.bfloat16), None, None, scheme)
    if scheme.kind == "fp8":
        return quantize_fp8(w_NK, scheme)
    importance = None if hessian_KK is None else hessian_KK.diagonal(dim1=-2, dim2=-1)
    scale_NG, zero_NG = search_grid(w_NK, scheme, importance)
    return on_grid(round_to_grid(w_NK, scale_NG, zero_NG, scheme), scale_NG, zero_NG, scheme)


def on_grid(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Codes with their grid in the types of storage."""
    zero = None if scheme.symmetric else zero_NG.to(torch.uint8)
    return QuantizedWeight(codes_NK, scale_NG.half(), zero, scheme)

"""Round to nearest, on a grid found by a clip search."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Grid:
    """Scale and zero point of each group, float32 [..., N, G]."""

    scale_NG: Tensor
    zero_NG: Tensor


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
    return rtn_on_grid(w_NK, scheme, find_grid(w_NK, scheme, hessian_KK))


def find_grid(w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor | None) -> Grid:
    """The grid of a clip search; errors count as much as their input does in the Hessian."""
    importance = None if hessian_KK is None else hessian_KK.diagonal(dim1=-2, dim2=-1)
    return Grid(*search_grid(w_NK, scheme, importance))


def rtn_on_grid(w_NK: Tensor, scheme: Scheme, grid: Grid) -> QuantizedWeight:
    """Each weight rounded to the nearest point of a grid that is known."""
    return on_grid(round_to_grid(w_NK, grid.scale_NG, grid.zero_NG, scheme), grid, scheme)


def on_grid(codes_NK: Tensor, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """Codes with their grid in the types of storage."""
    zero = None if scheme.symmetric else grid.zero_NG.to(torch.uint8)
    return QuantizedWeight(codes_NK, grid.scale_NG.half(), zero, scheme)

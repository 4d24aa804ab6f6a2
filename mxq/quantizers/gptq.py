"""GPTQ (arXiv 2210.17323): round one input column at a time and let the later ones make up for it.

Differences from the common code: columns go in order of falling second moment while every group
keeps the grid that a clip search found on the original weights (activation order with static
groups, so no index is stored); many experts are done at once as a batch; an input that never
occurred keeps its weights (rounded to nearest) instead of becoming zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mxq.numerics import QuantizedWeight, check_groups
from mxq.quantizers.rtn import Grid, find_grid, on_grid, quantize_rtn
from mxq.scheme import Scheme

DAMPING = 0.01
"""Share of the mean second moment that is added to the diagonal."""

COLUMN_BLOCK = 32
"""Columns whose corrections are kept local before one matrix product spreads them."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What GPTQ needs of the inputs: the order of their columns, and how errors are made up for.

    ``order_BK`` int64; ``factor_BKK`` is the upper Cholesky factor of the inverse Hessian in that
    order. Neither depends on the weights or the scheme.
    """

    order_BK: Tensor
    factor_BKK: Tensor

    def __getitem__(self, places: list[int]) -> "Columns":
        """Those of some of the blocks."""
        return Columns(take(self.order_BK, places), take(self.factor_BKK, places))


def take(batch: Tensor, places: list[int]) -> Tensor:
    """Some members of a batch, in that order."""
    return torch.stack([batch[place] for place in places])


def make_columns(hessian_BKK: Tensor) -> Columns:
    """Order and factor of a batch of Hessians.

    Raises:
        ValueError: If a Hessian is not finite, or not positive definite even damped.
    """
    hessian = hessian_BKK.to(torch.float32)
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moments of the inputs are not finite")
    order_BK = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return Columns(order_BK, _inverse_factor(_permute_both(hessian, order_BK)))


def quantize_gptq(
    w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor | None = None
) -> QuantizedWeight:
    """Codes that keep ``W x`` rather than ``W``, for inputs with second moments ``hessian_KK``.

    Without a Hessian, and for the float formats, this is round to nearest.

    Raises:
        ValueError: If the group size does not divide K, or the Hessian is not finite.
    """
    if hessian_KK is None or scheme.kind != "int":
        return quantize_rtn(w_NK, scheme, hessian_KK)
    check_groups(w_NK.shape[-1], scheme)
    if w_NK.dim() == 2:
        return quantize_gptq(w_NK[None], scheme, hessian_KK[None])[0]
    columns = make_columns(hessian_KK)
    return gptq_on_grid(w_NK, scheme, find_grid(w_NK, scheme, hessian_KK), columns)


def gptq_on_grid(w_BNK: Tensor, scheme: Scheme, grid: Grid, columns: Columns) -> QuantizedWeight:
    """``quantize_gptq`` of a batch, for a grid and columns that are known."""
    k = w_BNK.shape[-1]
    order_BK = columns.order_BK
    codes_BNK = _round_columns(
        _permute_columns(w_BNK.to(torch.float32), order_BK),
        _permute_columns(_per_column(grid.scale_NG, k), order_BK),
        _permute_columns(_per_column(grid.zero_NG, k), order_BK),
        columns.factor_BKK,
        2**scheme.w_bits - 1,
    )
    return on_grid(_permute_columns(codes_BNK, order_BK.argsort(-1)), grid, scheme)


def _round_columns(
    w_BNK: Tensor, scale_BNK: Tensor, zero_BNK: Tensor, factor_BKK: Tensor, top: int
) -> Tensor:
    """The GPTQ recursion on columns already in order. Codes uint8 [B, N, K]."""
    # Columns lead in memory: one step reads and writes whole contiguous columns.
    w_BKN, scale_BKN, zero_BKN = (t.mT.contiguous() for t in (w_BNK, scale_BNK, zero_BNK))
    codes_BKN = torch.empty_like(w_BKN, dtype=torch.uint8)
    columns = w_BKN.shape[1]
    for start in range(0, columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, columns)
        errors_BCN = torch.zeros_like(w_BKN[:, start:stop])
        for column in range(start, stop):
            scale_BN, zero_BN, w_BN = scale_BKN[:, column], zero_BKN[:, column], w_BKN[:, column]
            code_BN = (w_BN / scale_BN).add_(zero_BN).round_().clamp_(0, top)
            codes_BKN[:, column] = code_BN
            row_BC = factor_BKK[:, column, column:stop]
            error_BN = (w_BN - code_BN.sub_(zero_BN).mul_(scale_BN)).div_(row_BC[:, :1])
            errors_BCN[:, column - start] = error_BN
            w_BKN[:, column:stop].sub_(row_BC[:, :, None] * error_BN[:, None, :])
        w_BKN[:, stop:].sub_(factor_BKK[:, start:stop, stop:].mT @ errors_BCN)
    return codes_BKN.mT.contiguous()


def _inverse_factor(hessian_BKK: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of each damped Hessian.

    The damping is raised tenfold for a matrix that is not positive definite, until it is.
    """
    diagonal = hessian_BKK.diagonal(dim1=-2, dim2=-1)
    mean_B = diagonal.mean(-1)
    mean_B = torch.where(mean_B > 0, mean_B, torch.ones_like(mean_B))
    eye = torch.eye(hessian_BKK.shape[-1], device=hessian_BKK.device)
    damping_B = torch.full_like(mean_B, DAMPING)
    for _ in range(6):
        damped = hessian_BKK + (damping_B * mean_B)[:, None, None] * eye
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed.any():
            assert isinstance(upper, Tensor)
            return upper
        damping_B = torch.where(failed > 0, damping_B * 10, damping_B)
    raise ValueError("the second moments of the inputs are not positive definite, even damped")


def _per_column(grid_BNG: Tensor, columns: int) -> Tensor:
    """Grid values repeated for each column of their group, [B, N, K]."""
    return grid_BNG.repeat_interleave(columns // grid_BNG.shape[-1], dim=-1)


def _permute_columns(w_BNK: Tensor, order_BK: Tensor) -> Tensor:
    return w_BNK.gather(-1, order_BK[:, None, :].expand_as(w_BNK))


def _permute_both(hessian_BKK: Tensor, order_BK: Tensor) -> Tensor:
    rows = hessian_BKK.gather(-2, order_BK[:, :, None].expand_as(hessian_BKK))
    return rows.gather(-1, order_BK[:, None, :].expand_as(hessian_BKK))

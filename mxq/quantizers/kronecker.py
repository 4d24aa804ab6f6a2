"""Codes and scales refined for the whole model's loss, under two matrices of second moments.

GPTQ and its refinement count an error the same in every output. To the model outputs are not the
same: to second order the loss of a weight is ``sum_t (g_t' (Q - W) x_t)^2``, with the gradient g of
the loss at the block's output. In its Kronecker approximation ``sum((Q - W) H * G (Q - W))`` H are
the second moments of x and G those of g (K-FAC, arXiv 1503.05671; for quantization YAQA, arXiv
2505.22988), and an error in one output can be made up for by another one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mxq.blocks import row_pieces
from mxq.numerics import QuantizedWeight
from mxq.quantizers.descent import Descent
from mxq.quantizers.refine import DAMPING, damped, quantize_refined
from mxq.scheme import Scheme

SWEEPS = 16
"""Passes over all columns after those of ``refine``; rows that give up come again in the next."""

OUTER_DAMPING = 0.1
"""Share of the mean second moment of the gradients that is added to the diagonal."""


def quantize_kronecker(
    w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor | None = None
) -> QuantizedWeight:
    """As ``quantize_refined``: where no gradients are known, all outputs count the same.

    Raises:
        ValueError: If the group size does not divide K, or the Hessian is not finite.
    """
    return quantize_refined(w_NK, scheme, hessian_KK)


def refine_kronecker(
    w_BNK: Tensor, q: QuantizedWeight, hessian_BKK: Tensor, outer: Sequence[Tensor]
) -> QuantizedWeight:
    """Codes and scales near those of ``q`` that lose less under both second moments.

    ``w_BNK`` is what ``q``, of an integer scheme, stands for. ``outer`` are second moments
    [B, n, n] of the gradients at each of the ``row_pieces``, of any scale. Zero points stay as
    they are.
    """
    hessian_BKK = damped(hessian_BKK, DAMPING)
    parts = [
        _refine(w_BNK[:, rows].to(torch.float32), _rows_of(q, rows), hessian_BKK, outer_Bnn)
        for rows, outer_Bnn in zip(row_pieces(w_BNK.shape[1]), outer, strict=True)
    ]
    scales = [part.scale_NG for part in parts if part.scale_NG is not None]
    codes_NK = torch.cat([part.codes_NK for part in parts], 1)
    return QuantizedWeight(codes_NK, torch.cat(scales, 1), q.zero_NG, q.scheme)


def _refine(
    w_BNK: Tensor, q: QuantizedWeight, hessian_BKK: Tensor, outer_BNN: Tensor
) -> QuantizedWeight:
    descent = Descent(w_BNK, q, hessian_BKK, damped(outer_BNN, OUTER_DAMPING))
    for _ in range(SWEEPS):
        descent.sweep()
    return descent.result()


def _rows_of(q: QuantizedWeight, rows: slice) -> QuantizedWeight:
    assert q.scale_NG is not None
    zero_NG = None if q.zero_NG is None else q.zero_NG[:, rows]
    return QuantizedWeight(q.codes_NK[:, rows], q.scale_NG[:, rows], zero_NG, q.scheme)

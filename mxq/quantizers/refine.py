"""Codes and scales that GPTQ has chosen, refined by coordinate descent.

GPTQ rounds each column once and never looks back, on scales that were found before. Here columns
are rounded again, each while all others stay (as in QuantEase, arXiv 2309.01885), and the scale of
each group is fitted again to its codes under the whole matrix of second moments. The error
``sum((Q - W) H * (Q - W))`` falls with every step, but for the rounding of scales to float16.
"""

import torch
from torch import Tensor

from mxq.numerics import QuantizedWeight
from mxq.quantizers.descent import Descent
from mxq.quantizers.gptq import quantize_gptq
from mxq.scheme import Scheme

SWEEPS = 4
"""Passes over all columns."""

DAMPING = 0.05
"""Share of the mean second moment that is added to the diagonal, so that noise is not fitted."""


def quantize_refined(
    w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor | None = None
) -> QuantizedWeight:
    """GPTQ, then ``refine``. Without a Hessian, and for float formats, round to nearest.

    Raises:
        ValueError: If the group size does not divide K, or the Hessian is not finite.
    """
    q = quantize_gptq(w_NK, scheme, hessian_KK)
    if hessian_KK is None or scheme.kind != "int":
        return q
    return refine(w_NK, q, hessian_KK)


def refine(w_NK: Tensor, q: QuantizedWeight, hessian_KK: Tensor) -> QuantizedWeight:
    """Codes and scales near those of ``q`` that lose less under the second moments of the inputs.

    ``w_NK`` is what ``q``, of an integer scheme, stands for. Zero points stay as they are.
    """
    if w_NK.dim() == 2:
        return refine(w_NK[None], q[None], hessian_KK[None])[0]
    w_NK, hessian_KK = w_NK.to(torch.float32), damped(hessian_KK, DAMPING)
    descent = Descent(w_NK, q, hessian_KK)
    for _ in range(SWEEPS):
        descent.sweep()
    return descent.result()


def damped(moments_BKK: Tensor, share: float) -> Tensor:
    """Second moments in float32 with a share of their mean added to the diagonal."""
    mean_B = moments_BKK.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_B = torch.where(mean_B > 0, mean_B, torch.ones_like(mean_B))
    result_BKK = moments_BKK.to(torch.float32, copy=True)
    result_BKK.diagonal(dim1=-2, dim2=-1).add_(share * mean_B[:, None])
    return result_BKK

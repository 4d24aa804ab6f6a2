"""What a block is fitted to: its own output, or what the original model has in its place.

In a quantized model a block reads inputs x that the layers before it have bent from the original
ones, x0. Fitting ``Q x`` to ``W x0`` (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695) lets it
make up for part of that. As ``|Q x - W x0|^2 = |Q x - W (I + C) x|^2 + const``, where ``C x`` is
the regression of ``x0 - x`` on x, it is the usual problem for another weight.
"""

import torch
from torch import Tensor

from mxq.quantizers.moments import CHUNK_TOKENS

DAMPING = 0.01
"""Share of the mean second moment that is added to the diagonal of the regression."""


def regress_shift(
    x_TK: Tensor, origin_TK: Tensor, weight_T: Tensor, moments_KK: Tensor, scale: float
) -> Tensor:
    """The matrix C [K, K] of which ``C x`` is nearest to ``origin - x``, weighted by ``weight_T``.

    ``moments_KK`` are the shrunk second moments of x, and ``scale`` is how much of them is of these
    tokens. Zeros where there is no token.
    """
    k, total = x_TK.shape[1], weight_T.sum()
    cross_KK = torch.zeros(k, k, device=weight_T.device)
    if len(x_TK) == 0 or total <= 0:
        return cross_KK
    for start in range(0, len(x_TK), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        x = x_TK[part].to(weight_T.device, torch.float32)
        shift = origin_TK[part].to(weight_T.device, torch.float32) - x
        cross_KK += (shift * weight_T[part, None]).T @ x
    damped_KK = moments_KK.clone()
    damped_KK.diagonal().add_(DAMPING * moments_KK.diagonal().mean().clamp(min=1e-30))
    solved, failed = torch.linalg.solve_ex(damped_KK, cross_KK.T * (scale / total))
    return solved.T if failed == 0 else torch.zeros_like(cross_KK)


def trusted_share(shift_KK: Tensor, x_TK: Tensor, origin_TK: Tensor, weight_T: Tensor) -> float:
    """The part of a shift that tokens confirm which it was not fitted to, 0 to 1."""
    x = x_TK.to(weight_T.device, torch.float32)
    found_TK = origin_TK.to(weight_T.device, torch.float32) - x
    said_TK = x @ shift_KK.T
    norm = float((said_TK.square().sum(-1) * weight_T).sum())
    if norm <= 0:
        return 0.0
    return min(1.0, max(0.0, float(((said_TK * found_TK).sum(-1) * weight_T).sum()) / norm))

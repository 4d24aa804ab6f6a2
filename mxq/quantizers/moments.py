"""Second moments of a block's inputs, as GPTQ wants them: weighted, shrunk, rotated."""

import torch
from torch import Tensor

from mxq.numerics import rotate

PRIOR_TOKENS_PER_INPUT = 0.125
"""Weight of the prior in the shrinkage, in tokens for each input feature."""


def second_moments(x_TK: Tensor, weight_T: Tensor) -> Tensor:
    """Mean of ``x x'`` weighted by ``weight_T`` (squared routing weights), [K, K] float32.

    Zeros where there is no token.
    """
    x = x_TK.to(torch.float32)
    total = weight_T.sum()
    if len(x) == 0 or total <= 0:
        return torch.zeros(x.shape[1], x.shape[1])
    return (x * weight_T[:, None]).T @ x / total


def shrink(hessian_KK: Tensor, tokens: int, prior_KK: Tensor) -> Tensor:
    """``(n H + n0 P) / (n + n0)``: an expert with few tokens leans on the prior."""
    prior_tokens = PRIOR_TOKENS_PER_INPUT * hessian_KK.shape[0]
    return (tokens * hessian_KK + prior_tokens * prior_KK) / (tokens + prior_tokens)


def isotropic(hessian_KK: Tensor) -> Tensor:
    """The multiple of the identity with the same trace (the identity itself for a zero matrix)."""
    mean = hessian_KK.diagonal().mean()
    return torch.eye(hessian_KK.shape[0]) * (mean if mean > 0 else torch.ones(()))


def rotate_moments(hessian_KK: Tensor) -> Tensor:
    """Second moments of ``rotate(x)``."""
    return rotate(rotate(hessian_KK).transpose(-1, -2))

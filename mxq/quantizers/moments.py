"""Second moments of a block's inputs, as GPTQ wants them: weighted, shrunk, rotated."""

import torch
from torch import Tensor

from mxq.numerics import rotate

CHUNK_TOKENS = 8192
"""Tokens whose weighted copy exists at a time."""

PRIOR_TOKENS_PER_INPUT = 0.125
"""Weight of the prior in the shrinkage, in tokens for each input feature."""


def second_moments(x_TK: Tensor, weight_T: Tensor) -> Tensor:
    """Mean of ``x x'`` weighted by ``weight_T`` (squared routing weights), [K, K] float32.

    Zeros where there is no token. The weights say on which device it is computed; inputs that are
    on another one move there, some tokens at a time.
    """
    total, device = weight_T.sum(), weight_T.device
    moments_KK = torch.zeros(x_TK.shape[1], x_TK.shape[1], device=device)
    if len(x_TK) == 0 or total <= 0:
        return moments_KK
    for start in range(0, len(x_TK), CHUNK_TOKENS):
        x = x_TK[start : start + CHUNK_TOKENS].to(device, torch.float32)
        moments_KK += (x * weight_T[start : start + CHUNK_TOKENS, None]).T @ x
    return moments_KK / total


def shrink(hessian_KK: Tensor, tokens: int, prior_KK: Tensor) -> Tensor:
    """``(n H + n0 P) / (n + n0)``: an expert with few tokens leans on the prior."""
    share = own_share(tokens, hessian_KK.shape[0])
    return share * hessian_KK + (1 - share) * prior_KK


def own_share(tokens: int, in_features: int) -> float:
    """``n / (n + n0)``, the weight of a block's own tokens beside the prior."""
    return tokens / (tokens + PRIOR_TOKENS_PER_INPUT * in_features)


def isotropic(hessian_KK: Tensor) -> Tensor:
    """The multiple of the identity with the same trace (the identity itself for a zero matrix)."""
    mean = hessian_KK.diagonal().mean()
    eye_KK = torch.eye(hessian_KK.shape[0], device=hessian_KK.device)
    return eye_KK * (mean if mean > 0 else torch.ones_like(mean))


def rotate_moments(hessian_KK: Tensor) -> Tensor:
    """Second moments of ``rotate(x)``."""
    return rotate(rotate(hessian_KK).transpose(-1, -2))

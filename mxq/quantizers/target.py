"""What a block is fitted to: its own output, or what the original model has in its place.

In a quantized model a block reads inputs x that the layers before it have bent from the original
ones, x0. Fitting ``Q x`` to ``W x0`` (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695) lets it
make up for part of that. As ``|Q x - W x0|^2 = |Q x - W (I + C) x|^2 + const``, where ``C x`` is
the regression of ``x0 - x`` on x, it is the usual problem for another weight.

A block that writes to the residual stream h can make up for part of what that is off as well:
``Q x`` is fitted to ``W x0 + (h0 - h)``, which adds the regression of ``h0 - h`` on x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mxq.quantizers.moments import CHUNK_TOKENS

DAMPING = 0.01
"""Share of the mean second moment that is added to the diagonal of a regression of inputs."""

STREAM_DAMPING = 1.0
"""The same for a regression of the residual stream, of which an input says little."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far the original is from here, ``(origin - now) * share``, token by token [T, N].

    Raises:
        ValueError: If they are not of the same tokens.
    """

    now_TN: Tensor
    origin_TN: Tensor
    share_T: Tensor | float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError unless both are of as many tokens."""
        if len(self.now_TN) != len(self.origin_TN):
            raise ValueError(f"{len(self.now_TN)} tokens here, {len(self.origin_TN)} there")

    def of(self, rows: slice, device: torch.device) -> Tensor:
        """Those tokens, in float32 on a device."""
        now_TN = self.now_TN[rows].to(device, torch.float32)
        found_TN = self.origin_TN[rows].to(device, torch.float32) - now_TN
        if isinstance(self.share_T, float):
            return found_TN * self.share_T
        return found_TN * self.share_T[rows, None].to(device)

    def select(self, rows: slice) -> "Deviation":
        """Of those tokens alone."""
        share_T = self.share_T if isinstance(self.share_T, float) else self.share_T[rows]
        return Deviation(self.now_TN[rows], self.origin_TN[rows], share_T)


def regress(
    x_TK: Tensor,
    wanted: Deviation,
    weight_T: Tensor,
    moments_KK: Tensor,
    scale: float,
    damping: float = DAMPING,
) -> Tensor:
    """The matrix C [N, K] of which ``C x`` is nearest to what is wanted, weighted by ``weight_T``.

    ``moments_KK`` are the shrunk second moments of x, and ``scale`` is how much of them is of these
    tokens. Zeros where there is no token.
    """
    total, outputs = weight_T.sum(), wanted.now_TN.shape[1]
    cross_NK = torch.zeros(outputs, x_TK.shape[1], device=weight_T.device)
    if len(x_TK) == 0 or total <= 0:
        return cross_NK
    for start in range(0, len(x_TK), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        x = x_TK[part].to(weight_T.device, torch.float32)
        cross_NK += (wanted.of(part, weight_T.device) * weight_T[part, None]).T @ x
    damped_KK = moments_KK.clone()
    damped_KK.diagonal().add_(damping * moments_KK.diagonal().mean().clamp(min=1e-30))
    solved, failed = torch.linalg.solve_ex(damped_KK, cross_NK.T * (scale / total))
    return solved.T if failed == 0 else torch.zeros_like(cross_NK)


def trusted_share(matrix_NK: Tensor, x_TK: Tensor, wanted: Deviation, weight_T: Tensor) -> float:
    """The part of what a regression says that other tokens than its own confirm, 0 to 1."""
    said_TN = x_TK.to(weight_T.device, torch.float32) @ matrix_NK.T
    norm = float((said_TN.square().sum(-1) * weight_T).sum())
    if norm <= 0:
        return 0.0
    found_TN = wanted.of(slice(None), weight_T.device)
    return min(1.0, max(0.0, float(((said_TN * found_TN).sum(-1) * weight_T).sum()) / norm))

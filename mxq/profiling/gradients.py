"""Second moments of the gradients that a backward sweep finds at the outputs of a layer's sites."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mxq.blocks import row_pieces
from mxq.models.probes import SiteInputs
from mxq.numerics import check_finite
from mxq.profiling.sensitivity import squares
from mxq.quantizers.moments import second_moments

TOKENS_PER_OUTPUT = 1.0
"""Weight of the identity in the shrinkage, in tokens for each output."""


def curvature_of(
    sites: Mapping[str, SiteInputs], device: torch.device
) -> dict[str, tuple[Tensor, ...]]:
    """The shrunk moments of sites with gradients, of mean 1 on their diagonal, in float16.

    Only tokens that may be fitted to are taken.

    Raises:
        ValueError: If a gradient is not finite; names the site.
    """
    found = {}
    for site, inputs in sites.items():
        assert inputs.grad_TN is not None
        grad_TN = inputs.grad_TN[: inputs.fit_tokens]
        check_finite(grad_TN, f"gradients at the output of {site}")
        is_whole = inputs.index_TR is not None
        pieces = [slice(None)] if is_whole else row_pieces(grad_TN.shape[1])
        found[site] = tuple(_moments(grad_TN[:, rows], device) for rows in pieces)
    return found


def _moments(grad_TN: Tensor, device: torch.device) -> Tensor:
    """Shrunk towards the identity: where few tokens carry the gradients, their moments are noise.

    As many tokens as would carry the same sum evenly, ``(sum g^2)^2 / sum g^4``, are weighed
    against ``TOKENS_PER_OUTPUT`` for each output.
    """
    moments_NN = second_moments(grad_TN, torch.ones(len(grad_TN), device=device))
    norm_T = squares(grad_TN).to(device)
    tokens = float(norm_T.sum().square() / norm_T.square().sum().clamp(min=1e-300))
    share = tokens / (tokens + TOKENS_PER_OUTPUT * len(moments_NN))
    scaled_NN = moments_NN / moments_NN.diagonal().mean().clamp(min=1e-30)
    eye_NN = torch.eye(len(moments_NN), device=device)
    return (share * scaled_NN + (1 - share) * eye_NN).half().cpu()

"""Second moments of the gradients that a backward sweep finds at the outputs of a layer's sites."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mxq.blocks import row_pieces
from mxq.models.probes import SiteInputs
from mxq.numerics import check_finite
from mxq.profiling.sensitivity import squares
from mxq.quantizers.moments import second_moments


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
    """Shrunk towards the identity as far as they are noise (Ledoit and Wolf, 2004).

    Where few tokens carry the gradients, other tokens would give other moments: how far off they
    are is expected from how the ``g g'`` of single tokens scatter, and the identity gets this
    share of their squared distance from it.
    """
    moments_NN = second_moments(grad_TN, torch.ones(len(grad_TN), device=device))
    eye_NN = torch.eye(len(moments_NN), device=device)
    mean = float(moments_NN.diagonal().mean())
    if mean <= 0:
        return eye_NN.half().cpu()
    moments_NN /= mean
    norm_T = squares(grad_TN) / mean
    size = float(moments_NN.double().square().sum())
    noise = (float(norm_T.square().mean()) - size) / len(grad_TN)
    distance = float((moments_NN - eye_NN).double().square().sum())
    share = min(1.0, max(0.0, noise) / distance) if distance > 0 else 1.0
    return torch.lerp(moments_NN, eye_NN, share).half().cpu()

"""Second moments of the gradients that a backward sweep finds at the outputs of a layer's sites."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mxq.blocks import row_pieces
from mxq.models.probes import SiteInputs
from mxq.numerics import check_finite
from mxq.quantizers.moments import second_moments


def curvature_of(
    sites: Mapping[str, SiteInputs], device: torch.device
) -> dict[str, tuple[Tensor, ...]]:
    """The moments of sites with gradients, of mean 1 on their diagonal, in float16.

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
    moments_NN = second_moments(grad_TN, torch.ones(len(grad_TN), device=device))
    mean = moments_NN.diagonal().mean()
    return (moments_NN / mean.clamp(min=1e-30)).half().cpu()

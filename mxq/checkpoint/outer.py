"""How much errors in the outputs of an expert's projections cost, from what they cost its layer.

The layer's outputs y have second moments of gradients G. A down projection writes to them. An error
in an output of gate or up passes the activation, whose slope is a, and the down projection D, so
its moments are ``(D' G D) * E[a a']``. G is of all tokens of the layer, the slopes are those of the
expert's own.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mxq.blocks import row_pieces
from mxq.curvature import Curvature
from mxq.models.experts import (
    Experts,
    expert_inner,
    expert_weight,
    working_linear,
)
from mxq.models.probes import ExpertInputs, device_of
from mxq.quantizers.moments import second_moments

Outer = tuple[Tensor, ...]
"""Moments of gradients of several blocks' outputs: [blocks, n, n] for each of the row pieces."""


def outer_of_linear(module: nn.Module, curvature: Curvature, site: str) -> Outer | None:
    """Those of a plain linear, which are known as they are; None where they are not."""
    pieces, device = curvature.get(site), device_of(module)
    return None if pieces is None else tuple(p.to(device, torch.float32)[None] for p in pieces)


def outer_of_experts(
    module: nn.Module, seen: Sequence[ExpertInputs], known: tuple[Tensor, ...] | None
) -> dict[str, Outer]:
    """``projection -> moments`` of some experts, which have their own weights.

    ``known`` are those of the layer's outputs. Empty where they are not known, or where a norm
    follows the down projection: what lies behind it is another space.
    """
    if known is None or cast(Experts, module).has_post_expert_norm:
        return {}
    outer_HH = known[0].to(device_of(module), torch.float32)
    found = [_of_expert(module, one, outer_HH) for one in seen]
    inner = {name: torch.stack([moments[name] for moments in found]) for name in found[0]}
    # The down projections write to one space, so theirs are the same.
    moments_BNN = {**inner, "down": outer_HH.expand(len(seen), -1, -1)}
    return {
        name: tuple(whole[:, rows, rows] for rows in row_pieces(whole.shape[-1]))
        for name, whole in moments_BNN.items()
    }


def _of_expert(module: nn.Module, one: ExpertInputs, outer_HH: Tensor) -> dict[str, Tensor]:
    """Moments at the outputs of gate and up."""
    down_HI = expert_weight(module, one.expert, "down").to(torch.float32)
    passed_II = down_HI.T @ outer_HH @ down_HI
    weight_T = one.gate_T[: one.fit_rows].square()
    return {
        name: passed_II * second_moments(slope_TI, weight_T)
        for name, slope_TI in _slopes(module, one).items()
    }


def _slopes(module: nn.Module, one: ExpertInputs) -> dict[str, Tensor]:
    """Slopes of the inner activation by the outputs of gate and up, [T, I]: each its own."""
    dense, outputs = working_linear(module, one.expert), dict[str, Tensor]()

    def linear(projection: str, x_TK: Tensor) -> Tensor:
        outputs[projection] = dense(projection, x_TK).detach().requires_grad_()
        return outputs[projection]

    with torch.enable_grad():
        inner_TI = expert_inner(cast(Experts, module), linear, one.x_TH[: one.fit_rows])
        slopes = torch.autograd.grad(inner_TI.sum(), list(outputs.values()))
    return dict(zip(outputs, slopes, strict=True))

"""Sensitivity metrics: what a block's output error costs.

A metric is a plain function of a probe and the block's output under a scheme. All of them see only
the tokens that reach the block, so their cost does not depend on the number of experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mxq.models.probes import Probe


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What a metric may need beyond the block: totals, and the layer run again.

    ``rerun(site, z)`` gives the decoder layer's output, all tokens as rows, when a plain linear
    puts out ``z``; ``energy(site)`` is the summed square of the site's output.
    """

    all_tokens: int
    energy: Callable[[str], float]
    rerun: Callable[[str, Tensor], Tensor]


Metric = Callable[[Probe, Tensor, LayerContext], float]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A metric, its unit, and whether it needs gradients or every token of a block.

    ``corrects_fit`` says that the metric is a sum of squares over tokens, of which most were
    fitted to, and is to be raised by what the quantizer does worse on tokens held out.
    """

    metric: Metric
    unit: str
    needs_gradients: bool = False
    needs_all_tokens: bool = False
    corrects_fit: bool = True


def fisher(probe: Probe, z_hat_TN: Tensor, context: LayerContext) -> float:
    """``1/T sum_t (g_t . dz_t)^2 / 2``: the second-order estimate of KL to the original model.

    With gradients of labels sampled from the model, the expectation of ``g g'`` is the Fisher
    information of the block's output, so the value is in nats per token of the whole text and
    comparable over the network.
    """
    if probe.share == 0:
        return 0.0
    assert probe.grad_TN is not None
    delta_TN = z_hat_TN.float() - probe.z_TN.float()
    slope_T = _row_products(delta_TN, probe.grad_TN.float())
    return float(slope_T.double().square().sum()) / probe.share / (2 * context.all_tokens)


def layer_out(probe: Probe, z_hat_TN: Tensor, context: LayerContext) -> float:
    """MxMoE's metric: Frobenius norm of the change of the layer's output, not squared (eq. 6).

    For an expert only its own tokens change, by its weighted contribution, so only they are run.
    """
    if probe.finish is not None:
        change = probe.finish(z_hat_TN) - probe.finish(probe.z_TN)
    else:
        change = context.rerun(probe.block, z_hat_TN) - context.rerun(probe.block, probe.z_TN)
    return float(torch.linalg.vector_norm(change.double()))


def output_mse(probe: Probe, z_hat_TN: Tensor, context: LayerContext) -> float:
    """Squared error of the site's output relative to its energy; no backward pass.

    Comparable within a layer, and between layers as far as relative errors are.
    """
    if probe.share == 0:
        return 0.0
    if probe.finish is not None:
        site = probe.block.rsplit(".", 2)[0]
        change = probe.finish(z_hat_TN) - probe.finish(probe.z_TN)
        energy = context.energy(site)
    else:
        change, energy = z_hat_TN - probe.z_TN, float(probe.z_TN.double().square().sum())
        energy /= probe.share
    return float(change.double().square().sum()) / probe.share / max(energy, 1e-30)


def squares(x_TN: Tensor) -> Tensor:
    """Squared norm of each row, [T] float64."""
    return _row_products(x_TN, x_TN).double()


def _row_products(x_TN: Tensor, y_TN: Tensor) -> Tensor:
    """Product of each row with its partner, [T]; nothing of the size of the inputs is made."""
    return torch.bmm(x_TN[:, None, :], y_TN[:, :, None])[:, 0, 0]


SENSITIVITY: Mapping[str, Sensitivity] = {
    "fisher": Sensitivity(fisher, "nats per token", needs_gradients=True),
    "layer_out": Sensitivity(
        layer_out, "norm of the layer output", needs_all_tokens=True, corrects_fit=False
    ),
    "output_mse": Sensitivity(output_mse, "relative squared output error"),
}

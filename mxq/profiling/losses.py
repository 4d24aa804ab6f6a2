"""The losses of one layer: every block under every scheme, with the quantizer to be deployed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from mxq.artifacts import Provenance
from mxq.blocks import read_block
from mxq.models.adapter import ModelAdapter
from mxq.models.experts import is_fused_experts
from mxq.models.lockstep import LayerCall, hidden_of
from mxq.models.probes import Probe, SiteInputs, device_of, expert_probes, linear_probe
from mxq.models.sweep import Batches
from mxq.profiling.sensitivity import LayerContext, Sensitivity
from mxq.quantizers.choose import (
    MIN_HELDOUT_ROWS,
    BlockBatch,
    BlockInputs,
    Candidate,
    expert_chunks,
    make_batch,
    quantize_batch,
    quantize_schemes,
    rotate_batch,
)
from mxq.quantizers.method import Method
from mxq.quantizers.moments import second_moments
from mxq.scheme import Scheme

TOKENS_PER_BLOCK = 8192
"""Tokens of one block that a metric looks at; more hardly change the estimate."""


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """Options that change the table."""

    schemes: tuple[Scheme, ...]
    sensitivity: Sensitivity
    metric_name: str
    method: Method
    rotation: str = "auto"


@dataclass(frozen=True, slots=True)
class BlockLosses:
    """One block: loss and winning quantizer under each scheme of the settings.

    The loss is infinite and the quantizer empty where the scheme does not fit the block.
    """

    block: str
    tokens: int
    loss: tuple[float, ...]
    quantizer: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerLosses:
    """What is measured of one layer, and kept on disk once it is."""

    layer: int
    is_rotated: bool
    blocks: tuple[BlockLosses, ...]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class LayerVisit:
    """A layer whose weights and inputs are in memory."""

    layer: int
    sites: Mapping[str, SiteInputs]
    calls: list[LayerCall]


def measure_layer(
    adapter: ModelAdapter,
    batches: Batches,
    settings: MeasureSettings,
    visit: LayerVisit,
    provenance: Provenance,
) -> LayerLosses:
    """The losses of all blocks of a layer.

    Raises:
        ValueError: If a weight, an activation or a loss is not finite; names the block.
    """
    context = _context(adapter, batches, visit)
    is_rotated = _should_rotate(adapter, visit.sites, context, settings)
    rows: list[BlockLosses] = []
    for inputs in visit.sites.values():
        for probes, batch in _batches(adapter, inputs, settings):
            turned = rotate_batch(batch) if is_rotated else batch
            rows.extend(_measure_batch(probes, turned, context, settings))
    return LayerLosses(visit.layer, is_rotated, tuple(rows), provenance)


def _measure_batch(
    probes: Sequence[Probe],
    batch: BlockBatch,
    context: LayerContext,
    settings: MeasureSettings,
) -> list[BlockLosses]:
    fitting = [scheme for scheme in settings.schemes if scheme.fits(batch.w_BNK.shape[-1])]
    losses: dict[Scheme, list[float]] = {}
    quantizers: dict[Scheme, list[str]] = {}
    found = quantize_schemes(batch, fitting, settings.method)
    for scheme, candidates in zip(fitting, found, strict=True):
        losses[scheme] = _losses_of(probes, candidates, context, settings.sensitivity)
        quantizers[scheme] = [candidate.quantizer for candidate in candidates]
    return [
        BlockLosses(
            probe.block,
            probe.tokens,
            tuple(losses[s][index] if s in losses else math.inf for s in settings.schemes),
            tuple(quantizers[s][index] if s in losses else "" for s in settings.schemes),
        )
        for index, probe in enumerate(probes)
    ]


def _losses_of(
    probes: Sequence[Probe],
    candidates: Sequence[Candidate],
    context: LayerContext,
    sensitivity: Sensitivity,
) -> list[float]:
    """The loss of each block, raised by how much worse its quantizer is on held-out tokens.

    A block with too few of those takes the largest factor of its batch: it has the fewest tokens.
    """
    outputs = [_output(*pair) for pair in zip(probes, candidates, strict=True)]
    losses = [
        _loss(probe, z_hat_TN, candidate, context, sensitivity)
        for probe, z_hat_TN, candidate in zip(probes, outputs, candidates, strict=True)
    ]
    if not sensitivity.corrects_fit:
        return losses
    factors = [_fit_factor(*pair) for pair in zip(probes, outputs, strict=True)]
    largest = max((factor for factor in factors if factor is not None), default=1.0)
    return [
        loss * (largest if factor is None else factor)
        for loss, factor in zip(losses, factors, strict=True)
    ]


def _fit_factor(probe: Probe, z_hat_TN: Tensor) -> float | None:
    """True over apparent squared error of a block whose quantizer was fitted to most of its rows.

    Errors are relative to the output's energy, so that a few large tokens do not decide. None
    where too few rows are held out to tell.
    """
    fit, rows = probe.fit_rows, len(probe.x_TK)
    if rows - fit < MIN_HELDOUT_ROWS or fit == 0:
        return None
    gate_T = probe.gate_T.double().square()
    error_T = (z_hat_TN - probe.z_TN).double().square().sum(-1) * gate_T
    energy_T = probe.z_TN.double().square().sum(-1) * gate_T
    seen, unseen = (
        float(error_T[part].sum() / energy_T[part].sum().clamp(min=1e-300))
        for part in (slice(0, fit), slice(fit, rows))
    )
    ratio = max(1.0, unseen / seen) if seen > 0 else 1.0
    return (fit * ratio + rows - fit) / rows


def _output(probe: Probe, candidate: Candidate) -> Tensor:
    """The block's output under a candidate, bias included."""
    if len(probe.x_TK) == 0:
        return probe.z_TN
    z_hat_TN = candidate.output(probe.x_TK)
    z_hat_TN = z_hat_TN if probe.bias_N is None else z_hat_TN + probe.bias_N
    return z_hat_TN.to(probe.z_TN.dtype)


def _loss(
    probe: Probe,
    z_hat_TN: Tensor,
    candidate: Candidate,
    context: LayerContext,
    sensitivity: Sensitivity,
) -> float:
    loss = sensitivity.metric(probe, z_hat_TN, context)
    if not math.isfinite(loss):
        raise ValueError(
            f"{probe.block}: the sensitivity under {candidate.weight.scheme} is {loss}; "
            "its activations or gradients overflow; other calibration text may avoid that"
        )
    return loss


def _should_rotate(
    adapter: ModelAdapter,
    sites: Mapping[str, SiteInputs],
    context: LayerContext,
    settings: MeasureSettings,
) -> bool:
    """Whether rotated inputs lower the layer's summed loss under its cheapest scheme.

    The cheapest scheme of each block is where the layer has most to lose.
    """
    if settings.rotation != "auto":
        return settings.rotation == "on"
    totals = {False: 0.0, True: 0.0}
    for inputs in sites.values():
        for probes, batch in _batches(adapter, inputs, settings):
            _, n, k = batch.w_BNK.shape
            fitting = [scheme for scheme in settings.schemes if scheme.fits(k)]
            cheapest = min(fitting, key=lambda scheme: scheme.storage_bits(n, k))
            for version in (batch, rotate_batch(batch)):
                candidates = quantize_batch(version, cheapest, settings.method)
                found = _losses_of(probes, candidates, context, settings.sensitivity)
                totals[version.rotated] += sum(found)
    return totals[True] < totals[False]


def _batches(
    adapter: ModelAdapter, inputs: SiteInputs, settings: MeasureSettings
) -> Iterator[tuple[list[Probe], BlockBatch]]:
    """Probes of one projection of several experts at a time, with their weights and Hessians."""
    module = adapter.module(inputs.site)
    limit = None if settings.sensitivity.needs_all_tokens else TOKENS_PER_BLOCK
    if not is_fused_experts(module):
        probe = linear_probe(module, inputs, max_tokens=limit)
        yield [probe], _batch_of(adapter, [probe], None)
        return
    prior_KK = second_moments(
        inputs.x_TK[: inputs.fit_tokens],
        torch.ones(min(inputs.fit_tokens, len(inputs.x_TK)), device=device_of(module)),
    )
    for experts in expert_chunks(adapter.site_blocks(inputs.site)):
        traced = [expert_probes(module, inputs, e, max_tokens=limit) for e in experts]
        for projection in traced[0]:
            probes = [probe[projection] for probe in traced]
            shares_input = projection != "down"
            yield probes, _batch_of(adapter, probes, prior_KK if shares_input else None)


def _batch_of(
    adapter: ModelAdapter, probes: Sequence[Probe], prior_KK: Tensor | None
) -> BlockBatch:
    blocks = []
    for probe in probes:
        block = adapter.block(probe.block)
        w_NK = read_block(adapter.parameter(block), block)
        blocks.append(BlockInputs(probe.block, w_NK, probe.x_TK, probe.gate_T, probe.fit_rows))
    return make_batch(blocks, prior_KK)


def _context(adapter: ModelAdapter, batches: Batches, visit: LayerVisit) -> LayerContext:
    return LayerContext(
        all_tokens=batches.all_tokens,
        energy=cache(lambda site: _energy(adapter.module(site), visit.sites[site])),
        rerun=_rerunner(adapter, visit.calls),
    )


def _energy(module: nn.Module, inputs: SiteInputs) -> float:
    """Summed square of a site's output over all tokens."""
    if inputs.index_TR is None or inputs.weights_TR is None:
        return 0.0
    device = device_of(module)
    seen = (inputs.x_TK, inputs.index_TR, inputs.weights_TR)
    output = module(*(tensor.to(device) for tensor in seen))
    return float(output.double().square().sum())


def _rerunner(adapter: ModelAdapter, calls: list[LayerCall]) -> Callable[[str, Tensor], Tensor]:
    def rerun(site: str, z_TN: Tensor) -> Tensor:
        """The layer's output with a linear's output replaced, [T, H]."""
        start = 0

        def replace(module: nn.Module, args: object, output: Tensor) -> Tensor:
            nonlocal start
            rows = output.numel() // output.shape[-1]
            start += rows
            return z_TN[start - rows : start].reshape(output.shape)

        handle = adapter.module(site).register_forward_hook(replace)
        try:
            return torch.cat([hidden_of(call.run()).flatten(0, -2) for call in calls])
        finally:
            handle.remove()

    return rerun

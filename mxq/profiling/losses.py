"""The losses of one layer: every block under every scheme, with the quantizer to be deployed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from mxq.artifacts import Provenance
from mxq.blocks import LinearBlock
from mxq.models.adapter import ModelAdapter
from mxq.models.experts import is_fused_experts
from mxq.models.lockstep import LayerCall, hidden_of
from mxq.models.probes import Probe, SiteInputs, device_of, expert_inputs, linear_probe
from mxq.models.sweep import Batches
from mxq.profiling.sensitivity import LayerContext, Sensitivity, squares
from mxq.quantizers.choose import (
    MIN_HELDOUT_ROWS,
    BatchInputs,
    BlockBatch,
    BlockInputs,
    Candidate,
    expert_chunks,
    make_batch,
    make_inputs,
    quantize_schemes,
)
from mxq.quantizers.method import Method
from mxq.quantizers.moments import second_moments
from mxq.scheme import Scheme

TOKENS_PER_BLOCK = 8192
"""Tokens of one block that a metric looks at; more hardly change the estimate."""


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """Options that change the table.

    ``schemes`` are all candidates; a projection that ``offered`` names has only those listed there.
    """

    schemes: tuple[Scheme, ...]
    sensitivity: Sensitivity
    metric_name: str
    method: Method
    rotation: str = "auto"
    offered: Mapping[str, tuple[Scheme, ...]] = field(default_factory=dict)

    def candidates(self, block: LinearBlock) -> list[Scheme]:
        """The schemes that a block may get: on offer for its projection, and of fitting groups."""
        menu = self.offered.get(block.projection, self.schemes)
        return [scheme for scheme in menu if scheme.fits(block.in_features)]


@dataclass(frozen=True, slots=True)
class BlockLosses:
    """One block: loss and winning quantizer under each scheme of the settings.

    The loss is infinite and the quantizer empty where the scheme is no candidate of the block.
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
    is_rotated, found, is_tried = settings.rotation == "on", _Found(), settings.rotation == "auto"
    if is_tried:
        is_rotated, found = _try_rotation(adapter, visit, context, settings)
    if not is_tried or _has_choice(adapter.blocks(visit.layer), settings):
        for members in _members(adapter, visit, settings):
            _measure(members, found, is_rotated, context, settings)
    return LayerLosses(visit.layer, is_rotated, found.rows(settings.schemes), provenance)


@dataclass(frozen=True, slots=True)
class _Members:
    """Blocks of one shape and projection that are measured together, and their candidates."""

    probes: Sequence[Probe]
    weights: Sequence[Tensor]
    inputs: BatchInputs
    candidates: Sequence[Scheme]

    def cheapest(self) -> Scheme:
        """The candidate that stores least."""
        n, k = self.weights[0].shape
        return min(self.candidates, key=lambda scheme: scheme.storage_bits(n, k))

    def batch(self, *, rotated: bool) -> BlockBatch:
        """What a quantizer gets of them."""
        inputs = self.inputs.turned if rotated else self.inputs
        return make_batch([probe.block for probe in self.probes], self.weights, inputs)


@dataclass(slots=True)
class _Found:
    """What is known of a layer's blocks: tokens, and loss and winning quantizer by scheme."""

    tokens: dict[str, int] = field(default_factory=dict)
    losses: dict[tuple[str, Scheme], tuple[float, str]] = field(default_factory=dict)

    def rows(self, schemes: Sequence[Scheme]) -> tuple[BlockLosses, ...]:
        """One row for each block, in the order of measurement."""
        rows = []
        for block, tokens in self.tokens.items():
            pairs = [self.losses.get((block, scheme), (math.inf, "")) for scheme in schemes]
            losses, quantizers = zip(*pairs, strict=True)
            rows.append(BlockLosses(block, tokens, losses, quantizers))
        return tuple(rows)


def _measure(
    members: _Members,
    found: _Found,
    rotated: bool,
    context: LayerContext,
    settings: MeasureSettings,
    schemes: Sequence[Scheme] | None = None,
) -> float:
    """Add to what was found under the schemes (None: all candidates yet unknown); their sum."""
    if schemes is None:
        first = members.probes[0].block
        schemes = [s for s in members.candidates if (first, s) not in found.losses]
    found.tokens.update({probe.block: probe.tokens for probe in members.probes})
    total = 0.0
    quantized = quantize_schemes(members.batch(rotated=rotated), schemes, settings.method)
    for scheme, candidates in zip(schemes, quantized, strict=True):
        losses = _losses_of(members, candidates, context, settings.sensitivity)
        total += sum(losses)
        for candidate, loss in zip(candidates, losses, strict=True):
            found.losses[candidate.block, scheme] = loss, candidate.quantizer
    return total


def _has_choice(blocks: Sequence[LinearBlock], settings: MeasureSettings) -> bool:
    """Whether a block has more than one candidate."""
    return any(len(settings.candidates(block)) > 1 for block in blocks)


def _losses_of(
    members: _Members,
    candidates: Sequence[Candidate],
    context: LayerContext,
    sensitivity: Sensitivity,
) -> list[float]:
    """The loss of each block, raised by how much worse its quantizer is on held-out tokens.

    A block with too few of those takes the largest factor of its batch: it has the fewest tokens.
    """
    probes = members.probes
    outputs = [_output(*each) for each in zip(probes, members.weights, candidates, strict=True)]
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
    error_T = squares(z_hat_TN - probe.z_TN) * gate_T
    energy_T = squares(probe.z_TN) * gate_T
    seen, unseen = (
        float(error_T[part].sum() / energy_T[part].sum().clamp(min=1e-300))
        for part in (slice(0, fit), slice(fit, rows))
    )
    ratio = max(1.0, unseen / seen) if seen > 0 else 1.0
    return (fit * ratio + rows - fit) / rows


def _output(probe: Probe, w_NK: Tensor, candidate: Candidate) -> Tensor:
    """The block's output under a candidate, bias included."""
    if len(probe.x_TK) == 0:
        return probe.z_TN
    if candidate.weight.scheme.a_bits == 16:
        # The original output, its bias included, and the change in one product.
        change_NK = candidate.dense() - w_NK.to(torch.float32)
        x_TK, z_TN = probe.x_TK.to(torch.float32), probe.z_TN.to(torch.float32)
        return torch.addmm(z_TN, x_TK, change_NK.T).to(probe.z_TN.dtype)
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


def _try_rotation(
    adapter: ModelAdapter, visit: LayerVisit, context: LayerContext, settings: MeasureSettings
) -> tuple[bool, _Found]:
    """Whether rotated inputs lower the layer's summed loss under its cheapest scheme.

    The cheapest scheme of each block is where the layer has most to lose. What was found on the
    way is good for the choice that is made.
    """
    found = {False: _Found(), True: _Found()}
    totals = {False: 0.0, True: 0.0}
    for members in _members(adapter, visit, settings):
        cheapest = [members.cheapest()]
        for rotated in (False, True):
            totals[rotated] += _measure(
                members, found[rotated], rotated, context, settings, cheapest
            )
    is_rotated = totals[True] < totals[False]
    return is_rotated, found[is_rotated]


def _members(
    adapter: ModelAdapter, visit: LayerVisit, settings: MeasureSettings
) -> Iterator[_Members]:
    """The layer's blocks, one projection of several experts at a time.

    What is known of inputs is computed once for the projections that read the same.
    """
    limit = None if settings.sensitivity.needs_all_tokens else TOKENS_PER_BLOCK
    last: tuple[Tensor, BatchInputs] | None = None
    for inputs in visit.sites.values():
        module = adapter.module(inputs.site)
        if is_fused_experts(module):
            yield from _members_of_experts(adapter, inputs, settings, limit)
            continue
        probes = [linear_probe(module, inputs, max_tokens=limit)]
        if last is None or last[0] is not inputs.x_TK:
            last = inputs.x_TK, _inputs_of(probes, None)
        yield _members_of(adapter, settings, probes, last[1])


def _members_of_experts(
    adapter: ModelAdapter, inputs: SiteInputs, settings: MeasureSettings, limit: int | None
) -> Iterator[_Members]:
    module = adapter.module(inputs.site)
    prior_KK = second_moments(
        inputs.x_TK[: inputs.fit_tokens],
        torch.ones(min(inputs.fit_tokens, len(inputs.x_TK)), device=device_of(module)),
    )
    for experts in expert_chunks(adapter.site_blocks(inputs.site)):
        traced = [expert_inputs(module, inputs, e, max_tokens=limit).probes() for e in experts]
        shared = None
        for projection in traced[0]:
            probes = [probe[projection] for probe in traced]
            if projection == "down":
                known = _inputs_of(probes, None)
            else:
                known = shared = shared or _inputs_of(probes, prior_KK)
            yield _members_of(adapter, settings, probes, known)


def _inputs_of(probes: Sequence[Probe], prior_KK: Tensor | None) -> BatchInputs:
    blocks = [BlockInputs(p.block, p.x_TK, p.gate_T, p.fit_rows) for p in probes]
    return make_inputs(blocks, prior_KK)


def _members_of(
    adapter: ModelAdapter, settings: MeasureSettings, probes: Sequence[Probe], known: BatchInputs
) -> _Members:
    weights = [adapter.weight(probe.block) for probe in probes]
    candidates = settings.candidates(adapter.block(probes[0].block))
    return _Members(probes, weights, known, candidates)


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

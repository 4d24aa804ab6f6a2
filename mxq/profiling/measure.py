"""Measure: the loss of every block under every scheme, with the quantizer that will be deployed."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.blocks import LinearBlock, read_block
from mxq.models.adapter import ModelAdapter
from mxq.models.experts import is_fused_experts
from mxq.models.lockstep import LayerCall, hidden_of
from mxq.models.probes import Probe, SiteInputs, expert_probes, linear_probe
from mxq.models.sweep import Batches, OnProgress, sweep_backward, sweep_forward
from mxq.profiling.sensitivity import LayerContext, Sensitivity
from mxq.quantizers.choose import (
    MIN_HELDOUT_ROWS,
    BlockBatch,
    BlockInputs,
    Candidate,
    expert_chunks,
    make_batch,
    quantize_batch,
    rotate_batch,
)
from mxq.quantizers.method import Method
from mxq.quantizers.moments import second_moments
from mxq.scheme import Scheme

TOKENS_PER_BLOCK = 8192
"""Tokens of one block that a metric looks at; more hardly change the estimate."""

UNROUTED_TOKENS = 0.5
"""An expert that no token reached is priced as if half a token had."""


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """Options that change the table."""

    schemes: tuple[Scheme, ...]
    sensitivity: Sensitivity
    metric_name: str
    method: Method
    rotation: str = "auto"


@dataclass(slots=True)
class _Losses:
    """Losses found so far; the rows of a layer are complete once the layer is done."""

    loss: dict[tuple[str, Scheme], float] = field(default_factory=dict)
    quantizer: dict[tuple[str, Scheme], str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    rotated: set[int] = field(default_factory=set)


def measure(
    adapter: ModelAdapter,
    batches: Batches,
    settings: MeasureSettings,
    provenance: Provenance,
    *,
    generator: torch.Generator,
    progress: OnProgress | None = None,
) -> SensitivityTable:
    """The sensitivity table of a model.

    Each layer is read once for a forward-only metric, twice for one with gradients. Losses are
    made monotone: a scheme that stores more, with inputs at least as exact, never costs more.

    Raises:
        ValueError: If a weight or activation is not finite (names the block), or no scheme fits
            a block.
    """
    _check_fit(adapter.blocks(), settings.schemes)
    losses = _Losses()

    def on_sites(layer: int, sites: dict[str, SiteInputs], calls: list[LayerCall]) -> None:
        context = _context(adapter, batches, sites, calls)
        rotated = _should_rotate(adapter, sites, context, settings)
        if rotated:
            losses.rotated.add(layer)
        for inputs in sites.values():
            for probes, batch in _batches(adapter, inputs, settings):
                turned = rotate_batch(batch) if rotated else batch
                _measure_batch(probes, turned, context, settings, losses)

    if settings.sensitivity.needs_gradients:
        sweep_backward(adapter, batches, on_sites, generator=generator, progress=progress)
    else:
        sweep_forward(adapter, batches, on_sites, progress)
    return _table(adapter, batches, settings, losses, provenance)


def _measure_batch(
    probes: Sequence[Probe],
    batch: BlockBatch,
    context: LayerContext,
    settings: MeasureSettings,
    losses: _Losses,
) -> None:
    in_features = batch.w_BNK.shape[-1]
    for scheme in settings.schemes:
        if not scheme.fits(in_features):
            continue
        candidates = quantize_batch(batch, scheme, settings.method)
        found = _losses_of(probes, candidates, context, settings.sensitivity)
        for probe, candidate, loss in zip(probes, candidates, found, strict=True):
            losses.loss[candidate.block, scheme] = loss
            losses.quantizer[candidate.block, scheme] = candidate.quantizer
            losses.tokens[candidate.block] = probe.tokens


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
        inputs.x_TK[: inputs.fit_tokens], torch.ones(min(inputs.fit_tokens, len(inputs.x_TK)))
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


def _context(
    adapter: ModelAdapter, batches: Batches, sites: Mapping[str, SiteInputs], calls: list[LayerCall]
) -> LayerContext:
    return LayerContext(
        all_tokens=batches.all_tokens,
        energy=cache(lambda site: _energy(adapter.module(site), sites[site])),
        rerun=_rerunner(adapter, calls),
    )


def _energy(module: nn.Module, inputs: SiteInputs) -> float:
    """Summed square of a site's output over all tokens."""
    if inputs.index_TR is None:
        return 0.0
    output = module(inputs.x_TK, inputs.index_TR, inputs.weights_TR)
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


def _table(
    adapter: ModelAdapter,
    batches: Batches,
    settings: MeasureSettings,
    losses: _Losses,
    provenance: Provenance,
) -> SensitivityTable:
    rates = _rates_per_token(adapter.blocks(), losses)
    rows, quantizers, infos = [], [], []
    for block in adapter.blocks():
        if block.name not in losses.tokens:
            raise ValueError(
                f"the model runs without {block.name}, so nothing is known of its inputs; keep it "
                "in its type with --keep"
            )
        keys = [(block.name, scheme) for scheme in settings.schemes]
        tokens = losses.tokens[block.name]
        row = [losses.loss.get(key, math.inf) for key in keys]
        if tokens == 0:
            row = [
                loss if math.isinf(loss) else UNROUTED_TOKENS * rates.get(_kind(block, s), 0.0)
                for s, loss in zip(settings.schemes, row, strict=True)
            ]
        rows.append(_monotone(block, settings.schemes, row))
        quantizers.append(tuple(losses.quantizer.get(key, "") for key in keys))
        infos.append(_info(adapter, block, tokens))
    return SensitivityTable(
        blocks=tuple(infos),
        schemes=settings.schemes,
        loss=tuple(rows),
        quantizer=tuple(quantizers),
        metric=settings.metric_name,
        unit=settings.sensitivity.unit,
        calibration_tokens=batches.all_tokens,
        rotated_layers=tuple(sorted(losses.rotated)),
        provenance=provenance,
    )


def _kind(block: LinearBlock, scheme: Scheme) -> tuple[int, str, Scheme]:
    return block.layer, block.projection, scheme


def _rates_per_token(
    blocks: Sequence[LinearBlock], losses: _Losses
) -> dict[tuple[int, str, Scheme], float]:
    """Mean loss per routed token of a layer's experts, by projection and scheme."""
    by_name = {block.name: block for block in blocks}
    totals: dict[tuple[int, str, Scheme], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (name, scheme), loss in losses.loss.items():
        block = by_name[name]
        if block.expert is not None and losses.tokens[name] > 0:
            total = totals[_kind(block, scheme)]
            total[0] += loss
            total[1] += losses.tokens[name]
    return {key: loss / tokens for key, (loss, tokens) in totals.items()}


def _monotone(
    block: LinearBlock, schemes: Sequence[Scheme], row: Sequence[float]
) -> tuple[float, ...]:
    """Each loss lowered to that of any scheme that stores no more and rounds inputs no less."""
    bits = [scheme.storage_bits(block.out_features, block.in_features) for scheme in schemes]
    return tuple(
        min(
            row[t]
            for t in range(len(schemes))
            if t == s or (bits[t] <= bits[s] and schemes[t].a_bits <= schemes[s].a_bits)
        )
        if math.isfinite(row[s])
        else math.inf
        for s in range(len(schemes))
    )


def _info(adapter: ModelAdapter, block: LinearBlock, tokens: int) -> BlockInfo:
    return BlockInfo(
        name=block.name,
        layer=block.layer,
        expert=block.expert,
        projection=block.projection,
        out_features=block.out_features,
        in_features=block.in_features,
        tokens=tokens,
        site=adapter.site_of(block),
    )


def _check_fit(blocks: Sequence[LinearBlock], schemes: Sequence[Scheme]) -> None:
    for block in blocks:
        if not any(scheme.fits(block.in_features) for scheme in schemes):
            menu = ", ".join(str(scheme) for scheme in schemes)
            raise ValueError(
                f"{block.name} has {block.in_features} input features and none of {menu} has a "
                "group size that divides them; add a scheme with a smaller group or 'grow'"
            )

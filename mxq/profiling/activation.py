"""Profile: which tokens reach which expert, with what weight, from which domain.

The counts price latency and tell cold experts; experts under a token floor are topped up by spare
calibration samples that reach them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxq.artifacts import Provenance
from mxq.models.adapter import ModelAdapter
from mxq.models.experts import Linear, dense_linear, is_fused_experts
from mxq.models.lockstep import LayerCall
from mxq.models.probes import SiteInputs, expert_inputs
from mxq.models.sweep import Batches, OnProgress, sweep_forward

OUTPUT_ROWS = 4096
"""Tokens whose outputs of a down projection are in memory at once."""


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Activation statistics of the experts of one layer.

    ``tokens[expert][domain]`` and ``gate_mass[expert][domain]`` count routed tokens and sum their
    routing weights. ``coactivation_entropy`` is the entropy in nats of which pair of experts a
    token takes together, ``coactivation_entropy_max`` that of a uniform choice of pairs.
    ``input_power[expert]`` and ``inner_power[expert]`` are mean squares of the inputs of gate/up
    and of down, ``down_max[expert]`` is the largest magnitude that down puts out, before the
    routing weight; 0 where no token came.
    """

    site: str
    tokens: tuple[tuple[int, ...], ...]
    gate_mass: tuple[tuple[float, ...], ...]
    coactivation_entropy: float
    coactivation_entropy_max: float
    input_power: tuple[float, ...]
    inner_power: tuple[float, ...]
    down_max: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ActivationStats:
    """The profile of a model: its domains, tokens in all, and each layer's experts.

    ``topped_up`` are experts that spare samples brought over the floor, ``cold`` those that stayed
    under ``floor`` tokens, ``added_samples`` the spare samples taken and ``tokens_digest`` that of
    the tokens that were chosen.
    """

    domains: tuple[str, ...]
    total_tokens: int
    sites: tuple[SiteStats, ...]
    floor: int
    topped_up: tuple[str, ...]
    cold: tuple[str, ...]
    added_samples: int
    tokens_digest: str
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Routing:
    """Tokens of each expert in each sample, by site: [E, samples] int64."""

    by_site: Mapping[str, Tensor]


def profile_routing(
    adapter: ModelAdapter,
    batches: Batches,
    domains: Sequence[str],
    progress: OnProgress | None = None,
) -> tuple[tuple[SiteStats, ...], Routing]:
    """Statistics of every experts site, and the counts by sample behind them.

    ``domains`` names the domain of each sample, in the order of the batches.
    """
    names = sorted(set(domains))
    sample_domain = torch.tensor([names.index(domain) for domain in domains])
    seqlen = batches.tokens[0].shape[1]
    stats: list[SiteStats] = []
    routing: dict[str, Tensor] = {}

    def on_sites(layer: int, sites: dict[str, SiteInputs], calls: list[LayerCall]) -> None:
        for site, inputs in sites.items():
            if inputs.index_TR is None:
                continue
            experts = 1 + max(b.expert or 0 for b in adapter.site_blocks(site))
            by_sample = _count(inputs, experts, seqlen, len(domains))
            routing[site] = by_sample[0].to(torch.int64)
            stats.append(_site_stats(adapter, inputs, by_sample, sample_domain, len(names)))

    sweep_forward(adapter, batches, on_sites, progress, only_experts=True)
    return tuple(stats), Routing(routing)


def choose_top_up(
    routing: Routing, base: Sequence[int], spare: Sequence[int], floor: int
) -> tuple[int, ...]:
    """Spare samples to add so that experts reach ``floor`` tokens, as few as greed finds.

    ``base`` and ``spare`` are columns of the routing counts.
    """
    if not routing.by_site or not spare:
        return ()
    counts_ES = torch.cat([routing.by_site[site] for site in sorted(routing.by_site)])
    need_E = (floor - counts_ES[:, list(base)].sum(1)).clamp(min=0)
    left, chosen = list(spare), []
    while left:
        useful = torch.minimum(counts_ES[:, left], need_E[:, None]).sum(0)
        best = int(useful.argmax())
        if useful[best] == 0:
            break
        sample = left.pop(best)
        chosen.append(sample)
        need_E = (need_E - counts_ES[:, sample]).clamp(min=0)
    return tuple(sorted(chosen))


def under_floor(routing: Routing, samples: Sequence[int], floor: int) -> tuple[str, ...]:
    """Experts that get fewer than ``floor`` tokens from those samples, by name."""
    return tuple(
        f"{site}.{expert}"
        for site, counts in sorted(routing.by_site.items())
        for expert, tokens in enumerate(counts[:, list(samples)].sum(1).tolist())
        if tokens < floor
    )


def _count(inputs: SiteInputs, experts: int, seqlen: int, samples: int) -> tuple[Tensor, Tensor]:
    """Tokens and gate mass of each expert in each sample, [E, samples] float64."""
    assert inputs.index_TR is not None
    assert inputs.weights_TR is not None
    sample_T = torch.arange(len(inputs.index_TR)) // seqlen
    valid = inputs.index_TR < experts
    cell = (inputs.index_TR * samples + sample_T[:, None])[valid]
    weights = inputs.weights_TR[valid].double()
    size = experts * samples
    tokens = torch.bincount(cell, minlength=size).double()
    mass = torch.bincount(cell, weights=weights, minlength=size)
    return tokens.view(experts, samples), mass.view(experts, samples)


def _site_stats(
    adapter: ModelAdapter,
    inputs: SiteInputs,
    by_sample: tuple[Tensor, Tensor],
    sample_domain: Tensor,
    domains: int,
) -> SiteStats:
    to_domain = torch.nn.functional.one_hot(sample_domain, domains).double()
    tokens_ED, mass_ED = (counts @ to_domain for counts in by_sample)
    experts = len(tokens_ED)
    entropy, most = _pair_entropy(inputs, experts)
    at_work = _at_work(adapter, inputs, experts)
    return SiteStats(
        site=inputs.site,
        tokens=tuple(tuple(int(v) for v in row) for row in tokens_ED.tolist()),
        gate_mass=tuple(tuple(row) for row in mass_ED.tolist()),
        coactivation_entropy=entropy,
        coactivation_entropy_max=most,
        input_power=at_work[0],
        inner_power=at_work[1],
        down_max=at_work[2],
    )


def _pair_entropy(inputs: SiteInputs, experts: int) -> tuple[float, float]:
    """Entropy of the pairs of experts that tokens take together, and its maximum."""
    assert inputs.index_TR is not None
    if inputs.index_TR.shape[1] < 2 or experts < 2:
        return 0.0, 0.0
    kept = inputs.index_TR[(inputs.index_TR < experts).all(1)]
    taken_TE = torch.nn.functional.one_hot(kept, experts).sum(1).double()
    pairs_EE = (taken_TE.T @ taken_TE).triu(1)
    share = pairs_EE[pairs_EE > 0] / pairs_EE.sum().clamp(min=1)
    return float(-(share * share.log()).sum()), math.log(experts * (experts - 1) / 2)


def _at_work(
    adapter: ModelAdapter, inputs: SiteInputs, experts: int
) -> tuple[tuple[float, ...], ...]:
    """Of each expert the mean squares of its inputs and inner activations, and its ``down_max``."""
    module = adapter.module(inputs.site)
    assert is_fused_experts(module)
    rows = []
    for expert in range(experts):
        seen = expert_inputs(module, inputs, expert)
        inner_TI = seen.probe("down").x_TK
        largest = _largest(dense_linear(module, expert), inner_TI)
        rows.append((_mean_square(seen.x_TH), _mean_square(inner_TI), largest))
    return tuple(zip(*rows, strict=True))


def _largest(linear: Linear, inner_TI: Tensor) -> float:
    """Largest magnitude that the down projection puts out; 0 without tokens."""
    # Part by part: the outputs of all tokens at once would be as large as the layer's input.
    starts = range(0, len(inner_TI), OUTPUT_ROWS)
    parts = (linear("down", inner_TI[start : start + OUTPUT_ROWS]) for start in starts)
    return max((float(part.abs().max()) for part in parts), default=0.0)


def _mean_square(x_TK: Tensor) -> float:
    return float(x_TK.double().square().mean()) if x_TK.numel() else 0.0

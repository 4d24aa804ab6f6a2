"""From sums over windows to what is reported of a model: means, intervals, differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxq.evaluation.statistics import Estimate, Stratum, difference, estimate, exponential

Scores = Mapping[str, Stratum]
"""Sums of nll, and with a reference of kl and flips, over the windows of each domain."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one model to another on the same windows: paired differences of the means of a ``Loss``.

    ``perplexity_ratio`` is the exp of the difference in nats.
    """

    nll: Estimate
    perplexity_ratio: Estimate
    kl: Estimate | None
    flips: Estimate | None


@dataclass(frozen=True, slots=True)
class Loss:
    """Of one model on one text: means over ``tokens`` scored tokens in ``windows`` windows.

    ``nll`` is in nats per token and ``perplexity`` its exp. ``kl`` is KL(reference || model) in
    nats per token and ``flips`` the share of positions where the two hold another token for the
    likeliest; both are None without a reference. ``difference`` is to the baseline, and None for
    that one.
    """

    tokens: int
    windows: int
    nll: Estimate
    perplexity: Estimate
    kl: Estimate | None
    flips: Estimate | None
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class ModelLosses:
    """A model on all texts together, and on each."""

    model: str
    overall: Loss
    domains: Mapping[str, Loss]


def model_losses(name: str, ours: Scores, base: Scores | None, confidence: float) -> ModelLosses:
    """What the scores of a model say, also beside the baseline's; None for that one itself."""

    def over(domains: Sequence[str]) -> Loss:
        to = None if base is None else [base[domain] for domain in domains]
        return _loss([ours[domain] for domain in domains], to, confidence)

    domains = {domain: over([domain]) for domain in ours}
    overall = over(list(ours)) if len(ours) > 1 else next(iter(domains.values()))
    return ModelLosses(name, overall, domains)


def _loss(strata: Sequence[Stratum], to: Sequence[Stratum] | None, confidence: float) -> Loss:
    nll, kl, flips = _three(strata, confidence)
    return Loss(
        tokens=int(sum(stratum.counts_U.sum() for stratum in strata)),
        windows=sum(len(stratum.counts_U) for stratum in strata),
        nll=nll,
        perplexity=exponential(nll),
        kl=kl,
        flips=flips,
        difference=None if to is None else _difference(strata, to, confidence),
    )


def _difference(strata: Sequence[Stratum], to: Sequence[Stratum], confidence: float) -> Difference:
    nll, kl, flips = _three(difference(strata, to), confidence)
    return Difference(nll, exponential(nll), kl, flips)


def _three(
    strata: Sequence[Stratum], confidence: float
) -> tuple[Estimate, Estimate | None, Estimate | None]:
    """Estimates of nll, kl and flips, the last two None where there is no reference."""
    nll, *others = estimate(strata, confidence)
    kl, flips = others if others else (None, None)
    return nll, kl, flips

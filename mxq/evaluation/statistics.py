"""Means with their uncertainty, and differences between models on the same data.

A unit is what the data could have had more of, independently of the rest: a window of a text, a
question of a task. The tokens of a window depend on each other, so an interval draws whole windows.
A difference between two models is taken unit by unit before it is averaged: both have the hard
windows in common, and only what they do not share is left to chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

DRAWS = 10_000
"""Data sets that an interval draws."""

SEED = 0
"""Of the generator that draws them, so that the same data have the same interval."""

FEW_UNITS = 20
"""Fewer units than this make the intervals of a bootstrap too narrow."""

BATCH_NUMBERS = 2**22
"""Numbers that exist at a time while data sets are drawn: 32 MB."""

ROUNDING = 1e-12
"""A spread below this part of the sums is that of float64 and not of the data."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stratum:
    """Units of one kind, such as the windows of one domain.

    ``sums_QU`` has a row for each of Q quantities and a column for each of U units: the quantity
    summed over the unit's ``counts_U`` tokens. A question counts as one.
    """

    counts_U: Array
    sums_QU: Array


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, its standard error and an interval.

    ``stderr``, ``low`` and ``high`` are None where a stratum has one unit: its spread is unknown.
    """

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


def estimate(strata: Sequence[Stratum], confidence: float = 0.95) -> tuple[Estimate, ...]:
    """The mean per token of each quantity over all strata, Q estimates.

    The mean is R = sum(s_u) / sum(n_u) over units u with sums s and counts n. Its standard error is
    that of a combined ratio estimate: with e_u = s_u - R n_u, and the mean of e in each stratum h
    taken out, sqrt(sum_h U_h / (U_h - 1) sum_u e_u^2) / sum(n_u). For units of equal counts in one
    stratum this is the standard deviation of the units' means over sqrt(U). The interval is a BCa
    bootstrap over units, within strata.
    """
    total = sum(stratum.counts_U.sum() for stratum in strata)
    value_Q: Array = sum(stratum.sums_QU.sum(-1) for stratum in strata) / total
    if min(len(stratum.counts_U) for stratum in strata) < 2:
        return tuple(Estimate(float(value)) for value in value_Q)
    spread_Q = _spread(strata, value_Q)
    low_Q, high_Q = value_Q.copy(), value_Q.copy()
    # Units that agree leave nothing to draw, and BCa divides by their spread.
    moves_Q = spread_Q > 0
    if moves_Q.any():
        moving = [Stratum(stratum.counts_U, stratum.sums_QU[moves_Q]) for stratum in strata]
        low_Q[moves_Q], high_Q[moves_Q] = _interval(moving, confidence)
    columns = (value_Q, spread_Q / total, low_Q, high_Q)
    return tuple(Estimate(*map(float, row)) for row in zip(*columns, strict=True))


def difference(of: Sequence[Stratum], to: Sequence[Stratum]) -> tuple[Stratum, ...]:
    """``of`` minus ``to``, unit by unit: the strata whose estimate is the paired difference.

    Raises:
        ValueError: If the two were not measured on units of the same counts.
    """
    for ours, theirs in zip(of, to, strict=True):
        if not np.array_equal(ours.counts_U, theirs.counts_U):
            raise ValueError("a paired difference needs both models measured on the same units")
    return tuple(
        Stratum(ours.counts_U, ours.sums_QU - theirs.sums_QU)
        for ours, theirs in zip(of, to, strict=True)
    )


def exponential(found: Estimate) -> Estimate:
    """Exp of a mean: a perplexity from nats. The interval is exact, the error to first order."""
    value = float(np.exp(found.value))
    if found.stderr is None or found.low is None or found.high is None:
        return Estimate(value)
    low, high = (float(np.exp(end)) for end in (found.low, found.high))
    return Estimate(value, value * found.stderr, low, high)


def require_confidence(confidence: float) -> None:
    """Raise ValueError for a confidence of which there is no interval."""
    if not 0.5 <= confidence < 1:
        raise ValueError(
            f"confidence is {confidence:g}; it is a share from 0.5 to below 1, such as 0.95"
        )


def _spread(strata: Sequence[Stratum], value_Q: Array) -> Array:
    """The standard error of the summed quantities, [Q]; 0 where it is but rounding."""
    variance_Q = np.zeros_like(value_Q)
    for stratum in strata:
        rest_QU = stratum.sums_QU - value_Q[:, None] * stratum.counts_U
        rest_QU = rest_QU - rest_QU.mean(-1, keepdims=True)
        units = rest_QU.shape[-1]
        variance_Q += units / (units - 1) * (rest_QU**2).sum(-1)
    spread_Q = np.sqrt(variance_Q)
    size_Q = sum(np.abs(stratum.sums_QU).sum(-1) for stratum in strata)
    return np.where(spread_Q > ROUNDING * size_Q, spread_Q, 0)


def _interval(strata: Sequence[Stratum], confidence: float) -> tuple[Array, Array]:
    """The ends of the interval of each quantity, [Q] each."""

    def means(*drawn: NDArray[np.int64], axis: int) -> Array:
        """Means [Q, ...] of the units with the numbers [..., U] that were drawn in each stratum."""
        assert axis == -1
        pairs = list(zip(strata, drawn, strict=True))
        sums: Array = sum(stratum.sums_QU[:, units].sum(-1) for stratum, units in pairs)
        counts: Array = sum(stratum.counts_U[units].sum(-1) for stratum, units in pairs)
        return sums / counts

    numbers = [np.arange(len(stratum.counts_U)) for stratum in strata]
    largest = max(stratum.sums_QU.size for stratum in strata)
    found = bootstrap(
        numbers,
        means,
        n_resamples=DRAWS,
        batch=max(1, BATCH_NUMBERS // largest),
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="BCa",
        random_state=np.random.default_rng(SEED),
    )
    return found.confidence_interval.low, found.confidence_interval.high

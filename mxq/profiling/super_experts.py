"""Experts without which the model breaks, told by the size of their outputs.

Su et al. (arXiv 2507.23279) find a few experts in trained models whose down projection puts out
extreme values on some tokens. These feed the massive activations that attention leans on; without
3 of its 6144 experts a model of theirs is useless. The rule is the paper's (above the 99.5th
percentile of all experts and above a tenth of the largest maximum) and one more: the maximum stands
out from those of the same layer. A tenth of the largest is no outlier where all are alike, and
outputs grow with depth in many models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mxq.profiling.activation import SiteStats

SHARE = 0.005
"""Most of the experts that may be called so: those above the 99.5th percentile."""

AT_LEAST = 3
"""... or so many, where half a percent would be fewer."""

OF_LARGEST = 0.1
"""Least maximum of such an expert, as a share of the largest of all experts."""

TIMES = 10.0
"""Least maximum over the median of the layer's other experts.

Random models stay below 3, two small trained ones below 9 (benchmarks/LOG.md). A pin too many costs
a few bytes, one too few may cost the model, so there is no more room than that.
"""


@dataclass(frozen=True, slots=True)
class SuperExpert:
    """An expert by its name, and its maximum over the median of its layer's other experts."""

    name: str
    times: float


def find_super_experts(sites: Sequence[SiteStats]) -> tuple[SuperExpert, ...]:
    """The super experts of a profile, in the order of the model; experts without tokens are none.

    One that is alone in its layer, or has no mates with tokens, stands out from nothing.
    """
    reached = sorted((peak for site in sites for peak in site.down_max if peak > 0), reverse=True)
    if not reached:
        return ()
    allowed = max(AT_LEAST, int(SHARE * len(reached)))
    least = max(OF_LARGEST * reached[0], reached[min(allowed, len(reached)) - 1])
    return tuple(
        SuperExpert(f"{site.site}.{expert}", times)
        for site in sites
        for expert, peak in enumerate(site.down_max)
        if peak >= least and (times := _times(site.down_max, expert)) >= TIMES
    )


def _times(peaks: Sequence[float], expert: int) -> float:
    """A maximum over the median of the others that have one; 0 where there are none."""
    others = [peak for place, peak in enumerate(peaks) if place != expert and peak > 0]
    return peaks[expert] / median(others) if others else 0.0

"""The Lagrangian bound: prices on the rows under which the blocks decide alone.

For prices p >= 0 the value ``g(p) = sum_b min_s (loss + p . cost) - p . limit`` is a lower bound
of every feasible plan, and the best p gives the bound of the linear relaxation. g is concave with
kinks where a block changes its mind. For one row it is maximised by bisection. For several, the
minimum over the schemes is replaced by a soft minimum of temperature tau, which is smooth, and
Newton's method follows its maximum while tau goes to zero; the few blocks that are undecided at
temperature tau cost at most about tau each. Any p gives a valid bound, so nothing here can make a
result wrong, only loose.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from mxq.search.problem import Choice, Matrix
from mxq.search.rows import Row, System, part_of

_TEMPERATURES = tuple(4.0**-k for k in range(2, 9))
_NEWTON_STEPS = 30
_MOST_BOXES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Dual:
    """Prices [rows] and the bound that they prove."""

    prices: Matrix
    bound: float


@dataclass(frozen=True, slots=True, eq=False)
class _Smooth:
    """Soft-minimum value at some prices, its gradient and the negative of its Hessian.

    ``softness`` is by how much the value is below that of the hard minimum.
    """

    value: float
    softness: float
    slope: Matrix
    curvature: Matrix


def lower_bound(system: System, start: Matrix | None = None) -> Dual:
    """The best prices found and their bound; infinite if the rows contradict each other.

    ``start`` are prices believed to be near the best ones.
    """
    zero = np.zeros(len(system.rows))
    if start is None or len(zero) == 1 or not start.any():
        alone = np.array([_price_alone(system, i) for i in range(len(zero))])
        starts = [zero, *np.diag(alone), alone / 2] if len(zero) else [zero]
    else:
        starts = [start]
    best = max((Dual(prices, value(system, prices)) for prices in starts), key=lambda d: d.bound)
    if len(zero) > 1 and best.prices.any():
        best = _follow(system, best)
    return _ruled_out(system, best)


def _ruled_out(system: System, best: Dual) -> Dual:
    """The same, but infinite if no plan can lose as much as the bound: then there is no plan."""
    ceiling = np.where(np.isfinite(system.loss_SB), system.loss_SB, -np.inf).max(axis=0).sum()
    excess = best.bound - ceiling
    if excess > 1e-9 * (abs(ceiling) + abs(best.bound)):
        return Dual(best.prices, np.inf)
    return best


def value(system: System, prices: Matrix) -> float:
    """``g(prices)``."""
    return float(system.priced(prices).min(axis=0).sum() - prices @ system.limits)


def decide(system: System, prices: Matrix) -> Choice:
    """The scheme that each block takes at these prices."""
    choice: Choice = system.priced(prices).argmin(axis=0)
    return choice


def _price_alone(system: System, index: int) -> float:
    """The best price of one row if there were no others, by bisection of its activity."""
    row = system.rows[index]
    part = System(row.of_members(system.loss_SB), (Row(row.name, None, row.cost_SM, row.limit),))
    if part.is_feasible(decide(part, np.zeros(1))):
        return 0.0
    finite = part.loss_SB[np.isfinite(part.loss_SB)]
    low, high = 0.0, float(np.ptp(finite)) or 1.0
    for _ in range(100):  # 8^100 is far above any useful price, and still a number
        if part.is_feasible(decide(part, np.array([high]))):
            break
        low, high = high, high * 8
    if low == 0:
        low = _halve_down(part, high)
    for _ in range(50):
        middle = float(np.sqrt(low * high))
        if part.is_feasible(decide(part, np.array([middle]))):
            high = middle
        else:
            low = middle
    return max((low, high), key=lambda price: value(part, np.array([price])))


def _halve_down(part: System, high: float) -> float:
    low = high
    for _ in range(200):
        low /= 8
        if not part.is_feasible(decide(part, np.array([low]))):
            break
    return low


def _follow(system: System, best: Dual) -> Dual:
    """Newton's method on the soft minimum while the temperature falls."""
    prices = best.prices
    together = [(i, j) for i, j, *_ in _overlaps(system, None)]
    blocks = system.loss_SB.shape[1]
    for temperature in _TEMPERATURES:
        # Limits are near 1, so the sum of prices is about what all blocks together pay.
        tau = temperature * float(prices.sum()) / blocks
        for box_number in range(_MOST_BOXES):
            if tau <= 0:
                return best
            # Prices that ran against the side of their box get a larger one.
            centre, reach = prices, _reach(prices, temperature) * 2.0**box_number
            part = _undecided(system, prices, reach, tau)
            box = (np.maximum(centre - reach, 0.0), centre + reach)
            prices = _newton(part, prices, tau, _Inside(box, _overlaps(part, together)))
            if (np.abs(prices - centre) < 0.9 * reach).all():
                break
        bound = value(system, prices)
        if bound > best.bound:
            best = Dual(prices, bound)
    return best


def _reach(prices: Matrix, temperature: float) -> Matrix:
    """How far prices may move before the undecided blocks are looked up anew."""
    reach: Matrix = min(0.5, 8 * temperature) * np.maximum(prices, 0.05 * prices.max())
    return reach


def _undecided(system: System, prices: Matrix, reach: Matrix, tau: float) -> System:
    """The part of the blocks whose choice depends on prices within reach; few, near the end."""
    priced_SB = system.priced(prices)
    chosen = priced_SB.argmin(axis=0)
    margin_SB = priced_SB - priced_SB.min(axis=0)
    for row, distance in zip(system.rows, reach, strict=True):
        mine = row.of_members(chosen)
        change_SM = np.abs(row.cost_SM - row.cost_SM[mine, np.arange(len(mine))])
        margin_SB[:, slice(None) if row.members is None else row.members] -= distance * change_SM
    margin_SB[chosen, np.arange(len(chosen))] = np.inf
    # Beyond 40 temperatures the share of a scheme is below 1e-17.
    return part_of(system, margin_SB.min(axis=0) < 40 * tau, chosen)[0]


_Overlap = tuple[int, int, Choice | None, Choice | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Inside:
    """Lowest and highest prices allowed, and the rows that share blocks."""

    box: tuple[Matrix, Matrix]
    pairs: list[_Overlap]


def _overlaps(system: System, together: list[tuple[int, int]] | None) -> list[_Overlap]:
    """Pairs of rows that share blocks, with the positions of those among each row's members.

    ``together`` are the only pairs that need to be looked at, if that is known.
    """
    pairs: list[_Overlap] = []
    if together is None:
        together = list(combinations_with_replacement(range(len(system.rows)), 2))
    for i, j in together:
        first, second = system.rows[i].members, system.rows[j].members
        if i == j or (first is None and second is None):
            pairs.append((i, j, None, None))
        elif first is None:
            pairs.append((i, j, second, None))
        elif second is not None:
            _, left, right = np.intersect1d(first, second, assume_unique=True, return_indices=True)
            if left.size:
                pairs.append((i, j, left, right))
    return pairs


def _smooth(system: System, prices: Matrix, tau: float, pairs: list[_Overlap]) -> _Smooth:
    priced_SB = system.priced(prices)
    lowest_B = priced_SB.min(axis=0)
    weight_SB = np.exp((lowest_B - priced_SB) / tau)
    total_B = weight_SB.sum(axis=0)
    share_SB = weight_SB / total_B
    softness = tau * float(np.log(total_B).sum())
    result = float(lowest_B.sum() - prices @ system.limits) - softness
    shares = [row.of_members(share_SB) for row in system.rows]
    means = [(s * row.cost_SM).sum(axis=0) for s, row in zip(shares, system.rows, strict=True)]
    curvature = np.zeros((len(prices), len(prices)))
    for i, j, left, right in pairs:
        covariance = _covariance(
            _at(shares[i], left),
            (_at(system.rows[i].cost_SM, left), _at(system.rows[j].cost_SM, right)),
            (_at(means[i], left), _at(means[j], right)),
        )
        curvature[i, j] = curvature[j, i] = covariance / tau
    return _Smooth(
        result, softness, np.array([mean.sum() for mean in means]) - system.limits, curvature
    )


def _at(values: Matrix, positions: Choice | None) -> Matrix:
    return values if positions is None else values[..., positions]


def _covariance(share: Matrix, costs: tuple[Matrix, Matrix], means: tuple[Matrix, Matrix]) -> float:
    product = np.einsum("sb,sb,sb->", share, costs[0], costs[1])
    return float(product - means[0] @ means[1])


def _newton(system: System, prices: Matrix, tau: float, inside: _Inside) -> Matrix:
    here = _smooth(system, prices, tau, inside.pairs)
    for _ in range(_NEWTON_STEPS):
        step = _step(prices, here, inside.box)
        if here.slope @ step < 1e-3 * (here.softness + tau):
            break
        for halvings in range(12):
            there_prices = np.clip(prices + step * 0.5**halvings, *inside.box)
            there = _smooth(system, there_prices, tau, inside.pairs)
            if there.value >= here.value + 1e-4 * float(here.slope @ (there_prices - prices)):
                break
        else:
            break
        prices, here = there_prices, there
    return prices


def _step(prices: Matrix, here: _Smooth, box: tuple[Matrix, Matrix]) -> Matrix:
    """Newton direction over the prices that may move."""
    free = ((prices > box[0]) | (here.slope > 0)) & ((prices < box[1]) | (here.slope < 0))
    curvature = here.curvature[np.ix_(free, free)]
    # Only keeps the matrix regular where a row decides nothing; Newton's step is clipped anyway.
    ridge = 1e-12 * float(np.trace(curvature)) + 1e-300
    step = np.zeros_like(prices)
    step[free] = np.linalg.solve(curvature + ridge * np.eye(len(curvature)), here.slope[free])
    largest = float(np.abs(step).max(initial=0.0))
    return step * min(1.0, 2 * float((box[1] - box[0]).max()) / max(largest, 1e-300))

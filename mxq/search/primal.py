"""Feasible plans near given prices: repair what the blocks decide alone, then improve it.

Every step is a batch of moves (one block takes another scheme), found by sorting all moves at
once, so the work does not depend on how many moves are needed.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mxq.search.problem import Choice, Matrix
from mxq.search.rows import Row, System

_ROUNDS = 300
_SWAP_MOVES = 300
_SWAPS = 40


def repair(system: System, choice: Choice, prices: Matrix) -> Choice | None:
    """The choice after moves that undo the excess of its rows at least cost; None if stuck."""
    for _ in range(_ROUNDS):
        excess = system.excess(choice)
        if not excess.any():
            return choice
        gain_SB = _gain(system, choice, excess)
        # What a move costs beyond its prices, for each unit of excess that it undoes.
        dearer_SB = _rise(system.priced(prices), choice)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_SB = np.where(gain_SB > 0, dearer_SB / gain_SB, np.inf)
        moves = _best_of_each_block(ratio_SB)
        if moves is None:
            return None
        choice = _moved(choice, moves, _until_row_turns(system, choice, moves))
    return None


def improve(system: System, choice: Choice, prices: Matrix) -> Choice:
    """A feasible choice after all single moves, then pairs of moves, that lower its loss."""
    for _ in range(_SWAPS):
        choice = _fill(system, choice, prices)
        swapped = _swap(system, choice, prices)
        if swapped is None:
            return choice
        choice = swapped
    return choice


def _gain(system: System, choice: Choice, excess: Matrix) -> Matrix:
    """By how much each move alone lowers the sum of the excess."""
    gain_SB = np.zeros_like(system.loss_SB)
    slack = system.limits - system.activity(choice)
    for row, over, left in zip(system.rows, excess, slack, strict=True):
        rise_SM = _row_rise(row, choice)
        change_SM = np.maximum(over + rise_SM, 0) - over if over else np.maximum(rise_SM - left, 0)
        if row.members is None:
            gain_SB -= change_SM
        else:
            gain_SB[:, row.members] -= change_SM
    return np.where(np.isfinite(system.loss_SB), gain_SB, 0.0)


def _rise(values_SB: Matrix, choice: Choice) -> Matrix:
    return values_SB - values_SB[choice, np.arange(len(choice))]


def _row_rise(row: Row, choice: Choice) -> Matrix:
    return _rise(row.cost_SM, choice if row.members is None else choice[row.members])


_Moves = tuple[Choice, Choice]
"""Block and new scheme of each move, in the order in which to take them."""


def _best_of_each_block(score_SB: Matrix) -> _Moves | None:
    schemes = score_SB.argmin(axis=0)
    scores = score_SB[schemes, np.arange(len(schemes))]
    blocks = np.flatnonzero(np.isfinite(scores))
    if not blocks.size:
        return None
    blocks = blocks[np.argsort(scores[blocks], kind="stable")]
    return blocks, schemes[blocks]


def _moved(choice: Choice, moves: _Moves, count: int) -> Choice:
    moved = choice.copy()
    moved[moves[0][:count]] = moves[1][:count]
    return moved


def _rises(system: System, choice: Choice, moves: _Moves) -> Iterator[tuple[float, Matrix]]:
    """For each row its slack now, and by how much each move raises it."""
    blocks, schemes = moves
    for row, slack in zip(system.rows, system.limits - system.activity(choice), strict=True):
        rise = np.zeros(len(blocks))
        position, inside = _positions(row, blocks, len(choice))
        chosen = choice[blocks[inside]]
        rise[inside] = row.cost_SM[schemes[inside], position] - row.cost_SM[chosen, position]
        yield float(slack), rise


def _positions(row: Row, blocks: Choice, count: int) -> tuple[Choice, NDArray[np.bool_]]:
    """Where the blocks lie among the members of a row, and which are members."""
    if row.members is None:
        return blocks, np.ones(len(blocks), dtype=np.bool_)
    where = np.full(count, -1)
    where[row.members] = np.arange(len(row.members))
    position = where[blocks]
    return position[position >= 0], position >= 0


def _until_row_turns(system: System, choice: Choice, moves: _Moves) -> int:
    """Number of moves until the first row that is not met is met, or the other way round."""
    count = len(moves[0])
    for slack, rise in _rises(system, choice, moves):
        after = slack - np.cumsum(rise)
        turned = after >= 0 if slack < 0 else after < 0
        if turned.any():
            count = min(count, int(turned.argmax()) + 1)
    return count


def _fill(system: System, choice: Choice, prices: Matrix) -> Choice:
    """Take single moves that lower the loss while they fit, the most efficient first."""
    weights = prices if prices.any() else np.ones_like(prices)
    tiny = 1e-9 * float(weights.sum()) / max(len(choice), 1) if weights.size else 1.0
    for _ in range(_ROUNDS):
        drop_SB = _rise(system.loss_SB, choice)
        score_SB = np.where((drop_SB < 0) & _fits(system, choice), drop_SB, np.inf)
        blocks = np.flatnonzero(np.isfinite(score_SB).any(axis=0))
        if not blocks.size:
            break
        paid_SB = _rise(system.paid(weights), choice)[:, blocks]
        # Loss saved for each unit of what the move pays; free moves come first.
        score_SB = score_SB[:, blocks]
        score_SB = np.where(np.isfinite(score_SB), score_SB / np.maximum(paid_SB, tiny), np.inf)
        moves = _best_of_each_block(score_SB)
        if moves is None:
            break
        moves = (blocks[moves[0]], moves[1])
        choice = _moved(choice, moves, max(1, _while_feasible(system, choice, moves)))
    return choice


def _fits(system: System, choice: Choice) -> NDArray[np.bool_]:
    fits_SB = np.isfinite(system.loss_SB)
    for row, slack in zip(system.rows, system.limits - system.activity(choice), strict=True):
        fits_SM = _row_rise(row, choice) <= slack
        if row.members is None:
            fits_SB &= fits_SM
        else:
            fits_SB[:, row.members] &= fits_SM
    return fits_SB


def _while_feasible(system: System, choice: Choice, moves: _Moves) -> int:
    count = len(moves[0])
    for slack, rise in _rises(system, choice, moves):
        over = np.cumsum(rise) > slack
        if over.any():
            count = min(count, int(over.argmax()))
    return count


def _swap(system: System, choice: Choice, prices: Matrix) -> Choice | None:
    """The best pair of moves that lowers the loss, among those that the prices like best."""
    dearer_SB = _rise(system.priced(prices), choice)
    dearer_SB[choice, np.arange(len(choice))] = np.inf
    count = min(_SWAP_MOVES, dearer_SB.size) - 1
    order = np.argpartition(dearer_SB, count, axis=None)[: count + 1]
    order = order[np.isfinite(dearer_SB.ravel()[order])]
    schemes, blocks = np.unravel_index(order, dearer_SB.shape)
    drop = system.loss_SB[schemes, blocks] - system.loss_SB[choice[blocks], blocks]
    pair = drop[:, None] + drop[None, :]
    allowed = (blocks[:, None] != blocks[None, :]) & (pair < -1e-12 * np.abs(drop).max(initial=0))
    for slack, rise in _rises(system, choice, (blocks, schemes)):
        allowed &= rise[:, None] + rise[None, :] <= slack
    if not allowed.any():
        return None
    first, second = np.unravel_index(np.where(allowed, pair, np.inf).argmin(), pair.shape)
    both = [int(first), int(second)]
    swapped = _moved(choice, (blocks[both], schemes[both]), 2)
    return swapped if system.is_feasible(swapped) else None

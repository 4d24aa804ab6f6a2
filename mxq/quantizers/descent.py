"""Coordinate descent over the codes and scales of a weight, column after column.

The error is ``sum((Q - W) H * G (Q - W))``: H are the second moments of the inputs, G those of the
gradients at the outputs, or the identity where all outputs count the same. A column is rounded
again while all others stay, as in QuantEase (arXiv 2309.01885), and the scale of each group is
fitted again to its codes. No step makes the error larger, but for the rounding of scales to
float16.

With G the rows of a column are no longer apart: an error in one makes up for that of another. They
are changed together as far as they agree, and the rest has its turn in the next sweep.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mxq.numerics import SCALE_MAX, SCALE_MIN, QuantizedWeight, zero_points
from mxq.quantizers.gptq import COLUMN_BLOCK

TURNS = 6
"""How often rows at odds are halved; with six of 2^6 such rows one changes."""


class Descent:
    """The state of a descent; columns lead in memory, so that one is read and written as a whole.

    ``steps_BKN`` are codes less their zero point, which stay as they are. ``slope_BKN`` is
    ``H (Q - W) G``.
    """

    def __init__(
        self,
        w_BNK: Tensor,
        q: QuantizedWeight,
        hessian_BKK: Tensor,
        outer_BNN: Tensor | None = None,
    ) -> None:
        assert q.scale_NG is not None
        self.scheme, self.zero_NG = q.scheme, q.zero_NG
        self.hessian_BKK, self.outer_BNN = hessian_BKK, outer_BNN
        self.power_BK = hessian_BKK.diagonal(dim1=-2, dim2=-1)
        self.weight_BN = w_BNK.new_ones(w_BNK.shape[:2])
        if outer_BNN is not None:
            self.weight_BN = outer_BNN.diagonal(dim1=-2, dim2=-1)
        self.top = 2**q.scheme.w_bits - 1
        self.scale_BGN = q.scale_NG.to(torch.float32).mT.contiguous()
        self.zero_BGN = zero_points(q).mT.contiguous()
        self.group = w_BNK.shape[-1] // self.scale_BGN.shape[1]
        self.steps_BKN = q.codes_NK.mT.to(torch.float32) - self._of_columns(self.zero_BGN)
        error_BKN = self.steps_BKN * self._of_columns(self.scale_BGN) - w_BNK.mT
        self.slope_BKN = self._spread(hessian_BKK @ error_BKN)
        self.sweeps = 0

    def sweep(self) -> None:
        """Every group once: its scale, then its columns."""
        for group in range(self.scale_BGN.shape[1]):
            start, stop = group * self.group, (group + 1) * self.group
            before_BCN = self.steps_BKN[:, start:stop] * self.scale_BGN[:, group, None]
            self._fit_scale(group)
            for first in range(start, stop, COLUMN_BLOCK):
                self._round(group, first, min(first + COLUMN_BLOCK, stop))
            after_BCN = self.steps_BKN[:, start:stop] * self.scale_BGN[:, group, None]
            changes_BCN = self._spread(after_BCN - before_BCN)
            # Columns of the group know of each other already.
            for others in (slice(start), slice(stop, None)):
                rows_BKC = self.hessian_BKK[:, others, start:stop]
                self.slope_BKN[:, others] += rows_BKC @ changes_BCN
        self.sweeps += 1

    def result(self) -> QuantizedWeight:
        """The weight as it is now."""
        codes_BKN = (self.steps_BKN + self._of_columns(self.zero_BGN)).to(torch.uint8)
        scale_BNG = self.scale_BGN.mT.half().contiguous()
        return QuantizedWeight(codes_BKN.mT.contiguous(), scale_BNG, self.zero_NG, self.scheme)

    def _fit_scale(self, group: int) -> None:
        """The scale that fits a group's codes best while all else stays."""
        part = slice(group * self.group, (group + 1) * self.group)
        steps_BCN = self.steps_BKN[:, part]
        curved_BCN = self.hessian_BKK[:, part, part] @ steps_BCN
        norm_BN = (steps_BCN * curved_BCN).sum(1) * self.weight_BN
        excess_BN = (steps_BCN * self.slope_BKN[:, part]).sum(1) / norm_BN.clamp(min=1e-30)
        old_BN = self.scale_BGN[:, group].clone()
        # A scale is positive: codes that would fit better with the other sign keep theirs.
        may_BN = (norm_BN > 0) & (old_BN > excess_BN)
        excess_BN = torch.where(may_BN, excess_BN, torch.zeros_like(excess_BN))
        if self.outer_BNN is not None:
            excess_BN = excess_BN * self._share(excess_BN, steps_BCN, curved_BCN, part)
        new_BN = (old_BN - excess_BN).clamp(SCALE_MIN, SCALE_MAX).half().float()
        self.scale_BGN[:, group] = new_BN
        self.slope_BKN[:, part] += self._spread(curved_BCN * (new_BN - old_BN)[:, None])

    def _share(
        self, excess_BN: Tensor, steps_BCN: Tensor, curved_BCN: Tensor, part: slice
    ) -> Tensor:
        """How far to go where every row's scale changes as if it did alone, [B, 1], 0 to 1."""
        change_BCN = -excess_BN[:, None] * steps_BCN
        curve_BCN = self._spread(-excess_BN[:, None] * curved_BCN)
        gain_B = -(change_BCN * self.slope_BKN[:, part]).sum((1, 2))
        share_B = gain_B / (change_BCN * curve_BCN).sum((1, 2)).clamp(min=1e-30)
        return share_B.clamp(0, 1)[:, None]

    def _round(self, group: int, start: int, stop: int) -> None:
        """Round some columns of a group again, one after the other; tell the group."""
        scale_BN, zero_BN = self.scale_BGN[:, group], self.zero_BGN[:, group]
        slope_BCN = self.slope_BKN[:, start:stop].clone()
        block_BCC = self.hessian_BKK[:, start:stop, start:stop]
        changes_BCN = torch.empty_like(slope_BCN)
        for place in range(stop - start):
            column = _Column(
                self.steps_BKN[:, start + place],
                slope_BCN[:, place],
                scale_BN,
                self.weight_BN * self.power_BK[:, start + place, None],
                -zero_BN,
                self.top - zero_BN,
            )
            if self.outer_BNN is None:
                best_BN = column.alone()
            else:
                power_B1 = self.power_BK[:, start + place, None]
                best_BN = column.together(self.outer_BNN, power_B1, start + place + self.sweeps)
            change_BN = (best_BN - column.steps_BN) * scale_BN
            changes_BCN[:, place] = self._spread(change_BN[:, None])[:, 0]
            self.steps_BKN[:, start + place] = best_BN
            slope_BCN[:, place:] += block_BCC[:, place:, place, None] * changes_BCN[:, place, None]
        own = slice(group * self.group, (group + 1) * self.group)
        self.slope_BKN[:, own] += self.hessian_BKK[:, own, start:stop] @ changes_BCN

    def _spread(self, changes_BCN: Tensor) -> Tensor:
        """What a change of some rows does to the slope of all of them."""
        return changes_BCN if self.outer_BNN is None else changes_BCN @ self.outer_BNN

    def _of_columns(self, grid_BGN: Tensor) -> Tensor:
        """Values of groups, repeated for each of their columns."""
        return grid_BGN.repeat_interleave(self.group, 1)


@dataclass(frozen=True, slots=True)
class _Column:
    """One column while all others stay; ``curve_BN`` is how its slope grows with its weights."""

    steps_BN: Tensor
    slope_BN: Tensor
    scale_BN: Tensor
    curve_BN: Tensor
    low_BN: Tensor
    high_BN: Tensor

    def alone(self, more_BN: Tensor | float = 0.0) -> Tensor:
        """Best steps of each row if no other changed and its slope was so much larger."""
        best_BN = self.steps_BN - (self.slope_BN + more_BN) / (self.scale_BN * self.curve_BN)
        return torch.minimum(torch.maximum(best_BN.round_(), self.low_BN), self.high_BN)

    def together(self, outer_BNN: Tensor, power_B1: Tensor, first: int) -> Tensor:
        """Steps of all rows that lose less when all of them are taken.

        Rows for which what others do makes another step the best give up, half of them in each
        turn; ``first`` says which, so that it is not always the same. Where the rest of a matrix
        together would still lose, none of its rows changes.
        """
        best_BN = self.alone()
        order_N = torch.arange(best_BN.shape[1], device=best_BN.device) + first
        for turn in range(TURNS):
            change_BN = (best_BN - self.steps_BN) * self.scale_BN
            others_BN = power_B1 * _times(change_BN, outer_BNN) - self.curve_BN * change_BN
            gives_up_BN = (self.alone(others_BN) != best_BN) & ((order_N >> turn) % 2 == 0)
            best_BN = torch.where(gives_up_BN, self.steps_BN, best_BN)
        change_BN = (best_BN - self.steps_BN) * self.scale_BN
        slope_BN = 2 * self.slope_BN + power_B1 * _times(change_BN, outer_BNN)
        pays_B1 = (change_BN * slope_BN).sum(-1, keepdim=True) < 0
        return torch.where(pays_B1, best_BN, self.steps_BN)


def _times(x_BN: Tensor, outer_BNN: Tensor) -> Tensor:
    return (x_BN[:, None] @ outer_BNN)[:, 0]

"""Codes and scales that GPTQ has chosen, refined by coordinate descent.

GPTQ rounds each column once and never looks back, on scales that were found before. Here columns
are rounded again, each while all others stay (as in QuantEase, arXiv 2309.01885), and the scale of
each group is fitted again to its codes under the whole matrix of second moments. The error
``sum((Q - W) H * (Q - W))`` falls with every step, but for the rounding of scales to float16.
"""

import torch
from torch import Tensor

from mxq.numerics import SCALE_MAX, SCALE_MIN, QuantizedWeight, zero_points
from mxq.quantizers.gptq import COLUMN_BLOCK, quantize_gptq
from mxq.scheme import Scheme

SWEEPS = 4
"""Passes over all columns."""

DAMPING = 0.05
"""Share of the mean second moment that is added to the diagonal, so that noise is not fitted."""


def quantize_refined(
    w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor | None = None
) -> QuantizedWeight:
    """GPTQ, then ``refine``. Without a Hessian, and for float formats, round to nearest.

    Raises:
        ValueError: If the group size does not divide K, or the Hessian is not finite.
    """
    q = quantize_gptq(w_NK, scheme, hessian_KK)
    if hessian_KK is None or scheme.kind != "int":
        return q
    return refine(w_NK, q, hessian_KK)


def refine(w_NK: Tensor, q: QuantizedWeight, hessian_KK: Tensor) -> QuantizedWeight:
    """Codes and scales near those of ``q`` that lose less under the second moments of the inputs.

    ``w_NK`` is what ``q``, of an integer scheme, stands for. Zero points stay as they are.
    """
    if w_NK.dim() == 2:
        return refine(w_NK[None], q[None], hessian_KK[None])[0]
    descent = _Descent(w_NK.to(torch.float32), q, hessian_KK.to(torch.float32))
    for _ in range(SWEEPS):
        descent.sweep()
    return descent.result()


class _Descent:
    """The state of a descent; columns lead in memory, so that one is read and written as a whole.

    ``steps_BKN`` are codes less their zero point, ``slope_BKN`` is ``H (Q - W)``.
    """

    def __init__(self, w_BNK: Tensor, q: QuantizedWeight, hessian_BKK: Tensor) -> None:
        assert q.scale_NG is not None
        self.scheme, self.zero_NG = q.scheme, q.zero_NG
        mean_B = hessian_BKK.diagonal(dim1=-2, dim2=-1).mean(-1)
        mean_B = torch.where(mean_B > 0, mean_B, torch.ones_like(mean_B))
        self.hessian_BKK = hessian_BKK.clone()
        self.hessian_BKK.diagonal(dim1=-2, dim2=-1).add_(DAMPING * mean_B[:, None])
        self.diagonal_BK = self.hessian_BKK.diagonal(dim1=-2, dim2=-1)
        self.top = 2**q.scheme.w_bits - 1
        self.scale_BGN = q.scale_NG.to(torch.float32).mT.contiguous()
        self.zero_BGN = zero_points(q).mT.contiguous()
        self.group = w_BNK.shape[-1] // self.scale_BGN.shape[1]
        self.steps_BKN = q.codes_NK.mT.to(torch.float32) - self._of_columns(self.zero_BGN)
        error_BKN = self.steps_BKN * self._of_columns(self.scale_BGN) - w_BNK.mT
        self.slope_BKN = self.hessian_BKK @ error_BKN

    def sweep(self) -> None:
        """Every group once: its scale, then its columns."""
        for group in range(self.scale_BGN.shape[1]):
            start, stop = group * self.group, (group + 1) * self.group
            before_BCN = self.steps_BKN[:, start:stop] * self.scale_BGN[:, group, None]
            self._fit_scale(group)
            for first in range(start, stop, COLUMN_BLOCK):
                self._round(group, first, min(first + COLUMN_BLOCK, stop))
            after_BCN = self.steps_BKN[:, start:stop] * self.scale_BGN[:, group, None]
            # Columns of the group know of each other already.
            for others in (slice(start), slice(stop, None)):
                rows_BKC = self.hessian_BKK[:, others, start:stop]
                self.slope_BKN[:, others] += rows_BKC @ (after_BCN - before_BCN)

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
        norm_BN = (steps_BCN * curved_BCN).sum(1)
        excess_BN = (steps_BCN * self.slope_BKN[:, part]).sum(1) / norm_BN.clamp(min=1e-30)
        old_BN = self.scale_BGN[:, group].clone()
        new_BN = (old_BN - excess_BN).clamp(SCALE_MIN, SCALE_MAX).half().float()
        # A scale is positive: codes that would fit better with the other sign keep theirs.
        new_BN = torch.where((norm_BN > 0) & (old_BN > excess_BN), new_BN, old_BN)
        self.scale_BGN[:, group] = new_BN
        self.slope_BKN[:, part] += curved_BCN * (new_BN - old_BN)[:, None]

    def _round(self, group: int, start: int, stop: int) -> None:
        """Round some columns of a group again, one after the other; tell the group."""
        scale_BN, zero_BN = self.scale_BGN[:, group], self.zero_BGN[:, group]
        low_BN, high_BN = -zero_BN, self.top - zero_BN
        slope_BCN = self.slope_BKN[:, start:stop].clone()
        block_BCC = self.hessian_BKK[:, start:stop, start:stop]
        changes_BCN = torch.empty_like(slope_BCN)
        for place in range(stop - start):
            steps_BN = self.steps_BKN[:, start + place]
            curve_BN = scale_BN * self.diagonal_BK[:, start + place, None]
            best_BN = (steps_BN - slope_BCN[:, place] / curve_BN).round_()
            best_BN = torch.minimum(torch.maximum(best_BN, low_BN), high_BN)
            changes_BCN[:, place] = (best_BN - steps_BN) * scale_BN
            self.steps_BKN[:, start + place] = best_BN
            slope_BCN[:, place:] += block_BCC[:, place:, place, None] * changes_BCN[:, place, None]
        own = slice(group * self.group, (group + 1) * self.group)
        self.slope_BKN[:, own] += self.hessian_BKK[:, own, start:stop] @ changes_BCN

    def _of_columns(self, grid_BGN: Tensor) -> Tensor:
        """Values of groups, repeated for each of their columns."""
        return grid_BGN.repeat_interleave(self.group, 1)

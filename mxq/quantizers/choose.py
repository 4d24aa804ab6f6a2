"""Quantize blocks of one shape together and keep, for each, what does best on held-out inputs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mxq.blocks import LinearBlock, piece_sizes, row_pieces
from mxq.numerics import (
    QuantizedWeight,
    check_finite,
    check_groups,
    dequantize,
    fake_quantize_input,
    rotate,
    unrotate,
)
from mxq.quantizers.gptq import Columns, gptq_on_grid, make_columns, quantize_gptq, take
from mxq.quantizers.kronecker import quantize_kronecker, refine_kronecker
from mxq.quantizers.method import Method
from mxq.quantizers.moments import isotropic, own_share, rotate_moments, second_moments, shrink
from mxq.quantizers.refine import quantize_refined, refine
from mxq.quantizers.rtn import find_grid, quantize_rtn, rtn_on_grid
from mxq.quantizers.target import DAMPING, STREAM_DAMPING, Deviation, regress, trusted_share
from mxq.scheme import Scheme

MIN_HELDOUT_ROWS = 8
"""Below this many held-out tokens a block is judged on the tokens it was fitted to."""

BATCH_BYTES = 512 * 2**20
"""Memory for the weights and Hessians of blocks that are quantized together."""


@dataclass(frozen=True)
class BatchInputs:
    """What is known of the inputs of several blocks; projections that read the same share it.

    ``hessian_BKK`` are second moments; ``judges`` are, for each block, the inputs and squared
    routing weights on which quantizers are compared. ``shift_BKK``, in the unrotated frame, says
    how the original model's inputs differ (``mxq.quantizers.target``), and ``lack_BNK`` what
    the weights are to put out besides. ``part_of`` names the larger batch, and the places in it, of
    which this is a part.
    """

    hessian_BKK: Tensor
    judges: tuple[tuple[Tensor, Tensor], ...]
    rotated: bool = False
    shift_BKK: Tensor | None = None
    lack_BNK: Tensor | None = None
    part_of: "tuple[BatchInputs, list[int]] | None" = None

    @cached_property
    def columns(self) -> Columns:
        """What GPTQ needs of them."""
        if self.part_of is None:
            return make_columns(self.hessian_BKK)
        whole, places = self.part_of
        return whole.columns[places]

    @cached_property
    def turned(self) -> "BatchInputs":
        """The same inputs rotated."""
        judges = tuple((rotate(x_TK), weight_T) for x_TK, weight_T in self.judges)
        turned_BKK = rotate_moments(self.hessian_BKK)
        return replace(self, hessian_BKK=turned_BKK, judges=judges, rotated=True, part_of=None)

    def select(self, places: list[int]) -> "BatchInputs":
        """Those of some of the blocks."""
        if places == list(range(len(self.judges))):
            return self
        judges = tuple(self.judges[place] for place in places)
        hessian_BKK = take(self.hessian_BKK, places)
        shift_BKK = None if self.shift_BKK is None else take(self.shift_BKK, places)
        lack_BNK = None if self.lack_BNK is None else take(self.lack_BNK, places)
        part_of = self, places
        return BatchInputs(hessian_BKK, judges, self.rotated, shift_BKK, lack_BNK, part_of)


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """Blocks of one shape with their inputs: weights [B, N, K], rotated where the inputs are.

    ``w_BNK`` are the weights to come near to, ``plain_BNK`` those of the model. ``outer`` are
    second moments of the gradients at the outputs, [B, n, n] for each of their ``row_pieces``; None
    where all outputs count the same.
    """

    names: tuple[str, ...]
    w_BNK: Tensor
    inputs: BatchInputs
    plain_BNK: Tensor
    outer: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One block in one scheme. ``weight`` is in the rotated frame where the batch is."""

    block: str
    weight: QuantizedWeight
    quantizer: str
    rotated: bool

    def dense(self) -> Tensor:
        """The weight [N, K] that acts on an unrotated input."""
        w_NK = dequantize(self.weight)
        return unrotate(w_NK) if self.rotated else w_NK

    def output(self, x_TK: Tensor) -> Tensor:
        """``W_s x`` without bias, inputs rounded as the scheme says."""
        if self.weight.scheme.a_bits == 16:
            return x_TK.to(torch.float32) @ self.dense().T
        x_TK = rotate(x_TK) if self.rotated else x_TK
        rounded = fake_quantize_input(x_TK.to(torch.float32), self.weight.scheme)
        return rounded @ dequantize(self.weight).T


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """Inputs of one block, or of several that read the same; ``fit_rows`` come first.

    ``origin_TK`` is what the original model has in their place, None to fit to these alone.
    ``lack`` is what the block is to put out besides, None where it has only its own part.
    """

    name: str
    x_TK: Tensor
    gate_T: Tensor
    fit_rows: int
    origin_TK: Tensor | None = None
    lack: Deviation | None = None


def quantizing_bytes(block: LinearBlock, *, with_gradients: bool = False) -> int:
    """Memory to quantize a block.

    Its weights, what they lack, and their copies while they are rounded; Hessian and factor of its
    inputs as they are and rotated, what a factor is made of, and how the original's inputs differ.
    With gradients also their moments: of two projections that read the same, those in hand, and
    these damped.
    """
    outer = sum(rows**2 for rows in piece_sizes(block.out_features)) if with_gradients else 0
    return 4 * (11 * block.weights + 9 * block.in_features**2 + 4 * outer)


def expert_chunks(
    blocks: Sequence[LinearBlock], *, with_gradients: bool = False
) -> Iterator[list[int]]:
    """Experts of a site in groups whose weights and moments fit in BATCH_BYTES."""
    experts = sorted({block.expert for block in blocks if block.expert is not None})
    largest = max(quantizing_bytes(block, with_gradients=with_gradients) for block in blocks)
    step = max(1, BATCH_BYTES // largest)
    for start in range(0, len(experts), step):
        yield experts[start : start + step]


def make_inputs(blocks: Sequence[BlockInputs], prior_KK: Tensor | None) -> BatchInputs:
    """Shrunk second moments and judges of the inputs of blocks of one width.

    The prior is the mean over a layer's tokens where the blocks share an input space; None (each
    expert's inner activation is a space of its own) shrinks to a multiple of the identity.
    Second moments are weighted by the squared routing weight, as the block's output is.

    Raises:
        ValueError: If an input is NaN or infinite; names the block.
    """
    hessians, judges, shifts, lacks = [], [], [], []
    for block in blocks:
        check_finite(block.x_TK, f"inputs of {block.name}")
        weight_T = block.gate_T.to(torch.float32).square()
        own = second_moments(block.x_TK[: block.fit_rows], weight_T[: block.fit_rows])
        prior = isotropic(own) if prior_KK is None else prior_KK
        hessians.append(shrink(own, block.fit_rows, prior))
        if block.origin_TK is not None:
            check_finite(block.origin_TK, f"inputs of {block.name} in the original model")
            shift = Deviation(block.x_TK, block.origin_TK)
            shifts.append(_regressed(block, shift, weight_T, hessians[-1], DAMPING))
        if block.lack is not None:
            lacks.append(_regressed(block, block.lack, weight_T, hessians[-1], STREAM_DAMPING))
        start = block.fit_rows if _has_heldout(block) else 0
        judges.append((block.x_TK[start:].to(torch.float32), weight_T[start:]))
    shift_BKK = torch.stack(shifts) if shifts else None
    lack_BNK = torch.stack(lacks) if lacks else None
    return BatchInputs(torch.stack(hessians), tuple(judges), shift_BKK=shift_BKK, lack_BNK=lack_BNK)


def _has_heldout(block: BlockInputs) -> bool:
    return len(block.x_TK) - block.fit_rows >= MIN_HELDOUT_ROWS


def _regressed(
    block: BlockInputs, wanted: Deviation, weight_T: Tensor, hessian_KK: Tensor, damping: float
) -> Tensor:
    """What the block's inputs say of a deviation, as far as held-out tokens confirm it, [N, K]."""
    fit, held = slice(block.fit_rows), slice(block.fit_rows, None)
    if not _has_heldout(block):
        return hessian_KK.new_zeros(wanted.now_TN.shape[1], len(hessian_KK))
    share, own = own_share(block.fit_rows, len(hessian_KK)), wanted.select(fit)
    found_NK = regress(block.x_TK[fit], own, weight_T[fit], hessian_KK, share, damping)
    trusted = trusted_share(found_NK, block.x_TK[held], wanted.select(held), weight_T[held])
    return found_NK * trusted


def make_batch(
    names: Sequence[str],
    weights: Sequence[Tensor],
    inputs: BatchInputs,
    outer: Sequence[Tensor] | None = None,
) -> BlockBatch:
    """Blocks of one shape, [N, K] each, with their inputs.

    Raises:
        ValueError: If a weight is NaN or infinite; names the block.
    """
    for name, w_NK in zip(names, weights, strict=True):
        check_finite(w_NK, name)
    plain_BNK = torch.stack([w_NK.to(torch.float32) for w_NK in weights])
    w_BNK = plain_BNK
    if inputs.shift_BKK is not None:
        w_BNK = w_BNK + plain_BNK @ inputs.shift_BKK
    if inputs.lack_BNK is not None:
        w_BNK = w_BNK + inputs.lack_BNK
    w_BNK = rotate(w_BNK) if inputs.rotated else w_BNK
    known = None if outer is None else tuple(outer)
    return BlockBatch(tuple(names), w_BNK, inputs, plain_BNK, known)


def quantize_batch(batch: BlockBatch, scheme: Scheme, method: Method) -> tuple[Candidate, ...]:
    """The better of a quantizer and round to nearest for each block, judged on its inputs.

    Raises:
        ValueError: If the scheme does not fit, or a quantizer gives non-finite values.
    """
    return next(quantize_schemes(batch, (scheme,), method))


def quantize_schemes(
    batch: BlockBatch, schemes: Iterable[Scheme], method: Method
) -> Iterator[tuple[Candidate, ...]]:
    """``quantize_batch`` under each scheme in turn; what all share is computed once."""
    for scheme in schemes:
        if scheme.kind == "bf16":
            kept = quantize_rtn(batch.plain_BNK, scheme)
            yield tuple(
                Candidate(block, kept[index], "none", rotated=False)
                for index, block in enumerate(batch.names)
            )
        else:
            yield _pick(batch, _options(batch, scheme, method))


def _options(
    batch: BlockBatch, scheme: Scheme, method: Method
) -> list[tuple[str, QuantizedWeight]]:
    """What to choose from, with the quantizer's name; the method's own comes first."""
    w_BNK, hessian_BKK = batch.w_BNK, batch.inputs.hessian_BKK
    if scheme.kind != "int" or method.quantizer is quantize_rtn:
        return [(method.name, method.quantizer(w_BNK, scheme, hessian_BKK))]
    if method.quantizer not in (quantize_gptq, quantize_refined, quantize_kronecker):
        own = method.quantizer(w_BNK, scheme, hessian_BKK)
        return [(method.name, own), ("rtn", quantize_rtn(w_BNK, scheme, hessian_BKK))]
    check_groups(w_BNK.shape[-1], scheme)
    grid = find_grid(w_BNK, scheme, hessian_BKK)
    own = gptq_on_grid(w_BNK, scheme, grid, batch.inputs.columns)
    if method.quantizer is not quantize_gptq:
        own = refine(w_BNK, own, hessian_BKK)
    if method.reads_gradients and batch.outer is not None:
        own = refine_kronecker(w_BNK, own, hessian_BKK, batch.outer)
    return [(method.name, own), ("rtn", rtn_on_grid(w_BNK, scheme, grid))]


def _pick(
    batch: BlockBatch, options: Sequence[tuple[str, QuantizedWeight]]
) -> tuple[Candidate, ...]:
    """For each block the option with the least error; the first one where they are equal."""
    picked = []
    for index, block in enumerate(batch.names):
        errors = [_output_error(batch, index, q[index]) for _, q in options]
        name, q = options[errors.index(min(errors))]
        picked.append(Candidate(block, q[index], name, batch.inputs.rotated))
    return tuple(picked)


def _output_error(batch: BlockBatch, index: int, q: QuantizedWeight) -> float:
    """Squared output error on the block's judges, or under its second moments without any.

    Outputs count as much as their gradients say, where those are known.
    """
    delta_NK = dequantize(q) - batch.w_BNK[index]
    check_finite(delta_NK, f"quantized {batch.names[index]} ({q.scheme})")
    x_TK, weight_T = batch.inputs.judges[index]
    if len(x_TK) == 0:
        return float(((delta_NK @ batch.inputs.hessian_BKK[index]) * delta_NK).sum())
    error_TN = x_TK @ delta_NK.T
    return float((_squares(batch, index, error_TN) * weight_T).sum())


def _squares(batch: BlockBatch, index: int, error_TN: Tensor) -> Tensor:
    """Squared errors of a block's outputs, as much as they count, [T]."""
    if batch.outer is None:
        return error_TN.square().sum(-1)
    total_T = error_TN.new_zeros(len(error_TN))
    for rows, outer_Bnn in zip(row_pieces(error_TN.shape[1]), batch.outer, strict=True):
        part_Tn = error_TN[:, rows]
        total_T += ((part_Tn @ outer_Bnn[index]) * part_Tn).sum(-1)
    return total_T

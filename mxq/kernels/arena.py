"""The weights of one product of a layer, in kernel order in one tensor: what a launch reads.

A *problem* is one weight: the experts' gate and up projections are problems of the same product,
told apart by the expert whose tokens they take and the column where their outputs start.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mxq.counted import counted
from mxq.kernels.layout import (
    from_kernel_order,
    layout_of,
    meta_shape,
    pack_meta,
    padded,
    to_kernel_order,
    unpack_meta,
    weight_bytes,
)
from mxq.kernels.spec import PROBLEM_FIELDS, WeightFormat, format_of
from mxq.numerics import QuantizedWeight, check_groups
from mxq.scheme import Scheme

NO_BIAS = -1


@dataclass(frozen=True, slots=True)
class Problem:
    """One weight, the expert that it belongs to (0 if none), and its first output column."""

    weight: QuantizedWeight
    column: int = 0
    expert: int = 0
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class WeightSize:
    """What a weight takes in an arena, known before the weight is read."""

    scheme: Scheme
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class GroupedWeights:
    """Weights of one product.

    ``words`` uint8 (each weight 128-byte aligned) and ``meta`` int32 are in kernel order;
    ``bias`` float32 holds n_pad values for each problem with a bias. ``problems`` int64 [P, 8] has
    the columns PROBLEM_FIELDS; ``format_index`` int32 [P] points into ``formats``, sorted and
    distinct. ``out_features`` is the width of an output row, ``in_features`` the K of all problems.
    """

    words: Tensor
    meta: Tensor
    bias: Tensor
    problems: Tensor
    format_index: Tensor
    formats: tuple[WeightFormat, ...]
    out_features: int
    in_features: int
    schemes: tuple[Scheme, ...]
    fragment: str = "hopper"


def size_of(weight: QuantizedWeight) -> WeightSize:
    """The size of a weight that is there."""
    return WeightSize(weight.scheme, *weight.codes_NK.shape)


def group_weights(
    problems: Iterable[Problem],
    sizes: Sequence[WeightSize],
    *,
    device: torch.device | str = "cpu",
    fragment: str = "hopper",
) -> GroupedWeights:
    """Put weights into kernel order, in an arena on ``device``.

    Problems are taken one by one, so an iterator that reads and frees each weight needs memory
    for one weight beside the arena. ``sizes`` are those of the problems, in the same order.

    Raises:
        ValueError: If no kernel serves a scheme, sizes and problems disagree, inputs differ in
            width, or two problems of an expert write the same column.
    """
    in_features = _check_sizes(sizes)
    formats = [format_of(size.scheme) for size in sizes]
    w_starts, meta_starts = _starts(sizes, formats, fragment)
    words = torch.empty(w_starts[-1], dtype=torch.uint8, device=device)
    meta = torch.empty(meta_starts[-1], dtype=torch.int32, device=device)
    bias_parts: list[Tensor] = []
    rows: list[tuple[int, ...]] = []
    for problem in problems:
        index = len(rows)
        _check_problem(problem, sizes, index)
        q, form, n = problem.weight, formats[index], sizes[index].out_features
        ordered = to_kernel_order(q.codes_NK, layout_of(form, fragment))
        words[w_starts[index] : w_starts[index + 1]] = ordered
        meta[meta_starts[index] : meta_starts[index + 1]] = pack_meta(q, form)
        place = (n, padded(n), padded(in_features), problem.column, problem.expert)
        bias_off = _append_bias(problem, bias_parts)
        rows.append((w_starts[index], meta_starts[index], *place, bias_off))
        del problem, q, ordered  # before the iterator makes the next one
    if len(rows) != len(sizes):
        raise ValueError(
            f"got {counted(len(rows), 'problem')} for {counted(len(sizes), 'size')}; give one each"
        )
    _check_columns(rows)
    distinct = tuple(sorted(set(formats)))
    format_index = torch.tensor([distinct.index(form) for form in formats], dtype=torch.int32)
    return GroupedWeights(
        words,
        meta,
        torch.cat([torch.empty(0), *bias_parts]).to(device),
        torch.tensor(rows, dtype=torch.int64).to(device),
        format_index.to(device),
        distinct,
        max(row[5] + row[2] for row in rows),
        in_features,
        tuple(size.scheme for size in sizes),
        fragment,
    )


def weight_of(group: GroupedWeights, index: int) -> QuantizedWeight:
    """A weight as it was put in: codes, float16 scales and zeros, bit for bit."""
    scheme = group.schemes[index]
    form = format_of(scheme)
    w_off, meta_off, n = group.problems[index, :3].tolist()
    k = group.in_features
    layout = layout_of(form, group.fragment)
    words = group.words[w_off : w_off + weight_bytes(layout, n, k)]
    meta = group.meta[meta_off : meta_off + _meta_words(form, n, k)]
    codes_NK = from_kernel_order(words, layout, n, k)
    return QuantizedWeight(codes_NK, *unpack_meta(meta, scheme, form, n, k), scheme)


def bias_of(group: GroupedWeights, index: int) -> Tensor | None:
    """The bias of a problem, float32 [N], or None."""
    row = dict(zip(PROBLEM_FIELDS, group.problems[index].tolist(), strict=True))
    if row["bias_off"] == NO_BIAS:
        return None
    return group.bias[row["bias_off"] : row["bias_off"] + row["n"]]


def _meta_words(form: WeightFormat, n: int, k: int) -> int:
    groups, n_pad = meta_shape(form, n, k)
    return groups * n_pad


def _starts(
    sizes: Sequence[WeightSize], formats: Sequence[WeightFormat], fragment: str
) -> tuple[list[int], list[int]]:
    """Where each weight starts, in bytes of words and items of meta; the last is the total."""
    w_starts, meta_starts = [0], [0]
    for size, form in zip(sizes, formats, strict=True):
        n, k = size.out_features, size.in_features
        w_starts.append(w_starts[-1] + weight_bytes(layout_of(form, fragment), n, k))
        meta_starts.append(meta_starts[-1] + _meta_words(form, n, k))
    return w_starts, meta_starts


def _append_bias(problem: Problem, bias_parts: list[Tensor]) -> int:
    """Where the bias starts in the joined one; appends it, padded."""
    if problem.bias is None:
        return NO_BIAS
    offset = sum(part.numel() for part in bias_parts)
    bias_N = problem.bias.detach().to("cpu", torch.float32)
    n = bias_N.numel()
    bias_parts.append(torch.nn.functional.pad(bias_N, (0, padded(n) - n)))
    return offset


def _check_sizes(sizes: Sequence[WeightSize]) -> int:
    """The number of inputs that all weights share."""
    if not sizes:
        raise ValueError("no weight was given; a product needs at least one")
    in_features = sorted({size.in_features for size in sizes})
    if len(in_features) > 1:
        raise ValueError(
            f"weights of {in_features[0]} and of {in_features[-1]} input features cannot share "
            "one input; make a group for each"
        )
    for size in sizes:
        check_groups(size.in_features, size.scheme)
    return in_features[0]


def _check_problem(problem: Problem, sizes: Sequence[WeightSize], index: int) -> None:
    if index >= len(sizes):
        raise ValueError(
            f"more problems were given than the {counted(len(sizes), 'size')}; give one each"
        )
    found, expected = size_of(problem.weight), sizes[index]
    if found != expected:
        raise ValueError(f"problem {index} is {_words(found)}, announced as {_words(expected)}")
    if problem.bias is not None and problem.bias.shape != (found.out_features,):
        raise ValueError(
            f"problem {index} has a bias of shape {list(problem.bias.shape)}, "
            f"expected [{found.out_features}]"
        )


def _words(size: WeightSize) -> str:
    return f"[{size.out_features}, {size.in_features}] {size.scheme}"


def _check_columns(rows: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError if two weights of an expert write the same column."""
    spans = sorted((row[6], row[5], row[5] + row[2]) for row in rows)
    for (expert, _, end), (next_expert, column, _) in pairwise(spans):
        if expert == next_expert and column < end:
            raise ValueError(
                f"two weights of expert {expert} write column {column}; the second one must start "
                f"at column {end} or after"
            )

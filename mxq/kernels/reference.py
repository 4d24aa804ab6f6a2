"""What the product kernels compute, in plain torch: the definition that each one is tested with.

For a token t and an output n, with code q, zero z, float16 scale s (of a row or a group g), input
x in bf16, and x = xq * xs where the input is rounded:

    bf16 input, groups   sum_k bf16((q - z) * bf16(s_g)) * x        in float32
    bf16 input, row      s * sum_k (q - z) * x                      in float32
    int8 / int4, row     float32(sum_k (q - z) * xq) * s * xs       sum in int32, exact
    int8 / int4, groups  xs * sum_g float32(sum_k (q - z) * xq) * s_g
    fp8                  s * xs * sum_k w8 * xq                     in float32
    bf16 weight          sum_k w * x                                in float32, x not rotated

The bias is added in float32 and the result is rounded once. The order of a float32 sum is free, so
kernels agree with this file within ``error_bounds`` and not bit for bit.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mxq.kernels.arena import GroupedWeights, bias_of, weight_of
from mxq.kernels.layout import padded
from mxq.kernels.spec import PROBLEM_FIELDS, Input, WeightFormat, format_of
from mxq.numerics import FP8_MAX, QuantizedWeight, dequantize, rotate

BF16_ROUNDOFF = 2.0**-8
"""Largest relative error of rounding to bfloat16."""

SUM_ROUNDOFF = 2.0**-23
"""Relative error of one float32 addition that rounds or, as in a tensor core, truncates."""

OUTER_ROUNDINGS = 8
"""Roundings beside a sum: of an integer to float32, two scales, a bias, four slices of K."""


@dataclass(frozen=True, slots=True)
class RoundedInput:
    """An input on its own grid, a scale for each token.

    ``values_TK`` is int8 [T, k_pad] or float8_e4m3fn; ``scale_T`` float32; ``sum_T`` int32 is the
    sum of the values of a token, None for fp8.
    """

    values_TK: Tensor
    scale_T: Tensor
    sum_T: Tensor | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input of a product in each kind that its weights multiply; None where no weight does.

    ``plain_TK`` and ``rotated_TK`` are bfloat16 [T, k_pad], zero from K on, and the same tensor
    where the input is not rotated. The rounded kinds are made from ``rotated_TK``.
    """

    plain_TK: Tensor | None = None
    rotated_TK: Tensor | None = None
    int8: RoundedInput | None = None
    int4: RoundedInput | None = None
    fp8: RoundedInput | None = None


@dataclass(frozen=True, slots=True)
class ErrorBounds:
    """Largest differences from ``group_gemm_torch``, float32 [S, out_features].

    ``kernel_SN`` of a kernel on the same inputs; ``decoded_SN`` of ``dequantize`` and a float32
    product with the input that ``fake_quantize_input`` gives.
    """

    kernel_SN: Tensor
    decoded_SN: Tensor


def make_inputs_torch(x_TK: Tensor, rotated: bool, kinds: Collection[Input]) -> Inputs:
    """The input in the kinds asked for; "bf16" stands for both the plain and the rotated one.

    The rotation is computed in float32 and rounded once to bfloat16; rounding to a grid starts
    from that, as ``mxq.numerics.fake_quantize_input`` does.
    """
    plain_TK = _pad(x_TK.to(torch.bfloat16))
    rotated_TK = plain_TK
    if rotated:
        rotated_TK = _pad(rotate(x_TK.to(torch.bfloat16).to(torch.float32)).to(torch.bfloat16))
    has_bf16 = "bf16" in kinds
    return Inputs(
        plain_TK if has_bf16 else None,
        rotated_TK if has_bf16 else None,
        _round_integer(rotated_TK, 127) if "int8" in kinds else None,
        _round_integer(rotated_TK, 7) if "int4" in kinds else None,
        _round_fp8(rotated_TK) if "fp8" in kinds else None,
    )


def group_gemm_torch(
    inputs: Inputs,
    group: GroupedWeights,
    rows_S: Tensor,
    starts_E: Tensor,
    counts_E: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Outputs [S, out_features] of all problems, zero where no problem writes.

    Slot i takes token ``rows_S[i]``; expert e has the slots from ``starts_E[e]``, ``counts_E[e]``
    of them.

    Raises:
        ValueError: If a kind of input that a weight needs is None.
    """
    y_SN = torch.zeros(len(rows_S), group.out_features, device=rows_S.device)
    for index, slots, columns in _parts(group, starts_E, counts_E):
        q = weight_of(group, index)
        y_SN[slots, columns] = _product(inputs, q, rows_S[slots])
        bias_N = bias_of(group, index)
        if bias_N is not None:
            y_SN[slots, columns] += bias_N
    return y_SN.to(dtype)


def error_bounds(
    inputs: Inputs,
    group: GroupedWeights,
    rows_S: Tensor,
    starts_E: Tensor,
    counts_E: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    sum_roundoff: float = SUM_ROUNDOFF,
) -> ErrorBounds:
    """How far two correct computations can be apart; the arithmetic is that of each format.

    Let M = sum_k |w| |x| + |bias| with w and x as decoded. A float32 result of n operations in any
    order is off by at most g(n) M, g(n) = n u / (1 - n u), u = ``sum_roundoff`` (Higham, Accuracy
    and Stability, lemma 3.1), so two of them are 2 g(n) M apart. Products of two codes or bf16
    numbers are exact in float32 and so are integer sums: n counts the inputs of a float sum or
    the groups of an integer one, and OUTER_ROUNDINGS.

    With a bf16 input, weights of groups are rounded twice to bfloat16 (scale, then product; error
    r = 2 v + v^2, v = 2^-8), the same way by kernel and definition, not by the decoder: r M more.
    Rounding y to bfloat16 moves each side by at most v |y|.
    """
    shape = (len(rows_S), group.out_features)
    kernel_SN, decoded_SN = (torch.zeros(shape, device=rows_S.device) for _ in range(2))
    for index, slots, columns in _parts(group, starts_E, counts_E):
        q = weight_of(group, index)
        magnitude = _decoded_input(inputs, q, rows_S[slots]).abs() @ dequantize(q).abs().T
        bias_N = bias_of(group, index)
        if bias_N is not None:
            magnitude += bias_N.abs()
        rounding = _weight_rounding(format_of(q.scheme))
        summing = _sum_error(_terms(q), sum_roundoff) * (1 + rounding)
        decoding = _sum_error(group.in_features + OUTER_ROUNDINGS, sum_roundoff)
        kernel_SN[slots, columns] = 2 * summing * magnitude
        decoded_SN[slots, columns] = (summing + decoding + rounding) * magnitude
    if dtype == torch.bfloat16:
        y_SN = group_gemm_torch(inputs, group, rows_S, starts_E, counts_E, torch.float32).abs()
        kernel_SN += BF16_ROUNDOFF * (2 * y_SN + kernel_SN)
        decoded_SN += BF16_ROUNDOFF * y_SN
    return ErrorBounds(kernel_SN, decoded_SN)


def _parts(
    group: GroupedWeights, starts_E: Tensor, counts_E: Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """Each problem that has tokens, with its slots and its columns of the output."""
    starts, counts = starts_E.tolist(), counts_E.tolist()
    for index, row in enumerate(group.problems.tolist()):
        problem = dict(zip(PROBLEM_FIELDS, row, strict=True))
        start, count = starts[problem["expert"]], counts[problem["expert"]]
        if count > 0:
            first = problem["column"]
            yield index, slice(start, start + count), slice(first, first + problem["n"])


def _product(inputs: Inputs, q: QuantizedWeight, rows_S: Tensor) -> Tensor:
    """Outputs float32 [S, N] of one weight for the tokens of ``rows_S``, without the bias."""
    form = format_of(q.scheme)
    k = q.codes_NK.shape[1]
    if form.input == "bf16":
        x_SK = _bf16_input(inputs, form)[rows_S, :k].to(torch.float32)
        return _bf16_product(x_SK, q)
    rounded = _rounded_input(inputs, form.input)
    x_SK, xs_S1 = rounded.values_TK[rows_S, :k], rounded.scale_T[rows_S, None]
    assert q.scale_NG is not None
    if form.input == "fp8":
        sum_SN = x_SK.to(torch.float32) @ q.codes_NK.to(torch.float32).T
        return sum_SN * q.scale_NG.to(torch.float32).T * xs_S1
    return _integer_product(x_SK, q) * xs_S1


def _bf16_product(x_SK: Tensor, q: QuantizedWeight) -> Tensor:
    if q.scale_NG is None:
        return x_SK @ q.codes_NK.to(torch.float32).T
    whole_NK = _centred(q)
    if q.scheme.group_size is None:
        return (x_SK @ whole_NK.T) * q.scale_NG.to(torch.float32).T
    scale_NG = q.scale_NG.to(torch.bfloat16).to(torch.float32)
    scale_NK = scale_NG.repeat_interleave(q.scheme.group_size, dim=1)
    return x_SK @ (whole_NK * scale_NK).to(torch.bfloat16).to(torch.float32).T


def _integer_product(x_SK: Tensor, q: QuantizedWeight) -> Tensor:
    """Sums of (code - zero) * xq, scaled by the weight's scales: float32 [S, N]."""
    assert q.scale_NG is not None
    scale_NG = q.scale_NG.to(torch.float32)
    width = q.codes_NK.shape[1] // scale_NG.shape[1]
    # float64 holds these integers, below 2^53, exactly; torch has no int32 product on a GPU.
    x_SK, whole_NK = x_SK.to(torch.float64), _centred(q).to(torch.float64)
    y_SN = torch.zeros(len(x_SK), len(scale_NG), device=x_SK.device)
    for g in range(scale_NG.shape[1]):
        part = slice(g * width, (g + 1) * width)
        y_SN += (x_SK[:, part] @ whole_NK[:, part].T).to(torch.float32) * scale_NG[:, g]
    return y_SN


def _centred(q: QuantizedWeight) -> Tensor:
    """Code minus zero, exact in float32, [N, K]."""
    if q.zero_NG is None:
        return q.codes_NK.to(torch.float32) - float(2 ** (q.scheme.w_bits - 1))
    group = q.codes_NK.shape[1] // q.zero_NG.shape[1]
    zero_NK = q.zero_NG.to(torch.float32).repeat_interleave(group, dim=1)
    return q.codes_NK.to(torch.float32) - zero_NK


def _decoded_input(inputs: Inputs, q: QuantizedWeight, rows_S: Tensor) -> Tensor:
    """The values that the rounded input stands for, float32 [S, K]."""
    form = format_of(q.scheme)
    k = q.codes_NK.shape[1]
    if form.input == "bf16":
        return _bf16_input(inputs, form)[rows_S, :k].to(torch.float32)
    rounded = _rounded_input(inputs, form.input)
    return rounded.values_TK[rows_S, :k].to(torch.float32) * rounded.scale_T[rows_S, None]


def _bf16_input(inputs: Inputs, form: WeightFormat) -> Tensor:
    # A bf16 weight is stored unrotated: it loses nothing that a rotation could save.
    x_TK = inputs.plain_TK if form.w_bits == 16 else inputs.rotated_TK
    if x_TK is None:
        raise ValueError(_absent(inputs, "bf16"))
    return x_TK


def _rounded_input(inputs: Inputs, kind: Input) -> RoundedInput:
    rounded = {"int8": inputs.int8, "int4": inputs.int4, "fp8": inputs.fp8}[kind]
    if rounded is None:
        raise ValueError(_absent(inputs, kind))
    return rounded


def _absent(inputs: Inputs, kind: Input) -> str:
    present = [item.name for item in fields(inputs) if getattr(inputs, item.name) is not None]
    return f"a weight needs the input as {kind}, but only {present} is there; make that kind too"


def _pad(x_TK: Tensor) -> Tensor:
    k = x_TK.shape[1]
    return torch.nn.functional.pad(x_TK, (0, padded(k) - k))


def _round_integer(x_TK: Tensor, top: int) -> RoundedInput:
    x = x_TK.to(torch.float32)
    scale_T1 = _peak(x) / top
    values_TK = (x / scale_T1).round().clamp(-top, top).to(torch.int8)
    return RoundedInput(values_TK, scale_T1[:, 0], values_TK.sum(1, dtype=torch.int32))


def _round_fp8(x_TK: Tensor) -> RoundedInput:
    x = x_TK.to(torch.float32)
    scale_T1 = _peak(x) / FP8_MAX
    return RoundedInput((x / scale_T1).to(torch.float8_e4m3fn), scale_T1[:, 0], None)


def _peak(x_TK: Tensor) -> Tensor:
    # A token of zeros gets a positive scale, and zeros as values.
    return x_TK.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _terms(q: QuantizedWeight) -> int:
    """Roundings on the way from exact products to an output."""
    if format_of(q.scheme).arithmetic != "int8":
        return q.codes_NK.shape[1] + OUTER_ROUNDINGS
    assert q.scale_NG is not None
    return q.scale_NG.shape[1] + OUTER_ROUNDINGS


def _sum_error(operations: int, roundoff: float) -> float:
    return operations * roundoff / (1 - operations * roundoff)


def _weight_rounding(form: WeightFormat) -> float:
    """Largest relative difference of a weight in the kernel from the decoded one."""
    is_rounded = form.is_integer and form.input == "bf16" and form.group_size is not None
    return BF16_ROUNDOFF * (2 + BF16_ROUNDOFF) if is_rounded else 0.0

"""Between the products: inputs in every kind, the gate, the sum of slices, the sum of experts.

``activation_reference`` defines each operation; nothing here waits for the device. A dense layer is
one expert: ``experts`` is then all 0.
"""

from collections.abc import Collection
from typing import Literal, get_args

import torch
import triton
from torch import Tensor

from mxq.kernels.activation_kernels import (
    combine_kernel,
    gate_kernel,
    prepare_kernel,
    sum_slices_kernel,
)
from mxq.kernels.layout import padded
from mxq.kernels.reference import Inputs, RoundedInput
from mxq.kernels.spec import UNIT, Input
from mxq.numerics import rotation_block

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"]
"""Functions that the gate kernel computes; any other one runs in torch between two launches."""

WIDTH_LIMIT = 32768
"""Most features of a token: one program holds all of them, because they share a scale."""


def prepare(
    x_TK: Tensor, rotated: bool, kinds: Collection[Input], *, with_plain: bool = True
) -> Inputs:
    """The input in the kinds asked for; "bf16" stands for both the plain and the rotated one.

    ``with_plain`` False leaves out the plain one of a rotated input, for layers without bfloat16
    weights. A plain input that needs no padding is ``x_TK`` itself.

    Raises:
        ValueError: If a token has more features than a program can hold.
    """
    tokens, features = x_TK.shape
    _check_width(features)
    x_TK = x_TK.contiguous()
    reused = x_TK if x_TK.dtype == torch.bfloat16 and features % UNIT == 0 else None
    inputs = _empty_inputs(x_TK, (tokens, features), rotated, kinds, with_plain, reused)
    written = _pointers(inputs, rotated, reused)
    if any(pointer is not None for pointer in written):
        prepare_kernel[(_programs(x_TK, tokens),)](
            x_TK,
            *written,
            tokens,
            **_shape_options(features, rotated),
            INTERPRETED=_is_interpreted(prepare_kernel),
        )
    return inputs


def gate(
    z_SN: Tensor,
    partial_CSN: Tensor | None,
    splits_P: Tensor,
    experts_S: Tensor,
    activation: Activation,
    rotated: bool,
    kinds: Collection[Input],
    *,
    gated: bool = True,
    with_plain: bool = True,
) -> Inputs:
    """Inputs of the second product: act(gate) * up, or act(up) without a gate.

    ``z_SN`` is bfloat16, [S, 2 I] with the gate first (problems 2e and 2e + 1), or [S, I] without
    a gate (problem e). A problem of several slices is read from ``partial_CSN`` (float32
    [slices, S, N]; None if nothing can be split). Rows of unused slots (expert -1) become 0.

    Raises:
        ValueError: If the activation is unknown or a tensor has another shape or type.
    """
    if activation not in get_args(Activation):
        raise ValueError(
            f"no kernel computes the activation {activation!r}; known are "
            f"{', '.join(get_args(Activation))}; use sum_slices, torch and prepare for others"
        )
    slots, width = _check_results(z_SN, partial_CSN)
    features = width // 2 if gated else width
    _check_width(features)
    inputs = _empty_inputs(z_SN, (slots, features), rotated, kinds, with_plain, None)
    gate_kernel[(_programs(z_SN, slots),)](
        z_SN,
        partial_CSN,
        splits_P,
        experts_S,
        *_pointers(inputs, rotated, None),
        slots,
        **_shape_options(features, rotated),
        SLICES=_slices(partial_CSN),
        GATED=gated,
        ACTIVATION=activation,
        INTERPRETED=_is_interpreted(gate_kernel),
    )
    return inputs


def sum_slices(
    z_SN: Tensor,
    partial_CSN: Tensor | None,
    splits_P: Tensor,
    experts_S: Tensor,
    *,
    parts: int = 1,
) -> Tensor:
    """Results with those of split problems added up, bfloat16 [S, N]; 0 in unused slots.

    An expert has ``parts`` problems of equal width (2 for gate and up).
    """
    slots, width = _check_results(z_SN, partial_CSN)
    out_SN = torch.empty_like(z_SN)
    block = min(1024, triton.next_power_of_2(width // parts))
    sum_slices_kernel[(slots, parts * triton.cdiv(width // parts, block))](
        z_SN,
        partial_CSN,
        splits_P,
        experts_S,
        out_SN,
        slots,
        N=width,
        PARTS=parts,
        SLICES=_slices(partial_CSN),
        BLOCK_N=block,
        INTERPRETED=_is_interpreted(sum_slices_kernel),
    )
    return out_SN


def combine(
    z_SN: Tensor,
    partial_CSN: Tensor | None,
    splits_E: Tensor,
    experts_S: Tensor,
    slots_TR: Tensor,
    weights_TR: Tensor,
) -> Tensor:
    """Weighted sum of each token's experts, bfloat16 [T, N]: float32 in order, rounded once.

    Slot -1 adds nothing, whatever its weight is; weights are of any float type.
    """
    slots, width = _check_results(z_SN, partial_CSN)
    tokens, top_k = slots_TR.shape
    if weights_TR.shape != slots_TR.shape or not weights_TR.is_floating_point():
        raise ValueError(
            f"the weights are {weights_TR.dtype} of shape {list(weights_TR.shape)}; expected "
            f"floats of shape {list(slots_TR.shape)}"
        )
    out_TN = torch.empty(tokens, width, dtype=torch.bfloat16, device=z_SN.device)
    block = min(1024, triton.next_power_of_2(width))
    combine_kernel[(tokens, triton.cdiv(width, block))](
        z_SN,
        partial_CSN,
        splits_E,
        experts_S,
        slots_TR,
        weights_TR.contiguous(),
        out_TN,
        slots,
        N=width,
        TOP_K=top_k,
        SLICES=_slices(partial_CSN),
        BLOCK_N=block,
        INTERPRETED=_is_interpreted(combine_kernel),
    )
    return out_TN


def _empty_inputs(
    like: Tensor,
    shape: tuple[int, int],
    rotated: bool,
    kinds: Collection[Input],
    with_plain: bool,
    reused: Tensor | None,
) -> Inputs:
    """Unwritten tensors for each kind; ``reused`` serves as the plain one if it is given."""
    tokens, k_pad = shape[0], padded(shape[1])

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=like.device)

    def rounded(kind: Input) -> RoundedInput | None:
        if kind not in kinds:
            return None
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        total = None if kind == "fp8" else empty(torch.int32, tokens)
        return RoundedInput(empty(dtype, tokens, k_pad), empty(torch.float32, tokens), total)

    plain, turned = None, None
    if "bf16" in kinds:
        if with_plain or not rotated:
            plain = empty(torch.bfloat16, tokens, k_pad) if reused is None else reused
        turned = empty(torch.bfloat16, tokens, k_pad) if rotated else plain
    return Inputs(plain, turned, rounded("int8"), rounded("int4"), rounded("fp8"))


def _pointers(inputs: Inputs, rotated: bool, reused: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the kernels write, in the order of their arguments; None for what they leave out."""
    plain = inputs.plain_TK if reused is None else None
    pointers: list[Tensor | None] = [plain, inputs.rotated_TK if rotated else None]
    for kind in (inputs.int8, inputs.int4):
        pointers += [None] * 3 if kind is None else [kind.values_TK, kind.scale_T, kind.sum_T]
    if inputs.fp8 is None:
        return (*pointers, None, None)
    return (*pointers, inputs.fp8.values_TK.view(torch.uint8), inputs.fp8.scale_T)


def _shape_options(features: int, rotated: bool) -> dict[str, int | float]:
    """Sizes that a kernel is compiled for; a matrix product takes at least 16 rows."""
    groups = triton.next_power_of_2(padded(features) // UNIT)
    block = rotation_block(features)
    groups = max(groups, 16) if rotated else groups
    return {
        "K": features,
        "K_PAD": padded(features),
        "GROUPS": groups,
        "ROTATION_BLOCK": block if rotated else 0,
        "ROTATION_SCALE": block**-0.5,
        # More values for a thread would spill. From 64 groups on sm_100 compiles with 16 warps or
        # more only: Triton 3.6 fails to lay out the tensor memory of a product of fewer.
        "num_warps": 4 if groups <= 32 else 16 if groups <= 128 else 32,
        "num_stages": 1,
    }


def _programs(like: Tensor, tokens: int) -> int:
    """Programs that share the tokens: enough to fill the device, each makes its matrix once."""
    if like.device.type != "cuda":
        return min(tokens, 2)
    return min(tokens, 4 * torch.cuda.get_device_properties(like.device).multi_processor_count)


def _is_interpreted(kernel: object) -> bool:
    return not isinstance(kernel, triton.JITFunction)


def _slices(partial_CSN: Tensor | None) -> int:
    return 1 if partial_CSN is None else partial_CSN.shape[0]


def _check_width(features: int) -> None:
    if features > WIDTH_LIMIT:
        raise ValueError(
            f"a token has {features} features; kernels take {WIDTH_LIMIT} at most, so compute "
            "this layer with decoded weights"
        )


def _check_results(z_SN: Tensor, partial_CSN: Tensor | None) -> tuple[int, int]:
    slots, width = z_SN.shape
    if z_SN.dtype != torch.bfloat16 or not z_SN.is_contiguous():
        raise ValueError(f"results are {z_SN.dtype}; expected contiguous torch.bfloat16")
    if partial_CSN is not None and (
        partial_CSN.dtype != torch.float32
        or partial_CSN.shape[1:] != z_SN.shape
        or not partial_CSN.is_contiguous()
    ):
        raise ValueError(
            f"partial sums are {partial_CSN.dtype} of shape {list(partial_CSN.shape)}; expected "
            f"contiguous torch.float32 of shape [slices, {slots}, {width}]"
        )
    return slots, width

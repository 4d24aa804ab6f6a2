"""Kernels between the products: rotate and round inputs, apply the gate, add up the experts.

A token is a tile of [GROUPS, 128] values, one group of 128 inputs in a row, so that the rotation
is one product with a 128 x 128 matrix of 1 and -1 (block-diagonal where the rotation's block is
smaller), scaled afterwards in float32. Values are rounded to bfloat16 once, and the rounded kinds
start from that, as ``mxq.numerics.fake_quantize_input`` does. A pointer that is None stands for a
kind that nobody asked for. Triton's interpreter truncates casts to bfloat16 and multiplies bfloat16
wrongly in ``tl.dot``, so there (INTERPRETED) the casts are written with integers and the same
numbers are multiplied as float32.

A result of a split product is the sum of its slices in order, in float32, rounded to bfloat16:
what an unsplit product would have written.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def prepare_kernel(
    x_ptr,
    plain_ptr,
    rotated_ptr,
    int8_ptr,
    int8_scale_ptr,
    int8_sum_ptr,
    int4_ptr,
    int4_scale_ptr,
    int4_sum_ptr,
    fp8_ptr,
    fp8_scale_ptr,
    tokens,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Inputs of a product in every kind asked for; a program takes every n-th token."""
    k = _columns(GROUPS)
    matrix = _hadamard(ROTATION_BLOCK, INTERPRETED)
    outputs = (
        plain_ptr,
        rotated_ptr,
        (int8_ptr, int8_scale_ptr, int8_sum_ptr),
        (int4_ptr, int4_scale_ptr, int4_sum_ptr),
        (fp8_ptr, fp8_scale_ptr),
    )
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        # Mask: columns past the last input.
        x = tl.load(x_ptr + tl.cast(token, tl.int64) * K + k, mask=k < K, other=0.0)
        x = _round_bf16(x.to(tl.float32), INTERPRETED)
        _write_inputs(
            x,
            k,
            token,
            matrix,
            outputs,
            K_PAD,
            ROTATION_BLOCK,
            ROTATION_SCALE,
            INTERPRETED,
        )


@triton.jit(do_not_specialize=["slots"])
def gate_kernel(
    z_ptr,
    partial_ptr,
    splits_ptr,
    experts_ptr,
    plain_ptr,
    rotated_ptr,
    int8_ptr,
    int8_scale_ptr,
    int8_sum_ptr,
    int4_ptr,
    int4_scale_ptr,
    int4_sum_ptr,
    fp8_ptr,
    fp8_scale_ptr,
    slots,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Inputs of the second product from the results of the first; zeros in unused slots."""
    k = _columns(GROUPS)
    matrix = _hadamard(ROTATION_BLOCK, INTERPRETED)
    outputs = (
        plain_ptr,
        rotated_ptr,
        (int8_ptr, int8_scale_ptr, int8_sum_ptr),
        (int4_ptr, int4_scale_ptr, int4_sum_ptr),
        (fp8_ptr, fp8_scale_ptr),
    )
    for slot in range(tl.program_id(0), slots, tl.num_programs(0)):
        expert = tl.load(experts_ptr + slot)
        # Mask: columns past the last, and slots that no assignment uses.
        mask = (k < K) & (expert >= 0)
        if GATED:
            problem = expert * 2
            width = 2 * K
            gate = _result(
                z_ptr,
                partial_ptr,
                splits_ptr,
                problem,
                slot,
                slots,
                width,
                k,
                mask,
                SLICES,
                INTERPRETED,
            )
            up = _result(
                z_ptr,
                partial_ptr,
                splits_ptr,
                problem + 1,
                slot,
                slots,
                width,
                K + k,
                mask,
                SLICES,
                INTERPRETED,
            )
            h = _activate(gate, ACTIVATION) * up
        else:
            up = _result(
                z_ptr, partial_ptr, splits_ptr, expert, slot, slots, K, k, mask, SLICES, INTERPRETED
            )
            h = _activate(up, ACTIVATION)
        h = _round_bf16(h, INTERPRETED)
        _write_inputs(
            h,
            k,
            slot,
            matrix,
            outputs,
            K_PAD,
            ROTATION_BLOCK,
            ROTATION_SCALE,
            INTERPRETED,
        )


@triton.jit(do_not_specialize=["slots"])
def sum_slices_kernel(
    z_ptr,
    partial_ptr,
    splits_ptr,
    experts_ptr,
    out_ptr,
    slots,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Results with the split ones added up; zeros in unused slots. PARTS problems by expert."""
    slot = tl.program_id(0)
    expert = tl.load(experts_ptr + slot)
    part = tl.program_id(1) % PARTS
    width: tl.constexpr = N // PARTS
    n = (tl.program_id(1) // PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width  # Mask: columns past the problem's last; below also unused slots.
    used = inside & (expert >= 0)
    column = part * width + n
    problem = expert * PARTS + part
    z = _result(
        z_ptr, partial_ptr, splits_ptr, problem, slot, slots, N, column, used, SLICES, INTERPRETED
    )
    tl.store(out_ptr + slot.to(tl.int64) * N + column, z.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["slots"])
def combine_kernel(
    z_ptr,
    partial_ptr,
    splits_ptr,
    experts_ptr,
    slots_ptr,
    weights_ptr,
    out_ptr,
    slots,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[t] = sum over r of weights[t, r] * z[slots[t, r]], in order; slot -1 adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for r in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + r)
        weight = tl.load(weights_ptr + token * TOP_K + r).to(tl.float32)
        used = slot >= 0
        expert = tl.load(experts_ptr + slot, mask=used, other=0)
        # Mask: columns past the last, and assignments without an expert.
        mask = (n < N) & used
        z = _result(
            z_ptr, partial_ptr, splits_ptr, expert, slot, slots, N, n, mask, SLICES, INTERPRETED
        )
        total += tl.where(used, weight * z, 0.0)  # a weight of nothing may be NaN
    # Mask: columns past the last.
    total = _round_bf16(total, INTERPRETED)
    tl.store(out_ptr + token * N + n, total.to(tl.bfloat16), mask=n < N)


@triton.jit
def _result(
    z_ptr,
    partial_ptr,
    splits_ptr,
    problem,
    slot,
    slots,
    width,
    column,
    mask,
    SLICES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Results of one slot, float32 values of bfloat16, 0 outside of the mask.

    Loads are masked, not branched around, so that all of them are under way at once.
    """
    at = tl.cast(slot, tl.int64) * width + column
    if SLICES == 1:
        result = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        # Mask: an unused slot has no problem; its number is negative.
        split = tl.load(splits_ptr + problem, mask=problem >= 0, other=1)
        whole = tl.load(z_ptr + at, mask=mask & (split == 1), other=0.0).to(tl.float32)
        total = whole * 0.0
        for number in tl.static_range(SLICES):
            # Mask: slices that the problem does not have; it has none if it is not split.
            there = mask & (split > 1) & (number < split)
            slice_ptr = partial_ptr + tl.cast(slots, tl.int64) * (number * width)
            total += tl.load(slice_ptr + at, mask=there, other=0.0)
        result = tl.where(split > 1, _round_bf16(total, INTERPRETED), whole)
    return result


@triton.jit
def _round_bf16(x, INTERPRETED: tl.constexpr):
    """The nearest bfloat16, ties to even, as float32; for finite numbers."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = bits.to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.bfloat16).to(tl.float32)
    return y


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation function in float32; exponents are capped where the result is 0 anyway."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(tl.minimum(-x, 80.0)))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = x
    return y


@triton.jit
def _write_inputs(
    x,
    k,
    token,
    matrix,
    outputs,
    K_PAD: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write one token, float32 values of bfloat16 with 0 past the last input, in all kinds."""
    plain_ptr, rotated_ptr, int8_outputs, int4_outputs, fp8_outputs = outputs
    at = tl.cast(token, tl.int64) * K_PAD + k
    inside = k < K_PAD  # Mask, for every store here: columns past the padded row.
    if plain_ptr is not None:
        tl.store(plain_ptr + at, x.to(tl.bfloat16), mask=inside)
    if ROTATION_BLOCK > 0:
        x = _rotate(x, k, matrix, ROTATION_SCALE, INTERPRETED)
    if rotated_ptr is not None:
        tl.store(rotated_ptr + at, x.to(tl.bfloat16), mask=inside)
    peak = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1.1754943508222875e-38)
    _write_integer(x, peak, 127.0, at, inside, token, int8_outputs)
    _write_integer(x, peak, 7.0, at, inside, token, int4_outputs)
    fp8_ptr, fp8_scale_ptr = fp8_outputs
    if fp8_ptr is not None:
        scale = tl.div_rn(peak, 448.0)
        tl.store(fp8_ptr + at, _as_e4m3(tl.div_rn(x, scale)), mask=inside)
        tl.store(fp8_scale_ptr + token, scale)


@triton.jit
def _write_integer(x, peak, top, at, inside, token, outputs):
    """Values (x / scale to the nearest integer, ties to even), scale, and sum of the values."""
    values_ptr, scale_ptr, sum_ptr = outputs
    if values_ptr is not None:
        scale = tl.div_rn(peak, top)
        # Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds.
        nearest = (tl.div_rn(x, scale) + 12582912.0) - 12582912.0
        values = tl.minimum(tl.maximum(nearest, -top), top).to(tl.int32)
        # Mask: columns past the padded row.
        tl.store(values_ptr + at, values.to(tl.int8), mask=inside)
        tl.store(scale_ptr + token, scale)
        tl.store(sum_ptr + token, tl.sum(tl.sum(values, axis=1), axis=0))


@triton.jit
def _as_e4m3(x):
    """Bytes of the nearest float8_e4m3fn, ties to even; |x| is at most 464.

    Written with integers because targets before sm_89 have no such conversion.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 fraction bits go; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9; code 8 is 2^-6 itself.
    small = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(magnitude < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _columns(GROUPS: tl.constexpr):
    return tl.arange(0, GROUPS)[:, None] * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def _hadamard(ROTATION_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Block-diagonal matrix of 1 and -1: the sign is the parity of the common bits of i and j."""
    i = tl.arange(0, 128)[:, None]
    j = tl.arange(0, 128)[None, :]
    parity = i & j & (ROTATION_BLOCK - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    entry = tl.where((i ^ j) < ROTATION_BLOCK, 1 - 2 * (parity & 1), 0)
    return entry.to(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def _rotate(x, k, matrix, ROTATION_SCALE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``mxq.numerics.rotate`` of a token: fixed signs, block Hadamard, one rounding to bfloat16."""
    mixed = (k + 1).to(tl.uint32) * 2654435761
    mixed = (mixed ^ (mixed >> 15)) * 2246822519
    x = tl.where(((mixed >> 16) & 1) == 1, -x, x)
    # An INTERPRETED matrix is float32, where its product must not be rounded to tf32.
    product = tl.dot(x.to(matrix.dtype), matrix, input_precision="ieee")
    return _round_bf16(product * ROTATION_SCALE, INTERPRETED)

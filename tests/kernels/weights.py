"""Random weights in every scheme that a kernel serves, for the tests of layout, arena and kernels.

Codes and zeros are any bit pattern that the scheme allows, scales any finite float16 but 0.
"""

from itertools import product

import torch

from mxq.kernels.layout import layout_of
from mxq.kernels.spec import format_of
from mxq.numerics import QuantizedWeight
from mxq.scheme import ACTIVATION_BITS, GROUP_SIZES, WEIGHT_BITS, Scheme


def has_kernel(scheme):
    try:
        format_of(scheme)
    except ValueError:
        return False
    return True


INTEGER_SCHEMES = [
    Scheme(*fields)
    for fields in product(WEIGHT_BITS, ACTIVATION_BITS, (*GROUP_SIZES, None), (True, False))
    if fields[0] <= fields[1]
]
SCHEMES = [*filter(has_kernel, INTEGER_SCHEMES), Scheme.parse("fp8"), Scheme.parse("bf16")]


def codes_of(form, n, k, seed=0):
    """Random codes [n, k] of a weight format."""
    generator = torch.Generator().manual_seed(seed)
    if form.is_integer:
        return torch.randint(2**form.w_bits, (n, k), generator=generator).to(torch.uint8)
    # Any bit pattern, not-a-number included: a float is moved, never computed with.
    patterns = torch.randint(256, (n, k * form.w_bits // 8), generator=generator).to(torch.uint8)
    return patterns.view(layout_of(form).code_dtype)


def random_weight(scheme, n, k, seed=0):
    """A weight to be moved, not to be multiplied: its floats may be anything."""
    generator = torch.Generator().manual_seed(seed + 1)
    codes_NK, groups = codes_of(format_of(scheme), n, k, seed), scheme.groups(k)
    if scheme.kind == "bf16":
        return QuantizedWeight(codes_NK, None, None, scheme)
    patterns = torch.randint(1, 0x7C00, (n, groups), generator=generator)
    patterns |= torch.randint(2, (n, groups), generator=generator) << 15  # its sign
    zero_NG = torch.randint(2**scheme.w_bits, (n, groups), generator=generator).to(torch.uint8)
    zero_NG = None if scheme.symmetric else zero_NG
    return QuantizedWeight(codes_NK, patterns.to(torch.int16).view(torch.float16), zero_NG, scheme)


def same_bits(a, b):
    """Whether two tensors have the same shape, type and bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # A contiguous tensor may keep any stride along a dimension of size 1, which a view refuses.
    a, b = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))

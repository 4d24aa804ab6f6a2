"""Random weights made in kernel order on the device, so that a layer is there in milliseconds.

Every bit pattern of a packed code is a code, so words of integer formats are random bytes; floats
are drawn and stored as they are. Scales and zeros go through the package's own packing once for
each scheme and are the same for all experts: a kernel takes as long whatever they say.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mxq.kernels.arena import NO_BIAS, GroupedWeights
from mxq.kernels.layout import layout_of, pack_meta, padded, weight_bytes
from mxq.kernels.spec import WeightFormat, format_of
from mxq.numerics import QuantizedWeight
from mxq.scheme import Scheme


def random_group(
    schemes: Sequence[Scheme], out_features: int, in_features: int, *, parts: int, device: str
) -> GroupedWeights:
    """Weights [out_features, in_features] of experts that have ``parts`` problems each.

    Outputs of the parts of an expert lie beside each other, as those of gate and up do.
    """
    n, k = out_features, in_features
    forms = [format_of(scheme) for scheme in schemes]
    generator = torch.Generator(device).manual_seed(2026)
    metas = {scheme: _meta(scheme, n, k, generator, device) for scheme in sorted(set(schemes))}
    sizes = [weight_bytes(layout_of(form), n, k) for form in forms]
    words = _random_bytes(sum(sizes), generator, device)
    rows, w_off, meta_off = [], 0, 0
    for index, (scheme, form, size) in enumerate(zip(schemes, forms, sizes, strict=True)):
        if not form.is_integer:
            _fill_floats(words[w_off : w_off + size], form, generator)
        place = (n, padded(n), padded(k), index % parts * n, index // parts, NO_BIAS)
        rows.append((w_off, meta_off, *place))
        w_off, meta_off = w_off + size, meta_off + metas[scheme].numel()
    distinct = tuple(sorted(set(forms)))
    return GroupedWeights(
        words,
        torch.cat([metas[scheme] for scheme in schemes]),
        torch.empty(0, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor([distinct.index(f) for f in forms], dtype=torch.int32, device=device),
        distinct,
        parts * n,
        k,
        tuple(schemes),
    )


def copies_of(group: GroupedWeights, count: int) -> list[GroupedWeights]:
    """The group and ``count - 1`` more with the same values elsewhere in memory."""
    more = [
        replace(group, words=group.words.clone(), meta=group.meta.clone()) for _ in range(count - 1)
    ]
    return [group, *more]


def touched_bytes(group: GroupedWeights, counts: Sequence[int]) -> int:
    """Bytes of words and metadata of the experts that have tokens: what a product must read."""
    problems = group.problems.tolist()
    w_ends = [row[0] for row in problems[1:]] + [group.words.numel()]
    meta_ends = [row[1] for row in problems[1:]] + [group.meta.numel()]
    return sum(
        w_end - row[0] + 4 * (meta_end - row[1])
        for row, w_end, meta_end in zip(problems, w_ends, meta_ends, strict=True)
        if counts[row[6]] > 0
    )


def _random_bytes(size: int, generator: torch.Generator, device: str) -> Tensor:
    # Weights are padded to 128 both ways, so sizes divide by 8.
    whole = torch.iinfo(torch.int64)
    out = torch.empty(size // 8, dtype=torch.int64, device=device)
    return out.random_(whole.min, whole.max, generator=generator).view(torch.uint8)


def _fill_floats(words: Tensor, form: WeightFormat, generator: torch.Generator) -> None:
    dtype = torch.bfloat16 if form.w_bits == 16 else torch.float8_e4m3fn
    values = torch.empty(words.numel() // dtype.itemsize, dtype=torch.bfloat16, device=words.device)
    values.normal_(generator=generator)
    if form.w_bits == 16:
        values /= 64
    words.view(dtype).copy_(values.to(dtype))


def random_grid(
    scheme: Scheme, n: int, k: int, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """Scales float16 [N, G] near those of trained weights, and zeros near the middle, or None."""
    if scheme.kind == "bf16":
        return None, None
    device, groups = generator.device, scheme.groups(k)
    peak = 64.0 if scheme.kind == "fp8" else 2.0 ** (scheme.w_bits - 1)
    scale = torch.rand(n, groups, generator=generator, device=device) + 0.5
    scale_NG = (scale / (32 * peak)).to(torch.float16)
    if scheme.kind == "fp8" or scheme.symmetric:
        return scale_NG, None
    middle = 2 ** (scheme.w_bits - 1)
    zero = torch.randint(middle - 1, middle + 1, (n, groups), generator=generator, device=device)
    return scale_NG, zero.to(torch.uint8)


def _meta(scheme: Scheme, n: int, k: int, generator: torch.Generator, device: str) -> Tensor:
    form = format_of(scheme)
    # Packing of metadata reads no code but the shape: a view of one code stands for all.
    codes_NK = torch.zeros(1, 1, dtype=layout_of(form).code_dtype, device=device).expand(n, k)
    scale_NG, zero_NG = random_grid(scheme, n, k, generator)
    return pack_meta(QuantizedWeight(codes_NK, scale_NG, zero_NG, scheme), form)

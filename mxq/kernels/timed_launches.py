"""The launches that ``mxq tune`` times: one product on random weights, ready to run.

The weights are never computed from a model, so they are made where they are used, in kernel order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mxq.artifacts import KernelCase
from mxq.kernels.activation import prepare
from mxq.kernels.arena import NO_BIAS, GroupedWeights
from mxq.kernels.group_gemm import GroupGemm
from mxq.kernels.layout import layout_of, pack_meta, padded, weight_bytes
from mxq.kernels.routing import route
from mxq.kernels.spec import TILE_PLANS, TilePlan, WeightFormat, format_of
from mxq.numerics import QuantizedWeight


class _PlannedGemm(GroupGemm):
    """A product under a plan that is given, whatever the tokens: a case may repeat small tiles."""

    plan: TilePlan

    def plan_for(self, tokens: int) -> TilePlan:
        """The plan that was given."""
        return self.plan


def group_gemm_launches(case: KernelCase, device: str = "cuda") -> list[Callable[[], None]]:
    """One launch of the package's kernel for each copy of the weights, everything else prepared.

    Only the product is launched: its inputs and its tile table are there before.
    """
    generator = torch.Generator(device).manual_seed(0)
    plan = next(plan for plan in TILE_PLANS if plan.tokens == case.tile)
    index_TR = _every_expert_alike(case, device)
    tokens = len(index_TR)
    x_TK = torch.randn(tokens, case.in_features, generator=generator, device=device)
    routing = route(index_TR, case.experts)
    launches: list[Callable[[], None]] = []
    for _ in range(case.copies):
        gemm = _PlannedGemm(_random_weights(case, generator, device))
        gemm.plan = plan
        inputs = prepare(x_TK.to(torch.bfloat16), False, gemm.inputs)
        tables = gemm.tables(routing, tokens)

        def launch(gemm=gemm, inputs=inputs, tables=tables) -> None:
            gemm.launch(inputs, routing, tables, tokens)

        launches.append(launch)
    return launches


def _every_expert_alike(case: KernelCase, device: str) -> Tensor:
    """Assignments [T, 1] of ``tokens`` tokens to each expert; of one token to none if that is 0."""
    if case.tokens == 0:
        return torch.full((1, 1), case.experts, dtype=torch.int64, device=device)
    experts = torch.arange(case.experts, device=device).repeat(case.tokens)
    return experts[:, None]


def _random_weights(case: KernelCase, generator: torch.Generator, device: str) -> GroupedWeights:
    """Experts with random words and one set of scales and zeros; outputs of all in one column."""
    form, n, k = format_of(case.scheme), case.out_features, case.in_features
    one = _random_metadata(case, generator, device)
    meta = pack_meta(one, form)
    bytes_of_one = weight_bytes(layout_of(form), n, k)
    rows = [
        (e * bytes_of_one, e * len(meta), n, padded(n), padded(k), 0, e, NO_BIAS)
        for e in range(case.experts)
    ]
    return GroupedWeights(
        words=_random_words(form, case.experts * bytes_of_one, generator, device),
        meta=meta.repeat(case.experts),
        bias=torch.empty(0, device=device),
        problems=torch.tensor(rows, dtype=torch.int64, device=device),
        format_index=torch.zeros(case.experts, dtype=torch.int32, device=device),
        formats=(form,),
        out_features=n,
        in_features=k,
        schemes=(case.scheme,) * case.experts,
    )


def _random_metadata(case: KernelCase, generator: torch.Generator, device: str) -> QuantizedWeight:
    """Scales and zeros of one expert; its codes are an empty tensor of the right shape."""
    scheme, n, k = case.scheme, case.out_features, case.in_features
    codes_NK = torch.empty(n, k, dtype=torch.uint8, device=device)
    if scheme.kind == "bf16":
        return QuantizedWeight(codes_NK, None, None, scheme)
    groups = scheme.groups(k)
    scale_NG = torch.rand(n, groups, generator=generator, device=device).to(torch.float16) + 0.5
    zero_NG = None
    if scheme.kind == "int" and not scheme.symmetric:
        zero_NG = torch.randint(
            2**scheme.w_bits, (n, groups), generator=generator, device=device, dtype=torch.uint8
        )
    return QuantizedWeight(codes_NK, scale_NG, zero_NG, scheme)


def _random_words(
    form: WeightFormat, count: int, generator: torch.Generator, device: str
) -> Tensor:
    """Random codes; floats come from a normal distribution, as any bits would hold infinities."""
    if form.is_integer:
        return torch.randint(256, (count,), generator=generator, device=device, dtype=torch.uint8)
    floats = torch.randn(count * 8 // form.w_bits, generator=generator, device=device)
    kind = torch.bfloat16 if form.w_bits == 16 else torch.float8_e4m3fn
    return floats.to(kind).view(torch.uint8)

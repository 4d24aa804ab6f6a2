"""From a case to a row: prepare, check, time, and what the time means in bytes and operations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from group_gemm.cases import OURS, Case
from group_gemm.checks import Check, products_of
from group_gemm.peers import MAKERS, peer_pair
from group_gemm.products import (
    Pair,
    copies_needed,
    error_over_bound,
    is_reproducible,
    make_groups,
    make_layers,
    make_pair,
    weight_bytes,
)
from group_gemm.shapes import Model, choose_experts, expert_counts, plan_named, skew
from group_gemm.timing import Clock, Times
from mxq.kernels.spec import WeightFormat, format_of
from mxq.scheme import Scheme


class Refused(Exception):  # noqa: N818  # not an error of the program
    """A case that must not be timed, with the reason."""


def make_row(
    case: Case,
    models: Mapping[str, Model],
    clock: Clock,
    ceilings: Mapping[str, float | None],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The row of a case.

    ``failed`` are checks that did not pass, with their reasons.

    Raises:
        Refused: If a check of its kernels or of its own results failed.
    """
    model = models[case.model]
    index_TR = choose_experts(model, case.tokens, case.routing, seed=case.tokens)
    if case.runner == OURS:
        launches, facts = _ours(case, model, index_TR, clock, failed)
        schemes: Sequence[Scheme] = plan_named(case.plan, model).first
        schemes = (*schemes, *plan_named(case.plan, model).down)
    else:
        scheme = Scheme.parse(case.plan)
        made = peer_pair(MAKERS[case.runner], scheme, model, index_TR, clock.device)
        launches, facts = made[0], {"weight_bytes": made[1], "identical_bits": None}
        schemes = (scheme,) * (3 * model.experts)
    times = clock.time(launches)
    counts = expert_counts(index_TR, model.experts)
    row = {"key": case.key, **asdict(case), **asdict(times), **facts, "copies": len(launches)}
    row |= {
        "experts_reached": sum(count > 0 for count in counts),
        "tokens_of_busiest": max(counts),
        "skew": round(skew(counts), 3),
    }
    return row | _figures(row, times, _work(model, schemes, counts), ceilings)


def _ours(
    case: Case, model: Model, index_TR: Tensor, clock: Clock, failed: Mapping[str, str]
) -> tuple[list[Callable[[], object]], dict[str, Any]]:
    plan = plan_named(case.plan, model)
    groups = make_groups(plan, model, clock.device)
    read = weight_bytes(groups, index_TR)
    copies = copies_needed(read) if clock.device == "cuda" else 2
    launches = "single" if case.launches == "single" else "mixed"
    pair = make_pair(
        groups,
        model,
        index_TR,
        launches=launches,
        copies=copies if case.kind == "pair" else 1,
    )
    tile_plan = pair.first.gemms[0].plan_for(case.tokens).name
    for schemes in products_of(case, {model.name: model}):
        name = Check(schemes, launches, tile_plan).name
        if name in failed:
            raise Refused(f"check {name} failed: {failed[name]}")
    error, same = _checked(pair, index_TR, model)
    facts = {
        "weight_bytes": read,
        "stored_bits": round(plan.stored_bits(model), 4),
        "formats": [str(form) for form in plan.formats],
        "tile_plan": tile_plan,
        "error_over_bound": round(error, 4),
        "identical_bits": same,
    }
    if case.kind == "pair":
        return [lambda copy=copy: pair.launch(copy) for copy in range(copies)], facts
    layers = make_layers(groups, launches, copies)
    x_TH = torch.randn(case.tokens, model.hidden, device=clock.device).to(torch.bfloat16)
    index, weights = index_TR.to(clock.device), torch.full(index_TR.shape, 1 / model.top_k)
    weights = weights.to(clock.device)
    return [lambda layer=layer: layer(x_TH, index, weights) for layer in layers], facts


def _checked(pair: Pair, index_TR: Tensor, model: Model) -> tuple[float, bool]:
    """Error over bound of the busiest expert, and whether two runs agree.

    Raises:
        Refused: If the error is larger than rounding explains.
    """
    counts = expert_counts(index_TR, model.experts)
    busiest = [counts.index(max(counts))]
    error = max(error_over_bound(h, pair.tokens, busiest) for h in (pair.first, pair.second))
    if not error <= 1.0:
        raise Refused(f"its result differs from the definition by {error:.3g} of the bound")
    return error, all(is_reproducible(half, pair.tokens) for half in (pair.first, pair.second))


def _work(model: Model, schemes: Sequence[Scheme], counts: Sequence[int]) -> dict[str, float]:
    """Operations by arithmetic, and bytes of inputs and outputs of both products.

    ``schemes``: two of the first product for each expert, then one of the second. An input is
    counted once, where its token is; outputs are bf16.
    """
    slots = sum(counts)
    work = {"bf16": 0.0, "int8": 0.0, "fp8": 0.0}
    inputs = 0.0
    for place, scheme in enumerate(schemes):
        is_first = place < 2 * model.experts
        expert = place // 2 if is_first else place - 2 * model.experts
        form: WeightFormat = format_of(scheme)
        work[form.arithmetic] += 2.0 * counts[expert] * model.hidden * model.inner
        width = 2 if form.arithmetic == "bf16" else 1
        if is_first:
            inputs += counts[expert] * model.hidden * width / (2 * model.top_k)
        else:
            inputs += counts[expert] * model.inner * width
    work["bytes"] = inputs + 2.0 * slots * (2 * model.inner + model.hidden)
    return work


def _figures(
    row: Mapping[str, Any],
    times: Times,
    work: Mapping[str, float],
    ceilings: Mapping[str, float | None],
) -> dict[str, Any]:
    """Bandwidth, rate, and the roofline's time by the ceilings measured in the same run."""
    flops = work["bf16"] + work["int8"] + work["fp8"]
    total = row["weight_bytes"] + work["bytes"]
    figures: dict[str, Any] = {"flops": flops, "total_bytes": total}
    figures |= {"roofline_us": None, "roofline_share": None}
    roofline_us = _roofline_us(total, work, ceilings)
    if times.median_us is None:
        return figures | {"weight_tb_s": None, "total_tb_s": None, "tflop_s": None}
    if roofline_us is not None:
        figures["roofline_us"] = round(roofline_us, 3)
        figures["roofline_share"] = round(roofline_us / times.median_us, 4)
    return figures | {
        "weight_tb_s": row["weight_bytes"] / times.median_us / 1e6,
        "total_tb_s": total / times.median_us / 1e6,
        "tflop_s": flops / times.median_us / 1e6,
    }


def _roofline_us(
    total: float, work: Mapping[str, float], ceilings: Mapping[str, float | None]
) -> float | None:
    """The longer of moving the bytes and doing the operations."""
    copy = ceilings["copy_bytes_per_s"]
    rates = {name: ceilings[f"{name}_flops_per_s"] for name in ("bf16", "int8", "fp8")}
    if copy is None or any(work[name] > 0 and rate is None for name, rate in rates.items()):
        return None
    computing = sum(work[name] / rate for name, rate in rates.items() if rate is not None)
    return 1e6 * max(total / copy, computing)

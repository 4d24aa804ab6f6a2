"""Any family behind transformers' experts interface, as per-expert linear projections.

transformers holds the experts of a layer in fused parameters, ``gate_up_proj`` [E, 2I, H] (or
``up_proj`` where there is no gate) and ``down_proj`` [E, H, I], and describes the variants by the
flags ``is_transposed``, ``is_concatenated``, ``has_bias``, ``has_gate``, ``has_post_expert_norm``.
This file is the one place that knows those flags. The packed runtime has the same flags, so both
run through ``route`` and ``expert_output``.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

PROJECTIONS = ("gate", "up", "down")
"""In the order of computation; ``gate`` is absent where the family has no gate."""

Linear = Callable[[str, Tensor], Tensor]
"""``(projection, x_TK) -> z_TN`` of one expert, bias included."""


class Experts(Protocol):
    """The flags and functions that an experts module of transformers carries."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module holds fused experts behind transformers' experts interface."""
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    )


def expert_count(module: nn.Module) -> int:
    """Number of experts held."""
    return _parameter(module, "down_proj").shape[0]


def projection_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """``{projection: (out_features, in_features)}`` of one expert."""
    flags = cast(Experts, module)
    shape = tuple(_parameter(module, "down_proj").shape[1:])
    inner, outer = shape if flags.is_transposed else shape[::-1]
    shapes = {"up": (inner, outer), "down": (outer, inner)}
    return {"gate": (inner, outer), **shapes} if flags.has_gate else shapes


def locate(module: nn.Module, expert: int, projection: str) -> tuple[str, tuple[int | slice, ...]]:
    """Parameter name and index of one projection of one expert.

    The rectangle is stored [in, out] where the module ``is_transposed``.
    """
    flags = cast(Experts, module)
    if projection == "down":
        return "down_proj", (expert,)
    if not flags.has_gate:
        return "up_proj", (expert,)
    rows = _gate_up_rows(flags, projection, projection_shapes(module)["up"][0])
    return "gate_up_proj", (expert, slice(None), rows) if flags.is_transposed else (expert, rows)


def expert_weight(module: nn.Module, expert: int, projection: str) -> Tensor:
    """View [N, K] of one projection's weight."""
    name, index = locate(module, expert, projection)
    view = _parameter(module, name)[index]
    return view.T if cast(Experts, module).is_transposed else view


def expert_bias(module: nn.Module, expert: int, projection: str) -> Tensor | None:
    """View [N] of one projection's bias, None where the family has none."""
    flags = cast(Experts, module)
    if not flags.has_bias:
        return None
    if projection == "down":
        return _parameter(module, "down_proj_bias")[expert]
    if not flags.has_gate:
        return _parameter(module, "up_proj_bias")[expert]
    rows = _gate_up_rows(flags, projection, projection_shapes(module)["up"][0])
    return _parameter(module, "gate_up_proj_bias")[expert, rows]


def dense_linear(module: nn.Module, expert: int) -> Linear:
    """The projections of one expert with its own weights."""

    def linear(projection: str, x_TK: Tensor) -> Tensor:
        weight = expert_weight(module, expert, projection)
        return nn.functional.linear(x_TK, weight, expert_bias(module, expert, projection))

    return linear


def working_linear(module: nn.Module, expert: int) -> Linear:
    """The projections of one expert as they work now: inputs rounded where that is installed."""
    dense, inputs = dense_linear(module, expert), getattr(module, "mxq_inputs", {})

    def linear(projection: str, x_TK: Tensor) -> Tensor:
        round_input = inputs.get((expert, projection))
        return dense(projection, x_TK if round_input is None else round_input(x_TK))

    return linear


def expert_inner(experts: Experts, linear: Linear, x_TH: Tensor) -> Tensor:
    """The input of the down projection, [T, I]: the activation of gate and up."""
    up_TI = linear("up", x_TH)
    if not experts.has_gate:
        return experts.act_fn(up_TI)
    gate_TI = linear("gate", x_TH)
    if experts.is_concatenated:
        return experts._apply_gate(torch.cat([gate_TI, up_TI], -1))
    return experts._apply_gate(torch.stack([gate_TI, up_TI], -1).flatten(-2))


def expert_output(experts: Experts, linear: Linear, x_TH: Tensor) -> Tensor:
    """Output of one expert before its routing weight, [T, H]."""
    return _finish(experts, linear("down", expert_inner(experts, linear, x_TH)))


def run_expert(module: nn.Module, expert: int, x_TH: Tensor) -> Tensor:
    """``expert_output`` of a fused expert as it works now, gate and up in one product if they can.

    They cannot where their inputs are rounded, which may be in two ways.
    """
    experts, linear = cast(Experts, module), working_linear(module, expert)
    inputs = getattr(module, "mxq_inputs", {})
    if not experts.has_gate or (expert, "gate") in inputs or (expert, "up") in inputs:
        return expert_output(experts, linear, x_TH)
    weight = _parameter(module, "gate_up_proj")[expert]
    bias = _parameter(module, "gate_up_proj_bias")[expert] if experts.has_bias else None
    # The parameter is in the order that the gate takes: halves, or one row of each in turn.
    product = nn.functional.linear(x_TH, weight.T if experts.is_transposed else weight, bias)
    return _finish(experts, linear("down", experts._apply_gate(product)))


def _finish(experts: Experts, y_TH: Tensor) -> Tensor:
    return experts.post_expert_norm(y_TH) if experts.has_post_expert_norm else y_TH


def routed_tokens(index_TR: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Rows and top-k positions of the tokens that an expert receives."""
    rows, positions = torch.where(index_TR == expert)
    return rows, positions


def route(
    hidden_TH: Tensor,
    index_TR: Tensor,
    weights_TR: Tensor,
    experts: int,
    output: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Sum of the experts' outputs weighted by the router; ``output(expert, x) -> y``.

    ``index_TR`` may hold ``experts`` itself as a sentinel for "no expert".
    """
    total_TH = torch.zeros_like(hidden_TH)
    for expert in torch.bincount(index_TR.flatten()).nonzero().flatten().tolist():
        if expert < experts:
            rows, positions = routed_tokens(index_TR, expert)
            y = output(expert, hidden_TH[rows]) * weights_TR[rows, positions, None]
            total_TH.index_add_(0, rows, y.to(total_TH.dtype))
    return total_TH


def _gate_up_rows(flags: Experts, projection: str, inner: int) -> slice:
    if flags.is_concatenated:
        return slice(0, inner) if projection == "gate" else slice(inner, 2 * inner)
    return slice(0, None, 2) if projection == "gate" else slice(1, None, 2)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, getattr(module, name))

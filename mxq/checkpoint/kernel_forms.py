"""The kernel form of packed modules: made once from the tensors of the files, on their device.

Where kernels cannot serve, a warning says why, once for each reason, and the caller decodes. The
tensors of the files are let go only when the kernel form of the whole layer is there.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from mxq.models.experts import Experts
from mxq.numerics import QuantizedWeight
from mxq.scheme import Scheme

if TYPE_CHECKING:
    from mxq.kernels.arena import GroupedWeights
    from mxq.kernels.layer import ExpertLayer, Gate, LinearLayer

GateFunction = Callable[[Tensor], Tensor]
"""Results of the first product, [S, 2 I] (or [S, I] without a gate), to the inner activation."""


class PackedLinear(Protocol):
    """What is needed of a linear with a packed weight."""

    scheme: Scheme
    out_features: int
    in_features: int
    rotated: bool
    bias: nn.Parameter | None

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zeros."""

    def move_to_arena(self, arena: "GroupedWeights", index: int) -> None:
        """Leave the weight to the kernels' copy."""


class _Part(NamedTuple):
    """A linear, the first column of its output in the product, and the expert it belongs to."""

    linear: PackedLinear
    column: int
    expert: int


def build_linear(linear: nn.Module, dtype: torch.dtype) -> "LinearLayer | None":
    """The kernel form of a packed linear; None, after a warning, if there is none."""
    packed = cast(PackedLinear, linear)
    arenas = _build(linear, [[_Part(packed, 0, 0)]], dtype)
    if arenas is None:
        return None
    from mxq.kernels.layer import LinearLayer

    return LinearLayer(arenas[0], is_rotated=packed.rotated)


def build_experts(
    experts: nn.Module, count: int, is_rotated: bool, dtype: torch.dtype
) -> "ExpertLayer | None":
    """The kernel form of the packed experts of a layer; None, after a warning, if there is none.

    Expert e is the child named ``str(e)``, with a packed linear for each projection.
    """
    flags = cast(Experts, experts)
    arenas = _build(experts, _expert_parts(experts, count), dtype)
    if arenas is None:
        return None
    from mxq.kernels.layer import ExpertLayer

    after = flags.post_expert_norm if flags.has_post_expert_norm else None
    gate = recognise_gate(gate_function(flags), flags.has_gate, after)
    first, second = arenas
    return ExpertLayer(first, second, gate, is_rotated=is_rotated)


def gate_function(flags: Experts) -> GateFunction:
    """What a family computes between the products, for gate and up beside each other."""
    if not flags.has_gate:
        return flags.act_fn
    if flags.is_concatenated:
        return flags._apply_gate

    def interleaved(z_SN: Tensor) -> Tensor:
        gate_SI, up_SI = z_SN.chunk(2, dim=-1)
        return flags._apply_gate(torch.stack([gate_SI, up_SI], -1).flatten(-2))

    return interleaved


def recognise_gate(
    function: GateFunction, is_gated: bool, after: Callable[[Tensor], Tensor] | None
) -> "Gate":
    """The gate of a layer: the kernel's own activation where it computes the same.

    The two are compared on a grid that is wide enough to see a clamp, so no list of families is
    needed; what is not recognised runs in torch between the two products.
    """
    from mxq.kernels.activation import Activation
    from mxq.kernels.layer import Gate

    line = torch.linspace(-40.0, 40.0, 321)
    first, second = torch.cartesian_prod(line, line[::16]).unbind(1)
    probe = torch.stack([first, second], 1) if is_gated else first[:, None]
    found = _evaluate(function, probe)
    if found is not None and found.shape == first.shape:
        for name in get_args(Activation):
            expected = _ACTIVATIONS[name](first) * (second if is_gated else 1.0)
            if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return Gate(name, is_gated, None, after)
    return Gate(None, is_gated, function, after)


def _evaluate(function: GateFunction, probe: Tensor) -> Tensor | None:
    """Values of a gate on the CPU; None if it works only with its own device and width."""
    try:
        with torch.no_grad():
            return function(probe).to(torch.float32).flatten()
    except RuntimeError:
        return None


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
    "identity": lambda x: x,
}


def _expert_parts(experts: nn.Module, count: int) -> list[list[_Part]]:
    """The linears of the two products, in the order of their problems."""
    inner = ("gate", "up") if cast(Experts, experts).has_gate else ("up",)
    first, second = [], []
    for expert in range(count):
        linears = experts.get_submodule(str(expert))
        for place, name in enumerate(inner):
            linear = cast(PackedLinear, linears.get_submodule(f"{name}_proj"))
            first.append(_Part(linear, place * linear.out_features, expert))
        down = cast(PackedLinear, linears.get_submodule("down_proj"))
        second.append(_Part(down, 0, expert))
    return [first, second]


def _build(
    module: nn.Module, products: Sequence[Sequence[_Part]], dtype: torch.dtype
) -> "list[GroupedWeights] | None":
    """The arenas of a module's products; its linears then refer to them."""
    schemes = {part.linear.scheme for parts in products for part in parts}
    widest = max(part.linear.in_features for parts in products for part in parts)
    reason = _refusal(module, schemes, widest, dtype)
    if reason is None:
        try:
            device = next(module.parameters()).device
            arenas = [_arena(parts, device) for parts in products]
        except torch.OutOfMemoryError:
            reason = "the GPU has no memory left for the kernels' form of a layer"
    if reason is not None:
        _warn_decoded(reason)
        return None
    for arena, parts in zip(arenas, products, strict=True):
        for index, part in enumerate(parts):
            part.linear.move_to_arena(arena, index)
    return arenas


def _arena(parts: Sequence[_Part], device: torch.device) -> "GroupedWeights":
    from mxq.kernels.arena import Problem, WeightSize, group_weights

    sizes = [
        WeightSize(p.linear.scheme, p.linear.out_features, p.linear.in_features) for p in parts
    ]
    problems = (
        Problem(part.linear.quantized(), part.column, part.expert, part.linear.bias)
        for part in parts
    )
    return group_weights(problems, sizes, device=device)


def _refusal(
    module: nn.Module, schemes: set[Scheme], widest: int, dtype: torch.dtype
) -> str | None:
    """Why kernels cannot serve a module's weights where they are, or None."""
    devices = {parameter.device for parameter in module.parameters()}
    if torch.device("meta") in devices:
        return "the weights are offloaded"
    if len(devices) > 1:
        return f"the weights of one layer are on {len(devices)} devices"
    try:
        from mxq.kernels import activation, dispatch
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    reason = _scheme_refusal(schemes)
    if widest > activation.WIDTH_LIMIT:
        reason = f"a token has {widest} features, they take {activation.WIDTH_LIMIT} at most"
    has_fp8 = any(scheme.kind == "fp8" for scheme in schemes)
    return reason or dispatch.refusal(devices.pop(), dtype, has_fp8=has_fp8)


def _scheme_refusal(schemes: set[Scheme]) -> str | None:
    from mxq.kernels.spec import format_of

    try:
        for scheme in sorted(schemes):
            format_of(scheme)
    except ValueError as error:
        return str(error)
    return None


def _warn_decoded(reason: str) -> None:
    warnings.warn(
        f"mxq decodes weights in every call, which is slow, instead of using kernels: {reason}. "
        "mxq.set_engine(model, 'decoded') accepts that without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )

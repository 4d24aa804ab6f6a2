"""The packed runtime: modules that hold packed weights, for kernels or decoded one per call."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mxq.checkpoint.engine import (
    Engine,
    call_experts,
    call_linear,
    register,
    wants_kernels,
)
from mxq.checkpoint.kernel_forms import build_experts, build_linear
from mxq.checkpoint.tensors import from_tensors, tensor_shapes, to_tensors
from mxq.models.experts import (
    Experts,
    expert_bias,
    expert_count,
    expert_output,
    projection_shapes,
    route,
)
from mxq.numerics import QuantizedWeight, dequantize, fake_quantize_input, rotate, unrotate
from mxq.scheme import Scheme

if TYPE_CHECKING:
    from mxq.kernels.arena import GroupedWeights
    from mxq.kernels.layer import ExpertLayer, LinearLayer

PACKED_EXPERTS_FUNCTION = "mxq_packed"
"""Name of the packed experts among the experts implementations of transformers."""

DECODE_WEIGHTS = 2**20
"""Weights decoded at a time, so that a decode needs little beside its result."""


class MxqLinear(nn.Module):
    """A linear with a packed weight. Its scales keep their type under ``.to(dtype)``.

    ``arena`` is the kernels' copy of the weight, with the number of its problem there; while it is
    set, the tensors of the file are empty.
    """

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        *,
        bias_dtype: torch.dtype | None,
        rotated: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scheme, self.compute_dtype = scheme, compute_dtype
        # bf16 loses nothing that a rotation could save, so it keeps the plain weight.
        self.rotated = rotated and scheme.kind != "bf16"
        self.in_features, self.out_features = in_features, out_features
        self.stored = tuple(tensor_shapes(scheme, out_features, in_features))
        for suffix, (shape, dtype) in tensor_shapes(scheme, out_features, in_features).items():
            empty = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(suffix, empty)
        bias = None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.engine: Engine = "auto"
        self.arena: tuple[GroupedWeights, int] | None = None
        self.layer: LinearLayer | None = None
        self.declined = False
        self.handle = register(self)
        _keep_form_of_files(self)

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zeros, from wherever they are."""
        if self.arena is not None:
            from mxq.kernels.arena import weight_of

            return weight_of(*self.arena)
        tensors = {suffix: self.get_parameter(suffix) for suffix in self.stored}
        return from_tensors(tensors, self.scheme, self.out_features, self.in_features)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in the frame of the (rotated) input."""
        q = self.quantized()
        w_NK = torch.empty(
            self.out_features, self.in_features, dtype=dtype, device=q.codes_NK.device
        )
        rows = max(1, DECODE_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            w_NK[part] = dequantize(q[part], dtype)
        return w_NK

    def __getattr__(self, name: str) -> Any:
        """Decode ``weight`` for modeling code that reads it instead of calling the module."""
        if name == "weight" and "weight" not in self.__dict__.get("stored", ("weight",)):
            w_NK = self.decode(self.compute_dtype)
            return unrotate(w_NK) if self.rotated else w_NK
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """``W x + b``, the input rotated and rounded as the scheme says."""
        if wants_kernels(self.engine, x):
            return cast(Tensor, call_linear(x, self.out_features, self.handle))
        return self.decoded(x)

    def decoded(self, x: Tensor) -> Tensor:
        """The output by a decoded weight."""
        x = rotate(x) if self.rotated else x
        x = fake_quantize_input(x, self.scheme)
        return nn.functional.linear(x, self.decode(x.dtype), self.bias)

    def compute(self, x: Tensor) -> Tensor:
        """The output by kernels where they can serve, else by a decoded weight."""
        self.prepare()
        if self.layer is None:
            return self.decoded(x)
        return self.layer(x.to(torch.bfloat16)).to(x.dtype)

    def prepare(self) -> None:
        """Make the kernel form, unless it is there or kernels cannot serve."""
        if self.layer is None and not self.declined:
            self.layer = build_linear(self, self.compute_dtype)
            self.declined = self.layer is None

    def move_to_arena(self, arena: "GroupedWeights", index: int) -> None:
        """Leave the weight to the kernels' copy and empty the tensors of the file."""
        for suffix in self.stored:
            self.get_parameter(suffix).data = self.get_parameter(suffix).data.new_empty(0)
        self.arena = arena, index

    def restore(self) -> None:
        """Take the weight back into the tensors of the file; the kernels' copy is let go."""
        if self.arena is not None:
            for suffix, tensor in to_tensors(self.quantized()).items():
                self.get_parameter(suffix).data = tensor
        self.arena = self.layer = None
        self.declined = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MxqLinear":
        self.restore()
        self.compute_dtype = _dtype_after(fn, self.compute_dtype)
        stored = {id(self.get_parameter(suffix)) for suffix in self.stored}

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in stored else moved

        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]  # torch leaves it so
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the tensors of the file."""
        self.restore()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another module, with a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it so
        self.handle = register(self)

    def extra_repr(self) -> str:
        """Shape and scheme."""
        turned = ", rotated" if self.rotated else ""
        return f"{self.in_features} -> {self.out_features}, {self.scheme}{turned}"


class MxqExperts(nn.Module):
    """Stands in for any experts module of transformers, expert by expert packed.

    Flags, gate function and activation are those of the module it replaces.
    """

    def __init__(
        self,
        original: nn.Module,
        schemes: Mapping[str, tuple[Scheme, ...]],
        *,
        rotated: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in original.named_children():
            setattr(self, name, child)
        gate = getattr(type(original), "_apply_gate", None)
        if gate is not None:
            self._apply_gate = MethodType(gate, self)
        self.experts = expert_count(original)
        for expert in range(self.experts):
            self.add_module(
                str(expert), _packed_expert(original, expert, schemes, rotated, compute_dtype)
            )
        self.rotated, self.compute_dtype = rotated, compute_dtype
        self.engine: Engine = "auto"
        self.layer: ExpertLayer | None = None
        self.declined = False
        self.handle = register(self)
        _keep_form_of_files(self)

    def forward(self, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor) -> Tensor:
        """Weighted sum of the routed experts, [T, H]."""
        return run_packed_experts(self, hidden_TH, index_TR, weights_TR)

    def compute(self, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor) -> Tensor:
        """The output by kernels where they can serve, else by decoded weights."""
        self.prepare()
        if self.layer is None:
            return self.decoded(hidden_TH, index_TR, weights_TR)
        out_TH = self.layer(hidden_TH.to(torch.bfloat16), index_TR, weights_TR)
        return out_TH.to(hidden_TH.dtype)

    def prepare(self) -> None:
        """Make the kernel form, unless it is there or kernels cannot serve."""
        if self.layer is None and not self.declined:
            self.layer = build_experts(self, self.experts, self.rotated, self.compute_dtype)
            self.declined = self.layer is None

    def decoded(self, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor) -> Tensor:
        """The output by the weights of one expert after the other, decoded."""
        flags = cast(Experts, self)

        def output(expert: int, x_TH: Tensor) -> Tensor:
            parts = self.get_submodule(str(expert))

            def linear(projection: str, x_TK: Tensor) -> Tensor:
                return cast(MxqLinear, parts.get_submodule(f"{projection}_proj")).decoded(x_TK)

            return expert_output(flags, linear, x_TH)

        return route(hidden_TH, index_TR, weights_TR, self.experts, output)

    def restore(self) -> None:
        """Take all weights back into the tensors of the files."""
        for module in self.modules():
            if isinstance(module, MxqLinear):
                module.restore()
        self.layer = None
        self.declined = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MxqExperts":
        self.restore()
        self.compute_dtype = _dtype_after(fn, self.compute_dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it so
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the tensors of the files."""
        self.restore()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another module, with a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it so
        self.handle = register(self)


def run_packed_experts(
    module: nn.Module, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor
) -> Tensor:
    """The experts function that packed experts run through; registered with transformers."""
    assert isinstance(module, MxqExperts)
    if wants_kernels(module.engine, hidden_TH):
        return cast(Tensor, call_experts(hidden_TH, index_TR, weights_TR, module.handle))
    return module.decoded(hidden_TH, index_TR, weights_TR)


ALL_EXPERTS_FUNCTIONS.register(PACKED_EXPERTS_FUNCTION, run_packed_experts)


def _keep_form_of_files(module: "MxqLinear | MxqExperts") -> None:
    """Whoever reads or replaces the tensors by name gets those of the files."""
    module.register_state_dict_pre_hook(_restore_before)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_restore_before)  # type: ignore[no-untyped-call]


def _restore_before(module: nn.Module, *unused: Any) -> None:
    cast("MxqLinear | MxqExperts", module).restore()


def _packed_expert(
    original: nn.Module,
    expert: int,
    schemes: Mapping[str, tuple[Scheme, ...]],
    rotated: bool,
    compute_dtype: torch.dtype,
) -> nn.Module:
    parts = nn.Module()
    for projection, (out_features, in_features) in projection_shapes(original).items():
        bias = expert_bias(original, expert, projection)
        linear = MxqLinear(
            schemes[f"{projection}_proj"][expert],
            in_features,
            out_features,
            bias_dtype=_dtype_of(bias),
            rotated=rotated,
            compute_dtype=compute_dtype,
        )
        parts.add_module(f"{projection}_proj", linear)
    return parts


def packed_linear(
    original: nn.Linear, scheme: Scheme, *, rotated: bool, compute_dtype: torch.dtype
) -> MxqLinear:
    """The packed twin of a plain linear."""
    return MxqLinear(
        scheme,
        original.in_features,
        original.out_features,
        bias_dtype=_dtype_of(original.bias),
        rotated=rotated,
        compute_dtype=compute_dtype,
    )


def _dtype_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    """The type that a move or cast of the module gives to floats of that type."""
    return fn(torch.empty(0, dtype=dtype)).dtype


def _dtype_of(bias: Tensor | None) -> torch.dtype | None:
    return None if bias is None else bias.dtype

"""How a packed module computes: with kernels on the packed weights, or by decoding them.

A packed module on a GPU builds its kernel form at the first call and gives up the form of the
files, so that weights are held once; both are made from each other bit for bit. Calls go through
two operators of torch, which ``torch.compile`` and CUDA graphs take as they are.
"""

from itertools import count
from typing import Literal, Protocol, cast, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Engine = Literal["auto", "kernels", "decoded"]
"""``auto``: kernels on a GPU where they can serve, decoded weights elsewhere."""


class PackedModule(Protocol):
    """A module with packed weights that has a number, so that an operator can find it."""

    engine: Engine
    declined: bool
    handle: int

    def compute(self, *inputs: Tensor) -> Tensor:
        """The module's output, by kernels or by decoding."""

    def prepare(self) -> None:
        """Make the kernel form, where kernels can serve."""


# An operator's arguments are tensors and numbers: a module goes by its number. Entries die with
# their modules, and numbers are never used again.
_MODULES: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_NUMBERS = count()


def register(module: nn.Module) -> int:
    """The number under which the operators find a module."""
    handle = next(_NUMBERS)
    _MODULES[handle] = module
    return handle


def set_engine(model: nn.Module, engine: Engine) -> int:
    """Choose how the packed modules of a model compute; returns how many there are.

    "kernels" takes them wherever they can run, also in Triton's interpreter on a CPU. The kernel
    forms of modules on a GPU are made at once, as ``from_pretrained`` does; after moving a model,
    call this before recording a CUDA graph.

    Raises:
        ValueError: If there is no such engine, or the model has no packed module.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"no engine {engine!r}; choose one of {', '.join(get_args(Engine))}")
    packed = packed_modules(model)
    if not packed:
        raise ValueError("the model has no packed module; load a checkpoint written by mxq")
    for module in packed:
        module.engine = engine
        module.declined = False
    prepare_kernels(model)
    return len(packed)


def prepare_kernels(model: nn.Module) -> None:
    """Make the kernel forms of the packed modules that are on a GPU and may use them."""
    held: set[int] = set()
    for module in packed_modules(model):
        # The linears of a layer's experts come after it and belong to it.
        if id(module) in held:
            continue
        own = cast(nn.Module, module)
        held |= {id(child) for child in own.modules()}
        is_on_gpu = all(tensor.device.type == "cuda" for tensor in own.parameters())
        if module.engine != "decoded" and is_on_gpu:
            module.prepare()


def packed_modules(model: nn.Module) -> list[PackedModule]:
    """The packed modules of a model, parents before their children."""
    return [
        cast(PackedModule, module)
        for module in model.modules()
        if module.__dict__.get("handle") is not None
    ]


def wants_kernels(engine: Engine, x: Tensor) -> bool:
    """Whether a call tries kernels: not for gradients, and on a CPU only if told to."""
    if engine == "decoded" or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return engine == "kernels" or x.device.type != "cpu"


@torch.library.custom_op("mxq::experts", mutates_args=())
def call_experts(hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor, handle: int) -> Tensor:
    """The routed experts of the module with that number, contiguous [T, H]."""
    module = cast(PackedModule, _MODULES[handle])
    return module.compute(hidden_TH, index_TR, weights_TR).contiguous()


@call_experts.register_fake
def _experts_shape(hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor, handle: int) -> Tensor:
    return hidden_TH.new_empty(hidden_TH.shape)


@torch.library.custom_op("mxq::linear", mutates_args=())
def call_linear(x: Tensor, out_features: int, handle: int) -> Tensor:
    """The linear of the module with that number, [..., out_features]."""
    return cast(PackedModule, _MODULES[handle]).compute(x)


@call_linear.register_fake
def _linear_shape(x: Tensor, out_features: int, handle: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))

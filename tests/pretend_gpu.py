"""A stand-in for a GPU: tensors of another device that compute on the CPU and refuse to mix.

``pretend_gpu()`` is a context in which ``DEVICE`` works: factories and copies make tensors there,
every operation of torch runs on them with the CPU's own arithmetic, and one that meets both a
tensor of the CPU and one of the device fails, but for what a GPU allows: copies, scalars without
dimensions, and indices. Gradients pass. The device's type is "lazy", a name that torch knows, that
no backend of a usual build takes, and whose backward pass needs no threads of its own.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)

_ATEN = torch.ops.aten
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default}
_INDEXED = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
}
"""A GPU takes indices from the host, but values and what is indexed have to be in one place."""


class MixedDevicesError(RuntimeError):
    """An operation met a tensor of the CPU and one of the pretended GPU."""


class PretendTensor(torch.Tensor):
    """A tensor on DEVICE; ``host`` are its values. A view's are a view of its base's."""

    @staticmethod
    def __new__(cls, host):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        tensor.host = host
        return tensor

    def untyped_storage(self):
        """That of the values: two views of one tensor have one."""
        return self.host.untyped_storage()

    def tolist(self):
        """A copy, as from a GPU; torch has none for wrapped tensors."""
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of a GPU has no numpy array; copy it to the CPU first")

    def __repr__(self):
        return f"PretendTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees the calls that have no tensor of DEVICE but ask for one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if PretendTensor in types or _is_ours(kwargs.get("device")):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


@contextmanager
def pretend_gpu():
    """DEVICE works while the context is open, in this thread."""
    with _Mode(), _known_to_autocast(), _whole_operations():
        yield DEVICE


def _run(function, args, kwargs):
    if function not in _COPIES:
        _check(function, args, kwargs)
    wanted, plain = kwargs.get("device"), _on_host(args)
    options = {name: _on_host(value) for name, value in kwargs.items()}
    if wanted is not None:
        options["device"] = torch.device("cpu")
    out = function(*plain, **options)
    if function._schema.is_mutable:
        assert function._schema.name.endswith("_"), f"the stand-in lacks {function}"
        return args[0]
    stays = isinstance(args[0], PretendTensor) if wanted is None and args else _is_ours(wanted)
    goes_there = stays if function in _COPIES else wanted is None or _is_ours(wanted)
    return _wrapped(out) if goes_there else out


def _on_host(value):
    if isinstance(value, PretendTensor):
        return value.host
    if isinstance(value, (tuple, list)):
        return type(value)(map(_on_host, value))
    return value


def _wrapped(value):
    if isinstance(value, torch.Tensor):
        return PretendTensor(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_wrapped, value))
    return value


def _check(function, args, kwargs):
    if function in _INDEXED and isinstance(args[0], PretendTensor):
        args = (args[0], *args[2:])
    tensors = list(_tensors((*args, *kwargs.values())))
    is_ours = [isinstance(tensor, PretendTensor) for tensor in tensors]
    if not any(is_ours) or all(is_ours):
        return
    if any(not ours and t.dim() > 0 for ours, t in zip(is_ours, tensors, strict=True)):
        met = [(str(t.device), tuple(t.shape)) for t in tensors]
        raise MixedDevicesError(f"{function} met {met}")


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _is_ours(device):
    return device is not None and device.type == DEVICE.type


@contextmanager
def _known_to_autocast():
    """Modeling code asks whether the device's autocast is on; torch knows none for this one."""
    ask = torch.is_autocast_enabled

    def answer(kind=None):
        return False if kind == DEVICE.type else (ask() if kind is None else ask(kind))

    with mock.patch("torch.is_autocast_enabled", answer):
        yield


@contextmanager
def _whole_operations():
    """Operations with a kernel of their own on CPUs and GPUs are not taken apart here either."""

    def never(*args):
        raise AssertionError("tensors of DEVICE are wrapped, so no kernel of its type is called")

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("silu_backward", never, "Lazy")
        yield
